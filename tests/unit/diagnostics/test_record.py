import json
import math
import os
import time
from dataclasses import replace

import pytest

from gradclip import __version__
from gradclip.clipping.result import ClipStats
from gradclip.diagnostics import (
    GroupRecord,
    RunRecorder,
    StepRecord,
    clipping_figure,
    finding,
    read_header,
    read_record,
    save_figure,
    summarise,
)
from gradclip.errors import ArgumentValueError
from patience import seconds

FULL = StepRecord(
    step=0,
    loss=2.5,
    norm_pre=7.25,
    norm_post=1.0,
    threshold=1.0,
    coefficient=0.125,
    clipped=True,
    skipped=False,
    nonfinite=0,
    lr=3e-3,
    elapsed_ms=4.5,
)
STRANGE = StepRecord(
    step=1, loss=math.nan, norm_pre=math.inf, threshold=-math.inf, skipped=True, nonfinite=3
)


def write(path, steps, **options):
    with RunRecorder(path, **options) as recorder:
        for step in steps:
            recorder.write(StepRecord(step=step, loss=float(step)))


@pytest.mark.smoke
def test_what_is_written_is_what_is_read(tmp_path):
    path = tmp_path / "folder" / "run.jsonl"
    with RunRecorder(path, meta={"seed": 4}) as recorder:
        recorder.write(FULL)
        recorder.write(STRANGE)

    full, strange = read_record(path)

    assert full == FULL
    assert repr(strange) == repr(STRANGE)  # NaN does not equal itself
    assert read_header(path) == {"gradclip": __version__, "schema": 1, "seed": 4}


def test_every_line_is_strict_json(tmp_path):
    path = tmp_path / "run.jsonl"
    with RunRecorder(path) as recorder:
        recorder.write(STRANGE)

    def refuse(constant):
        raise AssertionError(constant)

    _, line = path.read_text().splitlines()
    entry = json.loads(line, parse_constant=refuse)
    assert (entry["loss"], entry["norm_pre"], entry["threshold"]) == ("nan", "inf", "-inf")
    assert entry["norm_post"] is None


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "run.jsonl"
    recorder = RunRecorder(path)
    recorder.write(FULL)

    assert read_record(path) == [FULL]
    recorder.close()
    recorder.close()


def test_a_resumed_run_drops_what_it_will_do_again(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, range(6), meta={"seed": 1})
    write(path, [4, 5, 6], start_step=4, meta={"seed": 2})

    assert [record.step for record in read_record(path)] == [0, 1, 2, 3, 4, 5, 6]
    assert read_header(path)["seed"] == 1


def test_a_run_from_the_start_replaces_the_file(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, range(6))
    write(path, [0])

    assert [record.step for record in read_record(path)] == [0]


def test_a_resumed_run_without_a_file_starts_one(tmp_path):
    write(tmp_path / "run.jsonl", [7], start_step=7)

    assert [record.step for record in read_record(tmp_path / "run.jsonl")] == [7]


def test_a_line_that_a_killed_run_left_unfinished_is_left_out(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, range(3))
    path.write_bytes(path.read_bytes()[:-9])

    assert [record.step for record in read_record(path)] == [0, 1]
    write(path, [2], start_step=2)
    assert [record.step for record in read_record(path)] == [0, 1, 2]


def test_a_link_that_waits_for_the_draft_is_not_followed(tmp_path):
    """The draft had a name that anybody could guess."""
    path, target = tmp_path / "run.jsonl", tmp_path / "mine.txt"
    target.write_text("mine")
    for name in ("run.jsonl.tmp", ".run.jsonl.tmp"):
        (tmp_path / name).symlink_to(target)
    write(path, range(3))
    write(path, [2], start_step=2)
    assert target.read_text() == "mine"
    assert [record.step for record in read_record(path)] == [0, 1, 2]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_record_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    write(path, range(3))

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        RunRecorder(path, start_step=2)
    assert [record.step for record in read_record(path)] == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [path]


def test_limits_by_group_are_recorded_by_group(tmp_path):
    groups = {
        "head.*": GroupRecord(norm_pre=3.0, norm_post=0.5, threshold=0.5, clipped=True),
        "*": GroupRecord(norm_pre=math.inf, threshold=math.inf, nonfinite=2, skipped=True),
    }
    step = StepRecord(step=0, loss=1.0, norm_pre=4.0, threshold=0.5, groups=groups)
    path = tmp_path / "run.jsonl"
    with RunRecorder(path) as recorder:
        recorder.write(step)
        recorder.write(StepRecord(step=1))
    assert read_record(path) == [step, StepRecord(step=1)]
    _, with_groups, without = path.read_text().splitlines()
    assert list(json.loads(with_groups))[:2] == ["step", "loss"]
    assert json.loads(with_groups)["groups"]["*"]["norm_pre"] == "inf"
    assert "groups" not in json.loads(without)


def test_fields_of_later_versions_are_ignored(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"gradclip": "9", "schema": 1}\n{"step": 3, "mood": "good"}\n')

    assert read_record(path) == [StepRecord(step=3)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ":1 .*the file is empty"),
        ("loss\n1.5\n", ":1 .*not JSON: 'loss'"),
        ("[1]\n", ":1 .*not a JSON object"),
        ('{"loss": 1}\n', ":1 .*no schema"),
        ('{"schema": 2}\n', ":1 .*schema 2; this version reads 1"),
        ('{"schema": 1}\n{"loss": 1}\n', ":2 .*no step"),
        ('{"schema": 1}\n{"step": 0}\n{"step": 1, "loss": "low"}\n', ":3 .*loss is 'low'"),
        ('{"schema": true}\n', ":1 .*schema True"),
        ('{"schema": 1}\n{"step": true}\n', ":2 .*step is True"),
        ('{"schema": 1}\n{"step": -1}\n', ":2 .*step is -1, not a whole number"),
        ('{"schema": 1}\n{"step": 1.5}\n', ":2 .*step is 1.5, not a whole number"),
        (f'{{"schema": 1}}\n{{"step": {"9" * 400}}}\n', ":2 .*step is 999.*not a whole number"),
        (f'{{"schema": 1}}\n{{"step": 1, "loss": -{"9" * 400}}}\n', ":2 .*a float can hold"),
        (f'{{"schema": 1}}\n{{"step": 1, "nonfinite": {"9" * 400}}}\n', ":2 .*nonfinite is 99"),
        (f'{{"schema": 1}}\n{{"step": {"9" * 5000}}}\n', ":2 .*not JSON"),
        ('{"schema": 1}\n{"step": 1, "clipped": 3}\n', ":2 .*clipped is 3, not true or false"),
        ('{"schema": 1}\n{"step": 1, "skipped": "nan"}\n', ":2 .*skipped is 'nan'"),
        ('{"schema": 1}\n{"step": 1, "loss": true}\n', ":2 .*loss is True"),
        ('{"schema": 1}\n{"step": 1, "groups": [1]}\n', ":2 .*groups is .1., not numbers"),
        ('{"schema": 1}\n{"step": 1, "groups": {"*": 1}}\n', ":2 .*not numbers by pattern"),
        ('{"schema": 1}\n{"step": 1, "groups": {"*": {"clipped": 1}}}\n', ":2 .*clipped is 1"),
        ('{"schema": 1}\n' + "[" * 200_000 + "\n", ":2 .*not JSON"),
        ('{"schema": 1}\n{"step": 0}\n\n', ":3 .*not JSON"),
    ],
)
def test_what_is_no_record_is_refused_with_its_line(tmp_path, text, words):
    path = tmp_path / "run.jsonl"
    path.write_text(text)

    with pytest.raises(ArgumentValueError, match=words):
        read_record(path)
    with pytest.raises(ArgumentValueError, match=words):
        RunRecorder(path, start_step=1)
    assert path.read_text() == text


@pytest.mark.parametrize("line", ["[", '{"a":', "9", '{"step":', '"', "\ufeff", "{},"])
def test_a_hostile_line_costs_less_than_a_second(tmp_path, line):
    path = tmp_path / "run.jsonl"
    path.write_text('{"schema": 1}\n' + line * (2**20 // len(line)) + "\n")
    started = time.process_time()
    with pytest.raises(ArgumentValueError, match=r":2 .*not JSON") as caught:
        read_record(path)
    assert time.process_time() - started < seconds(1)
    assert len(str(caught.value)) < 1_000


def test_a_line_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b'{"schema": 1}\n{"step": 0, "note": "\xff"}\n')
    with pytest.raises(ArgumentValueError, match=r":2 .*not JSON"):
        read_record(path)


def test_what_other_programs_do_to_a_file_is_read(tmp_path):
    """A byte order mark, other line ends, raw separators inside a text, null for what is not."""
    path = tmp_path / "run.jsonl"
    lines = [
        '\ufeff{"schema": 1, "name": "a\u2028b"}',
        '{"step": 0, "note": "a\u2028b\u2029c\x85d", "loss": 1}',
        '{"step": 1, "clipped": null, "skipped": null, "nonfinite": null, "groups": null}',
        '{"step": 2, "loss": NaN, "norm_pre": Infinity, "lr": 1e999}',
    ]
    for end in ("\n", "\r\n"):
        path.write_bytes("".join(line + end for line in lines).encode())
        records = read_record(path)
        assert records[:2] == [StepRecord(step=0, loss=1.0), StepRecord(step=1)]
        assert math.isnan(records[2].loss)
        assert (records[2].norm_pre, records[2].lr) == (math.inf, math.inf)
        assert read_header(path)["name"] == "a\u2028b"
        finding(records)


@pytest.mark.parametrize(
    ("loss", "norm"),
    [(1e308, 5e-324), (-1e308, 1e308), (1.7976931348623157e308, 1e308), (5e-324, 5e-324)],
)
def test_numbers_at_the_ends_of_what_a_float_holds_are_summed_up_and_drawn(tmp_path, loss, norm):
    path = tmp_path / "run.jsonl"
    with RunRecorder(path) as recorder:
        for step in range(4):
            recorder.write(StepRecord(step=step, loss=loss, norm_pre=norm, threshold=norm))
    records = read_record(path)
    assert summarise(records).final_loss == loss
    mixed = [StepRecord(step=0, loss=-loss, norm_pre=1 / 3), *records[1:]]
    for runs in ((records,), (records, mixed), (mixed,)):
        save_figure(clipping_figure(*runs), tmp_path / "run.png")


def test_a_record_is_made_from_what_the_clipper_reported():
    stats = ClipStats(
        norm_pre=7.25,
        norm_post=1.0,
        threshold=1.0,
        coefficient=0.125,
        clipped=True,
        skipped=False,
        nonfinite=0,
    )

    assert StepRecord.from_stats(0, stats, loss=2.5, lr=3e-3, elapsed_ms=4.5) == FULL
    by_group = replace(stats, groups={"head.*": stats, "*": replace(stats, clipped=False)})
    groups = StepRecord.from_stats(0, by_group).groups
    assert list(groups) == ["head.*", "*"]
    assert (groups["head.*"].threshold, groups["*"].norm_pre) == (1.0, 7.25)
    assert (groups["head.*"].clipped, groups["*"].clipped) == (True, False)
    assert StepRecord.from_stats(2, None, loss=1.0) == StepRecord(step=2, loss=1.0)
