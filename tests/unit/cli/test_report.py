from functools import partial

import pytest

from gradclip.diagnostics import RunRecorder, StepRecord


@pytest.fixture
def gradclip_report(gradclip_command):
    return partial(gradclip_command, "report")


@pytest.fixture
def record(tmp_path):
    with RunRecorder(tmp_path / "run.jsonl") as recorder:
        for step in range(60):
            norm = 2.0 if step < 5 else 0.5
            recorder.write(
                StepRecord(step=step, norm_pre=norm, threshold=1.0, clipped=norm > 1, loss=1 / 3)
            )
    return tmp_path / "run.jsonl"


@pytest.mark.smoke
def test_a_record_and_a_log_make_one_file(gradclip_report, record, tmp_path):
    code, out, err = gradclip_report(record)
    said = "run.jsonl: The limit of 1 clipped 5 of 60 steps."
    assert (code, out, err) == (0, f"{said}\nreport  report.html\n", "")
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")

    log = tmp_path / "metrics.csv"
    log.write_text("step,grad_norm\n" + "".join(f"{at % 10},{1 + at}\n" for at in range(170)))
    code, out, err = gradclip_report(record, log, "-o", "new/both.html")
    assert (code, err) == (0, "16 of 18 runs are shown: the last\n")
    assert out.splitlines()[0] == "metrics.csv, run 2: 10 logged steps with norms from 11 to 20."
    assert out.endswith("report  new/both.html\n")
    assert (tmp_path / "new" / "both.html").read_text().count("<article ") == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.csv"], "error[GC303]: missing.csv cannot be read: No such file"),
        (["{record}", "-o", "{record}/x.html"], "/run.jsonl/x.html cannot be written: "),
        (["{empty}"], "error[GC303]: "),
        (["{stepless}"], "it is a record without a step"),
        ([], "DIR_OR_FILE"),
    ],
)
def test_a_mistake_is_a_message_and_exits_with_2(
    gradclip_report, record, tmp_path, arguments, message
):
    places = {"record": record, "empty": tmp_path / "empty", "stepless": tmp_path / "stepless"}
    places["empty"].write_text("")
    RunRecorder(places["stepless"]).close()
    code, out, err = gradclip_report(*(each.format(**places) for each in arguments))
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("*.html"))


def test_its_help_has_examples(gradclip_report):
    code, out, _ = gradclip_report("--help")
    assert code == 0
    assert "gradclip report runs/1" in out
