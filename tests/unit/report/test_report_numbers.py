"""The numbers that the charts draw: nothing that stands out is lost on the way."""

import base64
import re
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest

from gradclip.diagnostics import GroupRecord, RunRecorder, StepRecord
from gradclip.diagnostics.known import known
from gradclip.diagnostics.runs import Run, read_runs
from gradclip.errors import ArgumentValueError
from gradclip.record.columns import Steps
from gradclip.record.reader import Norms
from gradclip.report import write_report
from gradclip.report.heat import heat_of, rows_of
from gradclip.report.line_charts import shown_groups
from gradclip.report.series import columns_of


def of(norms, start=0):
    steps = Steps()
    for at, norm in enumerate(norms):
        steps.add({"step": start + at, "norm_pre": norm, "clipped": norm > 20})
    return known(Run("run", steps))


def test_a_bucket_keeps_the_least_the_middle_and_the_most_and_where_that_was():
    norms = [float(1 + at % 3) for at in range(20_001)]
    norms[7777], norms[9000:9003] = 99.0, [float("nan")] * 3
    found = columns_of(of(norms, start=2**40), {})
    steps = found["step"].astype(np.int64)
    assert (found["step_hi"] - found["step_lo"]).max() == 2
    assert set(np.diff(steps)) <= {2, 3}  # exact beyond 2 ** 31
    bucket = 7777 // 3
    assert [found[name][bucket] for name in ("norm_lo", "norm", "norm_hi")] == [1, 3, 99]
    assert found["norm_at"][bucket] == 2**40 + 7777
    assert found["clipped"].sum() == found["clipped"][bucket] == 1
    assert np.isnan(found["norm"][3000])


def test_numbers_beyond_float32_are_kept():
    found = columns_of(of([1e200, 1e-200, 1.0]), {})
    assert found["norm"].tolist() == [1e200, 1e-200, 1.0]
    assert columns_of(of([1.0, 2.0]), {})["norm"].dtype == np.float32


def test_of_many_groups_those_with_the_largest_norms_have_the_six_colours():
    groups = {
        name: GroupRecord(norm_pre=float(place), threshold=2.0)
        for place, name in enumerate("abcdefgh")
    }
    records = [StepRecord(step=at, norm_pre=1.0, groups=groups) for at in range(3)]
    run = known(Run("run", Steps.of(records)))
    shown = shown_groups(run)
    assert {key: group.name for key, group in shown.items()} == {
        f"group{place}": name for place, name in enumerate("cdefgh")
    }
    assert columns_of(run, shown)["group5_limit"].tolist() == [2, 2, 2]


def test_the_heat_map_has_the_largest_norm_of_each_column_and_marks_what_is_none():
    norms = np.ones((3000, 2))
    norms[1234, 0], norms[6, 1], norms[10:16, 1] = 1e4, np.nan, 0
    rows = rows_of(["a", "b"])
    found = heat_of(Norms(np.arange(3000), ["a", "b"], norms), rows, 0, 2999)
    assert found.codes.shape == (2, 1000)
    assert found.per_column == 3
    value = 10 ** (found.low + (found.codes[0, 1234 // 3] - 2) * found.unit)
    assert value == pytest.approx(1e4, rel=3e-3)
    assert found.codes[1, [2, 4]].tolist() == [65535, 1]
    assert (found.codes[0] == found.codes[0].max()).sum() == 1


def test_a_norm_that_is_kept_now_and_then_holds_until_the_next():
    steps = np.arange(0, 100, 4)
    norms = np.where(steps == 40, 5.0, 1.0)[:, None]
    found = heat_of(Norms(steps, ["a"], norms), rows_of(["a"]), 0, 99)
    assert found.codes.shape == (1, 25)
    assert np.flatnonzero(found.codes[0] == found.codes[0].max()).tolist() == [10]


def test_very_many_parameters_are_rows_of_modules():
    names = [f"blocks.{at}.{part}.{kind}" for at in range(200) for part in "ab" for kind in "wxyz"]
    rows = rows_of(names)
    assert (rows.are, len(rows.names), rows.names[:2]) == (
        "module",
        400,
        ["blocks.0.a", "blocks.0.b"],
    )
    norms = np.ones((1, len(names)))
    norms[0, :4] = 1e200  # whose squares are infinite
    found = heat_of(Norms(np.array([0]), names, norms), rows, 0, 0)
    assert found.low == pytest.approx(np.log10(2))
    assert found.low + (found.codes[0, 0] - 2) * found.unit == pytest.approx(200 + np.log10(2))


def test_a_record_that_was_put_together_is_sorted():
    records = [
        StepRecord(step=at, norm_pre=at + 1.0, skipped=at == 1, reason="rank" if at == 1 else None)
        for at in (2, 0, 1)
    ]
    run = known(Run("run", Steps.of(records)))
    assert run.step.tolist() == [0, 1, 2]
    assert run.norm.tolist() == [1, 2, 3]
    assert run.reasons == {1: "rank"}


def test_the_file_needs_nothing_else_and_runs_only_its_own_script(tmp_path):
    name = "</script><b>$title&.jsonl".replace("/", "")
    with RunRecorder(tmp_path / name) as recorder:
        for step in range(40):
            recorder.write(StepRecord(step=step, norm_pre=1.0, optimizer=step % 2))
    runs = read_runs(tmp_path / name)
    findings = write_report(runs, tmp_path / "report.html")
    assert len(findings) == len(runs) == 2
    page = (tmp_path / "report.html").read_bytes().decode()
    assert "<b>" not in page
    assert (
        page.count("&lt;b&gt;$title&amp;.jsonl, optimizer 1") == 3
    )  # in the table, the list, and above it
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    for text in (script, style):
        digest = base64.b64encode(sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in page
    assert set(re.findall(r"https?://[^\s\"']+", page)) == {"http://www.w3.org/2000/svg"}
    with pytest.raises(ArgumentValueError):
        write_report([], tmp_path / "none.html")


def test_several_runs_begin_with_a_table_that_says_whether_it_helped(tmp_path):
    def run(name, clipped, last):
        records = [
            StepRecord(
                step=at,
                norm_pre=1.0 + at,
                threshold=40.0 if clipped else None,
                clipped=clipped and at > 39,
                loss=last if at >= 10 else 1e6,
            )
            for at in range(60)
        ]
        return Run(name, Steps.of(records))

    nan = float("nan")
    write_report([run("a", True, 2.0), run("b", False, nan)], tmp_path / "report.html")
    table = (tmp_path / "report.html").read_text().partition("</table>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    cells = [[re.sub("<.*?>", "", cell) for cell in row] for row in rows]
    assert cells == [
        ["a", "40", "60", "20 (33 %)", "0", "2.00", "30.5", "60"],
        ["b", "none was seen", "60", "none was seen", "0", "NaN from step 10", "30.5", "60"],
    ]


def test_events_name_the_first_the_largest_and_new_limits(tmp_path):
    page, bad = tmp_path / "report.html", {*range(20), 30, *range(31, 57, 2)}
    records = [
        StepRecord(
            step=at,
            norm_pre=float("inf") if at in bad else 1 + (at == 500) * 8.0,
            skipped=at in bad,
            reason="overflow" if at < 20 else None,
            new_policy="NormClip(max_norm=2.0)" if at == 600 else None,
            nonfinite=int(at in bad),
        )
        for at in range(1000)
    ]
    write_report([replace(Run("run", Steps.of(records)), name="run")], page)
    text = page.read_text()
    # What happened to steps in a row is one row.
    assert re.findall(r">([\d to]+)</button></td><td>([a-z ]+), skipped<", text) == [
        ("0 to 19", "loss scale too large"),
        ("30 to 31", "not finite"),
        *((str(step), "not finite") for step in range(33, 53, 2)),
    ]
    assert "The first 32 of 34 steps that were not finite or not made" in text
    assert "Mean step: what would have been left of the length of a step" in text
    assert re.search(r'data-go="500".*?large norm.*?>9<', text)
    assert re.search(r'data-go="600".*?new limit: NormClip\(max_norm=2.0\)', text)
