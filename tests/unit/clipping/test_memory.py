"""How much memory a clip takes beside the gradients: every byte that torch allocates counts.

torch's profiler is told of each allocation on the CPU, those inside an operation too. Blocks are
made small here, so that a gradient of a megabyte is large beside them.
"""

from math import inf, nan
from typing import ClassVar, Literal

import pytest
import torch
from torch.autograd.profiler import profile

import oracle
from gradclip import GradientClipper, NormClip, ValueClip, clip_grads_with_norm_
from gradclip.clipping import Policy
from gradclip.clipping.collect import overlap
from gradclip.clipping.kernels import blocks, foreach, rows, total
from gradclip.clipping.policies import Decision
from gradclip.clipping.step import nonfinite
from gradclip.errors import NonFiniteGradientError
from pairwise import pairwise

SIDE = 512
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
C64, C128 = torch.complex64, torch.complex128


def peak(call):
    """Return the most bytes that a call had allocated at one time, beyond what there was."""
    with profile(profile_memory=True) as profiled:
        call()
    events = [e for e in profiled.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def test_the_measure_sees_what_is_inside_an_operation():
    tensor = torch.ones(1 << 16, dtype=BF16)
    inside = torch.ones(1 << 16, dtype=F64)
    assert peak(lambda: tensor.mul_(inside)) >= inside.nbytes
    assert peak(lambda: tensor.mul_(0.5)) < 100


class UnitClip(Policy):
    scope: ClassVar[Literal["unit"]] = "unit"
    clip_mode: Literal["test-units"] = "test-units"

    def decide(self, seen, state):
        return Decision(1.0, torch.full_like(seen.norms_S, 1.0))


POLICIES = {
    "norm": 1.0,
    "p = 1": NormClip(max_norm=1.0, norm_type=1.0),
    "p = 3": NormClip(max_norm=1.0, norm_type=3.0),
    "p = inf": NormClip(max_norm=1.0, norm_type=inf),
    "zero": 0.0,
    "value": ValueClip(clip_value=0.1),
    "units": UnitClip(),
}
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t(),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "narrowed": lambda t: torch.cat([t, t], 1)[:, :SIDE],
    "conjugated": lambda t: t.conj() if t.is_complex() else t,
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for module in (blocks, rows):
        monkeypatch.setattr(module, "BLOCK", 1 << 12)
    monkeypatch.setattr(foreach, "_CONVERTED", 1 << 15)
    monkeypatch.setattr(total, "GATHERED", 1 << 12)
    monkeypatch.setattr(total, "GATHERED_IN_LANES", 1 << 13)
    monkeypatch.setattr(overlap, "_WINDOW", 1 << 12)


def gradients(dtype, layout, spoiled=None):
    made = [oracle.randn(SIDE, SIDE, seed=i, dtype=dtype) for i in range(2)]
    if spoiled is not None:
        made[1][5, 5] = spoiled
    return oracle.parameters(*map(layout, made))


BOUND = 0.25
"""Of one gradient. Blocks take most of it; before, there were copies of one or more."""


@pairwise(
    policy=POLICIES,
    dtype=[F16, BF16, F32, F64, C64, C128],
    layout=LAYOUTS,
    backend=["foreach", "reference"],
)
def test_no_temporary_is_as_large_as_a_gradient(policy, dtype, layout, backend):
    if dtype.is_complex and isinstance(policy, ValueClip):
        pytest.skip("complex numbers have no order")
    if backend == "reference" and isinstance(policy, UnitClip):
        pytest.skip("one row at a time: slow, and the same reads as of one row")
    params = gradients(dtype, layout)
    size = params[0].grad.nbytes
    clipper = GradientClipper(params, policy, backend=backend)
    assert peak(clipper.clip) <= BOUND * size


@pairwise(policy=POLICIES, dtype=[BF16, F32, F64], nonfinite=["skip", "propagate"], odd=[nan, inf])
def test_neither_where_something_is_not_finite(policy, dtype, nonfinite, odd):
    params = gradients(dtype, torch.clone, odd)
    clipper = GradientClipper(params, policy, nonfinite=nonfinite)
    assert peak(clipper.clip) <= BOUND * params[0].grad.nbytes


def test_neither_where_an_error_is_raised(monkeypatch):
    monkeypatch.setattr(nonfinite, "BLOCK", 1 << 12)
    params = gradients(F32, LAYOUTS["narrowed"], nan)
    clipper = GradientClipper(params, 1.0, nonfinite="raise")

    def clip():
        with pytest.raises(NonFiniteGradientError, match="NaN: 1"):
            clipper.clip()

    assert peak(clip) <= BOUND * params[0].grad.nbytes


@pytest.mark.parametrize("dtype", [BF16, F32, C64])
def test_neither_where_the_norm_is_known(dtype):
    params = gradients(dtype, LAYOUTS["narrowed"])
    assert peak(lambda: clip_grads_with_norm_(params, 1.0, 9.0)) <= BOUND * params[0].grad.nbytes


def test_neither_where_gradients_interleave():
    """Whether two share a byte is looked at window by window."""
    whole = oracle.randn(2 * SIDE, SIDE)
    params = oracle.parameters(whole[:, ::2], whole[:, 1::2])
    assert peak(GradientClipper(params, 1.0).clip) <= BOUND * params[0].grad.nbytes
    params = oracle.parameters(whole[::2], whole[1::2, : SIDE // 2], whole[1::2, SIDE // 2 :])
    assert peak(GradientClipper(params, 1.0).clip) <= BOUND * params[0].grad.nbytes
