import json
import math

import pytest

from gradclip import __version__
from gradclip.clipping.result import ClipStats
from gradclip.diagnostics import RunRecorder, StepRecord, read_header, read_record
from gradclip.errors import ArgumentValueError

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
    assert StepRecord.from_stats(2, None, loss=1.0) == StepRecord(step=2, loss=1.0)
