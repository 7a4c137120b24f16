"""Ranks on accelerators: verdicts stay tensors, and what went wrong is raised some steps later.

A CPU goes that way when it is told not to look. NCCL itself was not there to be tried.
"""

import math

import layouts
import pytest
import torch
from given import fails, line, local, sharded
from torch.distributed.tensor import Shard

import oracle
from gradclip import GradientClipper, NormClip, ObserveClip, Schedule, ValueClip
from gradclip.clipping import flags
from gradclip.clipping.kernels import device, foreach
from gradclip.errors import (
    ArgumentValueError,
    OverlappingGradientsError,
    RankError,
    ReplicaError,
    TooManySkipsError,
)
from gradclip.record.ring import LAG
from pairwise import chosen
from processes import together

POLICIES = {
    "norm": NormClip(max_norm=1.5),
    "norm inf": NormClip(max_norm=0.25, norm_type=math.inf),
    "norm 3": NormClip(max_norm=0.5, norm_type=3),
    "within": NormClip(max_norm=1e6),
    "observe": ObserveClip(),
    "value": ValueClip(clip_value=0.4),
}


class OnCpu:
    """Numbers that are on the host, and wait all the same."""

    def __init__(self, values):
        self._values = values.clone()

    def read(self):
        return self._values.reshape(-1).tolist()


def unread():
    """Tell the engine that reading a number would make it wait."""
    foreach._on_cpu = lambda batch: False
    flags.host_waits_for = lambda device: True
    device.HostCopy = OnCpu


def clipped(held, policy, values, mode):
    held.fill(values)
    result = GradientClipper(held.source, policy, nonfinite=mode, **held.options).clip()
    stats = result.to_host()
    return stats, {name: after.clone() for name, after in held.read().items()}


def both_ways(rank, build):
    held = getattr(layouts, build)(rank)
    cases = []
    for policy, bad, mode in chosen(
        list(POLICIES.values()), (None, math.nan, math.inf), ("skip", "propagate")
    ):
        values = {n: layouts.full(n, s, 3) for n, s in held.shapes.items()}
        if bad is not None:
            values["block.weight"][-1, -1] = bad
        cases.append((policy, values, mode))
    seen = [clipped(held, *case) for case in cases]
    unread()
    for case, (wanted, expected) in zip(cases, seen, strict=True):
        got, found = clipped(held, *case)
        where = f"{build} {case[0]} {case[2]}: {got} for {wanted}"
        assert (got.skipped, got.nonfinite) == (wanted.skipped, wanted.nonfinite), where
        if not wanted.nonfinite:
            assert got.clipped == wanted.clipped, where
        for name in ("norm_pre", "norm_post", "coefficient", "threshold"):
            value, other = getattr(got, name), getattr(wanted, name)
            assert value == pytest.approx(other, rel=1e-6, nan_ok=True), (name, where)
        for name, value in found.items():
            torch.testing.assert_close(
                value, expected[name], rtol=1e-6, atol=0, equal_nan=True, msg=where
            )
    return [(stats.norm_pre, stats.coefficient) for stats, _ in seen if stats.nonfinite == 0]


@pytest.mark.parametrize("layout", ["tp", "fsdp2_with_plain", "fsdp1_flat", "dp_tp", "experts"])
def test_it_answers_as_the_path_that_looks(layout):
    said = together(both_ways, 2 if layout in layouts.TWO else 4, layout)
    assert all(each == said[0] for each in said)


def late_errors(rank):
    unread()
    held = layouts.tp(rank)
    named = dict(held.source)
    clipper = GradientClipper(held.source, 1.0)
    values = {n: layouts.full(n, s, 3) for n, s in held.shapes.items()}
    for step in range(LAG + 2):
        held.fill(values)
        if step == 1 and rank == 1:
            named["scale"].grad = torch.ones(1).expand(2)
        if step == 1 and rank == 1:
            with pytest.raises(OverlappingGradientsError):
                clipper.clip()
        elif step == 1 + LAG and rank == 0:
            with pytest.raises(RankError, match="rank 1 raised 4 steps ago"):
                clipper.clip()
        else:
            result = clipper.clip()
            assert bool(result.skipped) is (step == 1)
            if bool(result.skipped):
                assert named["block.weight"].grad._local_tensor.abs().max() == 0


def test_an_error_of_one_rank_is_raised_by_the_others_some_steps_later():
    together(late_errors, 2)


def late_replicas(rank):
    unread()
    held = layouts.tp(rank)
    named = dict(held.source)
    clipper = GradientClipper(held.source, 1.0)
    values = {n: layouts.full(n, s, 3) for n, s in held.shapes.items()}
    for step in range(LAG):
        held.fill(values)
        named["scale"].grad *= 1 + rank
        assert bool(clipper.clip().skipped), step
    with pytest.raises(ReplicaError, match="differ by rank"):
        clipper.clip()


def test_replicas_that_differ_are_skipped_at_once_and_raised_later():
    together(late_replicas, 2)


def late_skips(rank):
    unread()
    held = layouts.tp(rank)
    clipper = GradientClipper(held.source, 1.0, max_consecutive_skips=2)
    values = {n: layouts.full(n, s, 3) for n, s in held.shapes.items()}
    values["block.weight"][-1, -1] = math.nan
    for _ in range(2 + LAG):
        held.fill(values)
        assert bool(clipper.clip().skipped)
    held.fill(values)
    with pytest.raises(TooManySkipsError):
        clipper.clip()
    return oracle.norm([torch.ones(1)])


def test_too_many_skips_are_raised_by_all_ranks_at_one_step():
    together(late_skips, 2)


def assigned(rank):
    """At once where numbers are read at once, and later where they are not."""
    weights = [sharded(torch.full((8,), 2.0), line(), Shard(0)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [each]} for each in weights], lr=0.0)
    clipper = GradientClipper(optimizer, [1.0, 2.0])

    def limits():
        for each in weights:
            local(each).fill_(2.0)
        groups = clipper.clip().to_host().groups
        return [group.norm_post for group in groups.values()]

    assert limits() == pytest.approx([1.0, 2.0])
    clipper.policy = [0.5, 2.0]
    assert limits() == pytest.approx([0.5, 2.0])
    with pytest.raises(ArgumentValueError, match="other numbers of the other ranks"):
        clipper.policy = [NormClip(max_norm=Schedule(points=((0, 1.0),))), 2.0]
    if rank:
        clipper.policy = [0.5, 0.25]
    fails(limits, RankError, r"(?s)different ones.*rank 0 has .*=2\.0.*rank 1 has .*=0\.25")
    assert all(local(each).eq(2.0).all() for each in weights)
    clipper.policy = [0.5, 0.25]
    assert limits() == pytest.approx([0.5, 0.25])

    weights.append(sharded(torch.full((8,), 2.0), line(), Shard(0)))
    optimizer.add_param_group({"params": weights[2:]})
    if rank:
        clipper.policy = [0.5, 0.25, 4.0]
    error, said = (RankError, "rank 0") if rank else (ArgumentValueError, "a list of 2")
    fails(limits, error, said)
    clipper.policy = [0.5, 0.25, 4.0]
    assert limits() == pytest.approx([0.5, 0.25, 4.0])

    unread()
    if rank:
        clipper.policy = [0.5, 0.25, 8.0]
    for _ in range(LAG):
        assert limits() == [0.0, 0.0, 0.0]
    with pytest.raises(RankError, match=f"did so {LAG} steps ago by different"):
        limits()


def test_a_policy_is_assigned_on_every_rank_or_on_none():
    together(assigned, 2)
