"""The harness itself: a rank that hangs, dies or raises is a failure, and is told apart."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from patience import seconds
from processes import RanksFailedError, outcomes_of, together


def add_up(rank, start):
    total = torch.tensor([rank + start])
    dist.all_reduce(total)
    return int(total)


def fail(rank, how):
    if rank == 1:
        if how == "raise":
            raise ValueError("rank 1 had enough")
        if how == "die":
            os._exit(7)
        time.sleep(60)
    return rank


def test_every_rank_returns_its_value():
    assert together(add_up, 3, 10) == [33, 33, 33]


@pytest.mark.parametrize(
    ("how", "said"),
    [("raise", "rank 1 had enough"), ("die", "died without a word"), ("hang", "still running")],
)
def test_a_rank_that_fails_is_a_failure(how, said):
    with pytest.raises(RanksFailedError, match=said):
        together(fail, 2, how, limit=seconds(3))


def test_what_became_of_each_rank_is_known():
    outcomes = outcomes_of(fail, 2, "die", limit=seconds(10))
    assert outcomes[1].exit_code == 7
    assert outcomes[0].exit_code != 0  # its barrier lost a rank


@pytest.mark.parametrize(("load", "waits"), [(0.5, 10), (1, 10), (3, 30), (100, 50)])
def test_a_busy_machine_is_waited_for_longer(monkeypatch, load, waits):
    """The load is for each core; there is an end to waiting."""
    monkeypatch.setattr(os, "getloadavg", lambda: (load * os.cpu_count(), 0.0, 0.0))
    assert seconds(10) == waits
