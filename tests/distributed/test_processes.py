"""The harness itself: a rank that hangs, dies or raises is a failure, and is told apart."""

import os
import time

import pytest
import torch
import torch.distributed as dist

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
        together(fail, 2, how, limit=3.0)


def test_what_became_of_each_rank_is_known():
    outcomes = outcomes_of(fail, 2, "die", limit=10.0)
    assert outcomes[1].exit_code == 7
    assert outcomes[0].exit_code != 0  # its barrier lost a rank
