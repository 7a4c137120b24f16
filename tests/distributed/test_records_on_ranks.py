"""Records of several ranks: parts are added up, faults are named, and no collective is issued."""

import math
import warnings
from pathlib import Path

import layouts
import pytest
import torch.distributed as dist

from gradclip import GradientClipper
from gradclip.diagnostics import read_events, read_header, read_norms, read_record
from gradclip.errors import RankError, RecordError
from processes import together

STEPS = 5


def steps_of(held, folder):
    clipper = GradientClipper(held.source, 1.0, record=folder)
    truth = []
    for step in range(STEPS):
        values = {n: layouts.full(n, s, 3 + step) for n, s in held.shapes.items()}
        if step == 1:
            values["block.weight"][-1, -1] = math.nan
        truth.append({name: float(value.double().norm()) for name, value in values.items()})
        held.fill(values)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            clipper.clip()
    clipper.close()
    return truth


def on_ranks(rank, folder):
    """Record on both, on the last alone, on none; and where the first one is refused."""
    held = layouts.tp(rank)
    counts = []
    issued = dist.all_reduce
    calls = []
    dist.all_reduce = lambda *args, **kwargs: calls.append(1) or issued(*args, **kwargs)
    for where in ([0, 1], [1], []):
        calls.clear()
        truth = steps_of(held, Path(folder, str(len(where))) if rank in where else None)
        counts.append(len(calls))
    clipper = GradientClipper(held.source, 1.0, record=Path(folder, "2") if rank == 0 else None)
    try:
        clipper.clip()
    except (RankError, RecordError) as error:
        return truth, counts, type(error)
    return truth, counts, None


def test_ranks_record_as_they_like(tmp_path):
    (truth, counts, refused), (_, others, heard) = together(on_ranks, 2, str(tmp_path))
    assert len(set(counts)) == len(set(others)) == 1
    assert (refused, heard) == (RecordError, RankError)

    both, one = tmp_path / "2", tmp_path / "1"
    assert [record.reason for record in read_record(both)] == [None, "nonfinite", *[None] * 3]
    assert read_header(both)["world_size"] == 2
    found = read_norms(both)
    assert list(found.steps) == list(range(STEPS))
    for norms, wanted in zip(found.norms, truth, strict=True):
        got = dict(zip(found.names, norms, strict=True))
        assert got == pytest.approx(wanted, rel=1e-2, nan_ok=True)
    said = {
        (each["event"], each.get("rank", 0)): each
        for each in read_events(both)
        if each["step"] == 1
    }
    assert set(said) == {("nonfinite", 0), ("skip", 0), ("nonfinite", 1)}
    assert said["nonfinite", 0]["parameters"] == []  # that of the other rank
    assert said["nonfinite", 1]["parameters"] == ["block.weight"]

    assert not (one / "run.json").exists()
    assert read_norms(one).norms.shape[0] == STEPS
    assert [event["parameters"] for event in read_events(one)] == [["block.weight"]]
