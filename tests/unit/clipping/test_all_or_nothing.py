"""An error at any operation of a clip leaves every gradient as it was, or all of them clipped.

Each operation of torch that a clip makes fails once. Only where the operation that fails writes
in place, into memory that exists, may some gradients be written already: that is a broken device.
"""

from contextlib import suppress
from importlib import import_module
from math import inf, nan
from typing import ClassVar, Literal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from gradclip import (
    GradientClipper,
    NormClip,
    ValueClip,
    clip_grad_norm_,
    clip_grads_with_norm_,
)
from gradclip.clipping import Policy, flags
from gradclip.clipping.kernels import blocks, foreach, rows
from gradclip.clipping.policies import Decision, PolicyState
from gradclip.clipping.step.nonfinite import SkipCounter
from pairwise import ALL_COMBINATIONS, pairwise

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


class InjectedError(Exception):
    """What an operation raises."""


class FailAt(TorchDispatchMode):
    """Lets one operation fail, before it does anything.

    Args:
        number: Which; None for none.
    """

    launching = False
    """Whether Triton's interpreter runs a kernel, in which torch has no part on a GPU."""

    def __init__(self, number=None):
        super().__init__()
        self.number, self.count, self.failed = number, 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if FailAt.launching:
            return func(*args, **(kwargs or {}))
        self.count += 1
        if self.count - 1 == self.number:
            self.failed = func
            raise InjectedError
        return func(*args, **(kwargs or {}))


class TensorClip(Policy):
    scope: ClassVar[Literal["tensor"]] = "tensor"
    clip_mode: Literal["test-each"] = "test-each"

    def decide(self, seen, state):
        return Decision(1.0, torch.full_like(seen.norms_S, 1.0))


class UnitClip(TensorClip):
    scope: ClassVar[Literal["unit"]] = "unit"


class Halving(TensorClip):
    """Has a history."""

    def initial_state(self, scopes):
        return PolicyState(shared={"limit": torch.ones((), dtype=torch.float64)})

    def decide(self, seen, state):
        limit = state.shared["limit"]
        return Decision(limit, limit, PolicyState(shared={"limit": limit / 2}))


def with_clipper(policy, **options):
    def clip(params, backend):
        names = [f"w{i}" for i, _ in enumerate(params)]
        GradientClipper(zip(names, params, strict=True), policy, backend=backend, **options).clip()

    return clip


MODES = {
    "norm": with_clipper(1.0),
    "p = 1": with_clipper(NormClip(max_norm=1.0, norm_type=1.0)),
    "p = 3": with_clipper(NormClip(max_norm=1.0, norm_type=3.0)),
    "p = inf": with_clipper(NormClip(max_norm=1.0, norm_type=inf)),
    "zero": with_clipper(0.0),
    "value": with_clipper(ValueClip(clip_value=0.5)),
    "each tensor": with_clipper(TensorClip()),
    "units": with_clipper(UnitClip()),
    "history": with_clipper(Halving()),
    "patterns": with_clipper({"w0": 1.0, "w1": ValueClip(clip_value=0.5), "*": 2.0}),
    "together": with_clipper(
        {"w0": 1.0, "w1": ValueClip(clip_value=0.5), "*": 2.0}, nonfinite="propagate"
    ),
    "function": lambda params, backend: clip_grad_norm_(params, 1.0),
    "known norm": lambda params, backend: clip_grads_with_norm_(params, 1.0, 7.0),
}
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = {
    "float32": [F32] * 4,
    "bfloat16": [BF16] * 4,
    "float64": [F64] * 4,
    "mixed": [F32, BF16, F64, F16],
}
LAYOUTS = {
    "contiguous": lambda t: t.clone(),
    "transposed": lambda t: t.t().clone().t(),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "narrowed": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "sparse": lambda t: t.to_sparse(),
}


SHAPES = [(3, 4), (5, 2), (70, 130), (1, 6)]


def gradients(dtypes, layout, spoiled=False, shapes=SHAPES):
    made = [
        oracle.randn(*shape, seed=i).to(dtype) * 3
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    if spoiled:
        made[2][0, 0] = nan
    return oracle.parameters(*map(layout, made))


def dense(params):
    return [p.grad.to_dense().clone() for p in params]


def same(one, other):
    return all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, other, strict=True)
    )


def partial_writes(clip, make):
    """Return how many operations were tried, and those whose failure left gradients half written.

    Args:
        clip: Clips a list of parameters.
        make: Makes them, always the same.
    """
    params = make()
    before = dense(params)
    with FailAt() as counting:
        clip(params)
    after, partial = dense(params), []
    chosen = chosen_of(counting.count)
    for number in chosen:
        params = make()
        # Functions remember what they saw: a later call may have fewer operations.
        with FailAt(number) as failing, suppress(InjectedError):
            clip(params)
        found = dense(params)
        if not (same(found, before) or same(found, after)):
            partial.append(failing.failed)
    return len(chosen), partial


def chosen_of(count):
    """Return which operations fail: the last ones, among which are all that write, and some."""
    return range(count) if ALL_COMBINATIONS else sorted({*range(0, count, 11), *range(count)[-12:]})


def by_device(partial):
    """Return those that write in place: whatever they need is there."""
    return [operation for operation in partial if operation._schema.is_mutable]


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch):
    """Make small tensors be read and written in several blocks."""
    for module in (blocks, rows):
        monkeypatch.setattr(module, "BLOCK", 1 << 12)
    monkeypatch.setattr(foreach, "_CONVERTED", 1 << 14)


@pairwise(mode=MODES, dtypes=DTYPES, layout=LAYOUTS, backend=["foreach", "reference"])
def test_an_error_anywhere_leaves_no_gradient_half_clipped(mode, dtypes, layout, backend):
    """294 of 2858 points left some gradients written, and some not."""
    if mode is MODES["units"] and layout is LAYOUTS["sparse"]:
        pytest.skip("a norm for each unit needs a dense gradient")
    tried, partial = partial_writes(
        lambda params: mode(params, backend), lambda: gradients(dtypes, layout)
    )
    assert tried > 0
    assert partial == by_device(partial)


@pytest.mark.parametrize("mode", ["norm", "p = 3", "zero", "each tensor", "units", "history"])
def test_neither_where_the_host_reads_nothing(mode, monkeypatch):
    """As on an accelerator. There only clipping by value writes while it measures."""
    monkeypatch.setattr(foreach, "_on_cpu", lambda batch: False)
    monkeypatch.setattr(flags, "host_waits_for", lambda device: True)
    monkeypatch.setattr(SkipCounter, "record", lambda self, *given, expected: False)
    tried, partial = partial_writes(
        lambda params: MODES[mode](params, "foreach"),
        lambda: gradients(DTYPES["mixed"], torch.clone),
    )
    assert tried > 0
    assert partial == by_device(partial)


@pytest.fixture
def kernels_of_a_gpu(monkeypatch):
    pytest.importorskip("triton")
    launcher = import_module("gradclip.clipping.kernels.triton_launch").Launcher
    launch = launcher.__call__

    def launched(self, *arguments, **constants):
        FailAt.launching = True
        try:
            launch(self, *arguments, **constants)
        finally:
            FailAt.launching = False

    monkeypatch.setattr(launcher, "__call__", launched)


@pytest.mark.usefixtures("kernels_of_a_gpu")
@pytest.mark.parametrize(
    "mode", MODES if ALL_COMBINATIONS else ["norm", "p = 3", "zero", "together"]
)
@pytest.mark.parametrize("dtypes", DTYPES if ALL_COMBINATIONS else ["mixed"])
def test_the_kernels_of_a_gpu_have_all_they_need_before_the_first_is_launched(mode, dtypes):
    _, partial = partial_writes(
        lambda params: MODES[mode](params, "triton"),
        lambda: gradients(DTYPES[dtypes], torch.clone, shapes=[(3, 4), (5, 2), (7, 9), (1, 6)]),
    )
    # Value clipping runs on torch's operations here: the interpreter is on the CPU.
    assert {operation.name() for operation in partial} <= {"aten::clamp_"}


@pytest.mark.parametrize("mode", ["norm", "p = 1", "p = 3", "p = inf", "zero", "each tensor"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_tensors_of_all_dtypes_are_scaled_by_one_operation(mode, dtypes):
    """So that not even a device, or Ctrl-C, can come between the first and the last."""
    _, partial = partial_writes(
        lambda params: MODES[mode](params, "foreach"),
        lambda: gradients(DTYPES[dtypes], torch.clone),
    )
    assert partial == []


@pytest.mark.parametrize("policy", [1.0, ValueClip(clip_value=0.5)])
def test_a_skipped_step_is_zeroed_whole_or_not_at_all(policy):
    _, partial = partial_writes(
        lambda params: GradientClipper(params, policy).clip(),
        lambda: gradients(DTYPES["mixed"], torch.clone, spoiled=True),
    )
    assert partial == []


def test_an_error_leaves_the_history_as_it_was():
    """What a policy remembers is written last: after it, there are the gradients only."""
    params = gradients(DTYPES["mixed"], torch.clone)
    policy = Halving()
    with FailAt() as counting:
        GradientClipper(params, policy).clip()
    for number in range(counting.count):
        params = gradients(DTYPES["mixed"], torch.clone)
        before, clipper = dense(params), GradientClipper(params, policy)
        with FailAt(number), pytest.raises(InjectedError):
            clipper.clip()
        state = clipper.state_dict()["states"].get("*")
        if state is not None and float(state["shared"]["limit"]) != 1.0:
            assert counting.count - number <= 3
        else:
            assert same(dense(params), before)
