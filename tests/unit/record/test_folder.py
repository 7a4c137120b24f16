"""The folder of a record: what is written is read, whatever happened between."""

import gzip
import json
import os
import re
import shutil
import struct
import time
from hashlib import sha256
from math import log10
from pathlib import Path

import pytest

from gradclip.diagnostics import (
    read_events,
    read_header,
    read_log,
    read_norms,
    read_record,
    read_steps,
)
from gradclip.errors import ArgumentValueError, RecordError
from gradclip.record import lines, norms, own_file
from gradclip.record.schema import StepRecord
from gradclip.record.writer import Batch, Layout, Place, Writer
from patience import seconds

LAYOUT = Layout(["a.weight", "a.bias"], [6, 2], [2.0, 2.0], [1.0, 1.0])

ALONE = Place()


def row(step, *values):
    return step, struct.pack(f"<{len(values)}e", *map(log10, values))


def write(writer, number, steps, size=7, more=0.0):
    steps = list(steps)
    for at in range(0, len(steps), size):
        part = steps[at : at + size]
        batch = Batch(
            [{"step": step, "norm_pre": step + more, "clipped": step % 2 == 1} for step in part],
            [row(step, 1.0 + step, 0.5) for step in part],
            [row(step, 1.0 + step, 0.5) for step in part],
            [{"event": "spike", "step": step} for step in part],
        )
        writer.write(number, part[0], batch)


def begin(folder, first=0, *, resumes=False, place=ALONE, layout=LAYOUT):
    writer = Writer(folder)  # a process of its own
    number = writer.join()
    writer.begin(number, first, place, {"called": "test"}, resumes=resumes)
    writer.lay_out(number, layout, first)
    return writer, number


def run(folder, steps, **options):
    writer, number = begin(folder, steps[0], **options)
    write(writer, number, steps)
    writer.leave(number)


def append(path, data):
    path.write_bytes(path.read_bytes() + data)


def contents(folder):
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.smoke
def test_what_is_written_is_what_is_read(tmp_path):
    run(tmp_path / "runs" / "1", range(9))
    folder = tmp_path / "runs" / "1"
    expected = [
        StepRecord(step=step, norm_pre=float(step), clipped=step % 2 == 1) for step in range(9)
    ]
    assert read_record(folder) == list(read_steps(folder)) == expected
    assert read_header(folder)["optimizers"][0]["called"] == "test"
    assert [event["step"] for event in read_events(folder)] == list(range(9))
    found = read_norms(folder)
    assert (found.names, list(found.steps)) == (["a.weight", "a.bias"], list(range(9)))
    assert found.norms[3] == pytest.approx([4.0, 0.5], rel=5e-3)


@pytest.fixture
def small(monkeypatch):
    """Files are full after a few steps."""
    monkeypatch.setattr(lines, "SEGMENT", 10)
    monkeypatch.setattr(norms, "MOST_ROWS", 16)
    monkeypatch.setattr(norms, "MOST_EVENTS", 5)
    monkeypatch.setattr("gradclip.record.writer.MOST_EVENTS", 5)


def test_full_files_are_packed_thinned_and_closed(tmp_path, small):
    run(tmp_path, range(100))
    assert [record.step for record in read_record(tmp_path)] == list(range(100))
    assert len(list(tmp_path.glob("steps-*.jsonl.gz"))) == 7
    part = read_header(tmp_path)["optimizers"][0]["norms"][0]
    assert part["every"] == 8
    # Every eighth step, and the first five of those that are kept whatever their number.
    assert list(read_norms(tmp_path).steps) == [0, 1, 2, 3, 4, *range(8, 100, 8)]
    assert (tmp_path / "norms-events.f16").stat().st_size == 5 * 12
    events = read_events(tmp_path)
    assert [event.get("last", False) for event in events] == [False] * 4 + [True]
    run(tmp_path, range(100, 130), resumes=True)
    assert [record.step for record in read_record(tmp_path)] == list(range(130))
    assert len(read_events(tmp_path)) == 5
    assert list(read_norms(tmp_path).steps) == [0, 1, 2, 3, 4, *range(16, 130, 16)]


def test_a_kill_at_any_moment_leaves_a_record(tmp_path, small):
    run(tmp_path / "a", range(25))
    for number, damage in enumerate(
        (
            lambda d: (d / "steps-00000.jsonl").write_bytes(
                gzip.decompress((d / "steps-00000.jsonl.gz").read_bytes())
            ),
            lambda d: (
                (d / "steps-00001.jsonl").write_bytes(
                    gzip.decompress((d / "steps-00001.jsonl.gz").read_bytes())
                ),
                (d / "steps-00001.jsonl.gz").unlink(),
            ),
            lambda d: (d / ".steps-00001.jsonl.gz.0123abcd.tmp").write_bytes(b"half"),
            lambda d: append(d / "steps.jsonl", b'{"step": 25, "no'),
            lambda d: append(d / "norms.f16", b"\1\2\3"),
        )
    ):
        folder = tmp_path / f"b{number}"
        shutil.copytree(tmp_path / "a", folder)
        damage(folder)
        assert [record.step for record in read_record(folder)] == list(range(25))
        before = list(read_norms(folder).steps)
        run(folder, range(25, 32), resumes=True)
        assert [record.step for record in read_record(folder)] == list(range(32))
        assert list(read_norms(folder).steps)[: len(before)] == before
        assert not list(folder.glob("steps-*.jsonl"))


def test_a_run_that_goes_on_drops_what_it_does_again(tmp_path, small):
    first, other = begin(tmp_path)
    second = first.join()
    first.begin(second, 0, Place(), {"called": "other"}, resumes=False)
    first.lay_out(second, LAYOUT, 0)
    for step in range(0, 28, 4):
        write(first, other, range(step, step + 4))
        write(first, second, range(step, step + 4))
    for number in (other, second):
        first.leave(number)
    run(tmp_path, range(9, 12), resumes=True)
    steps = read_steps(tmp_path)
    of = {
        number: [s for s, o in zip(steps.step, steps.optimizer, strict=True) if o == number]
        for number in (0, 1)
    }
    assert of == {0: list(range(12)), 1: list(range(28))}
    assert max(read_norms(tmp_path, optimizer=0).steps) <= 11
    assert max(read_norms(tmp_path, optimizer=1).steps) > 11


def test_a_folder_of_another_run_is_refused_and_left_as_it_is(tmp_path):
    run(tmp_path, range(3))
    before = contents(tmp_path)
    with pytest.raises(
        RecordError, match=r"another folder, .*load_state_dict.*fit.ckpt_path.*; or delete"
    ):
        begin(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "change",
    [
        {"every": 0},
        {"every": "2"},
        {"names": ["a"]},
        {"names": None},
        {"file": "../norms.f16"},
        {"file": "steps.jsonl"},
        {"orders": [0.0]},
        {"first_step": 9**400},
    ],
)
def test_a_damaged_description_is_refused_and_nothing_is_changed(tmp_path, change):
    run(tmp_path, range(3))
    about = json.loads((tmp_path / "run.json").read_text())
    about["optimizers"][0]["norms"][0].update(change)
    (tmp_path / "run.json").write_text(json.dumps(about) + "\n")
    before = contents(tmp_path)
    for resumes in (False, True):
        with pytest.raises(
            RecordError, match=r"run.json:1 .*not what gradclip writes(.|\n)*ways out"
        ):
            begin(tmp_path, resumes=resumes)
    for read in (read_norms, read_record):
        with pytest.raises(ArgumentValueError, match="not what gradclip writes"):
            read(tmp_path)
    assert contents(tmp_path) == before


def test_a_second_optimizer_of_the_same_process_shares_the_writer(tmp_path):
    writer = Writer.of(tmp_path)
    assert Writer.of(tmp_path / ".." / tmp_path.name) is writer
    assert [writer.join(), writer.join()] == [0, 1]
    writer.leave(0)
    assert writer.join() == 0


def test_other_parameters_begin_another_file_of_norms(tmp_path):
    writer, number = begin(tmp_path)
    write(writer, number, range(4))
    writer.lay_out(number, Layout(["a.weight"], [6], [2.0], [1.0]), 4)
    writer.write(number, 4, Batch(norms=[row(4, 7.0)]))
    writer.leave(number)
    found = read_norms(tmp_path)
    assert list(found.steps) == [0, 1, 2, 3, 4]
    assert found.norms[4, 0] == pytest.approx(7.0, rel=5e-3)
    assert found.norms[4, 1] != found.norms[4, 1]


def test_ranks_write_beside_each_other_and_their_parts_are_added_up(tmp_path):
    parts = Layout(["split", "copied"], [3, 4], [2.0, 2.0], [1.0, 0.5])
    for rank, values in enumerate(((3.0, 2.0), (4.0, 2.0))):
        place = Place(rank, 2)
        writer, number = begin(tmp_path, place=place, layout=parts)
        batch = Batch([{"step": 0}], [row(0, *values)])
        batch.events = [{"event": "nonfinite", "step": 0, "parameters": ["split"]}]
        writer.write(number, 0, batch)
        writer.leave(number)
    assert len(read_record(tmp_path)) == 1
    assert [event.get("rank", 0) for event in read_events(tmp_path)] == [0, 1]
    assert read_norms(tmp_path).norms[0] == pytest.approx([5.0, 2.0], rel=1e-2)


def test_a_disk_that_fails_stops_no_training_and_is_told_once(tmp_path, monkeypatch):
    writer, number = begin(tmp_path)
    write(writer, number, range(5))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(own_file, "write_all", full)
        with pytest.warns(UserWarning, match="No space left.*Lines are missing from step 5 on"):
            write(writer, number, range(5, 9))
        write(writer, number, range(9, 12))
    write(writer, number, range(12, 15))
    writer.leave(number)
    assert [record.step for record in read_record(tmp_path)] == list(range(5))


def test_one_process_writes_a_folder_and_a_second_one_stops(tmp_path):
    early, late = begin(tmp_path), begin(tmp_path)  # both before a step was written
    write(*early, range(5))
    with pytest.warns(UserWarning, match="another process writes them. Give another folder"):
        write(*late, range(5))
    write(*early, range(5, 9))
    assert [record.step for record in read_record(tmp_path)] == list(range(9))
    assert list(read_norms(tmp_path).steps) == list(range(9))
    run(tmp_path, range(7, 12), resumes=True)
    with pytest.warns(UserWarning, match="Lines are missing from step 9 on"):
        write(*early, range(9, 12))
    assert [record.step for record in read_record(tmp_path)] == list(range(12))
    again = begin(tmp_path, 12, resumes=True)
    shutil.rmtree(tmp_path)
    with pytest.warns(UserWarning, match="its files were deleted"):
        write(*again, range(12, 13))


def test_advice_is_taken_from_a_folder(tmp_path):
    writer, first = begin(tmp_path)
    second = writer.join()
    writer.begin(second, 0, ALONE, {"called": "other"}, resumes=False)
    for at in range(0, 20, 4):  # as two optimizers write, in turn
        write(writer, first, range(at, at + 4))
        write(writer, second, range(at, at + 4), more=0.5)
    runs = read_log(tmp_path)
    assert [list(run.norms) for run in runs] == [
        [step + more for step in range(20)] for more in (0.0, 0.5)
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[" * 2**20, "not JSON"),
        (b'{"step": ' + b"9" * 400 + b"}", "step is 999"),
        (b'{"step": 5, "loss": -' + b"9" * 400 + b"}", "a float can hold"),
        (b'{"step": null}', "it has no step"),
        (b'{"step": 5, "reason": 3}', "reason is 3"),
        (b'{"step": 5, "optimizer": -1}', "optimizer is -1"),
        (b'{"step": 5, "groups": {"*": {"clipped": 1}}}', "clipped is 1"),
        (b'{"step": 5}' + b" " * 2**25, "a line of more than"),
        (b'{"step": 5, "loss": "NaN"}', "loss is 'NaN'"),
        (b'\xff{"step": 5}', "not JSON"),
    ],
)
def test_a_hostile_line_is_an_error_with_its_place_in_less_than_a_second(tmp_path, line, words):
    run(tmp_path, range(3))
    with (tmp_path / "steps.jsonl").open("ab") as file:
        file.write(line + b"\n")
    for read in (read_steps, read_record):
        started = time.process_time()
        with pytest.raises(ArgumentValueError, match=rf"steps.jsonl:4 .*{words}"):
            read(tmp_path)
        assert time.process_time() - started < seconds(1)


def test_numbers_in_every_spelling_are_read(tmp_path):
    run(tmp_path, range(1))
    with (tmp_path / "steps.jsonl").open("ab") as file:
        file.write('{"step": 1, "loss": "nan", "lr": Infinity, "note": "a\u2028b"}\r\n'.encode())
        file.write(
            b' {"step": 2, "loss": null, "lr": -Infinity, "norm_pre": NaN, "skipped": null}\n'
        )
    for records in (read_record(tmp_path), list(read_steps(tmp_path))):
        assert [record.lr for record in records] == [None, float("inf"), -float("inf")]
        assert (str(records[1].loss), records[2].loss, str(records[2].norm_pre)) == (
            "nan",
            None,
            "nan",
        )


def test_a_damaged_folder_is_refused_with_its_file(tmp_path):
    with pytest.raises(ArgumentValueError, match=r"is no gradclip record: run\.json"):
        read_record(tmp_path)
    run(tmp_path, range(3))
    (tmp_path / "steps-00000.jsonl.gz").write_bytes(b"\x1f\x8b\x08 no archive")
    with pytest.raises(ArgumentValueError, match=r"steps-00000\.jsonl\.gz:1 "):
        read_record(tmp_path)
    about = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**about, "schema": 3}) + "\n")
    with pytest.raises(ArgumentValueError, match="schema 3; this version reads 2"):
        read_header(tmp_path)


def replaced(name, make):
    def damage(folder):
        (folder / name).unlink()
        make(folder / name)

    return damage


@pytest.mark.parametrize(
    ("damage", "words", "resumes"),
    [
        (shutil.rmtree, "there is no|cannot be read|has no norms", True),
        (replaced("norms.f16", Path.mkdir), r"norms\.f16 cannot be read", False),
        (replaced("norms.f16", os.mkfifo), None, False),
        (replaced("steps.jsonl", Path.mkdir), r"steps\.jsonl cannot be read", False),
        (lambda folder: os.truncate(folder / "run.json", 4 << 30), "run.json:1 .*more than", False),
    ],
)
def test_what_is_no_file_or_has_no_end_is_told_in_less_than_a_second(
    tmp_path, damage, words, resumes
):
    folder = tmp_path / "run"
    run(folder, range(3))
    damage(folder)
    seen = []
    for read in (read_steps, read_record, read_header, read_events, read_norms):
        started = time.process_time()
        try:
            read(folder)
        except ArgumentValueError as error:
            seen.append(str(error))
        assert time.process_time() - started < seconds(1)
    assert all(re.search(words, error) for error in seen) if words else not seen
    assert words is None or seen
    if not resumes:
        with pytest.raises(RecordError):
            begin(folder, 3, resumes=True)


def test_a_hundred_thousand_parameters_are_read_soon(tmp_path):
    count = 100_000
    names = [f"layer.{number}" for number in range(count)]
    layout = Layout(names, [1] * count, [2.0], [1.0])
    writer, number = begin(tmp_path, layout=layout)
    writer.write(number, 0, Batch(norms=[(0, b"\0\0" * count)]))
    writer.leave(number)
    started = time.process_time()
    assert read_norms(tmp_path).norms.sum() == count
    assert time.process_time() - started < seconds(2)
