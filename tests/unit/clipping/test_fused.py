"""The short way of a GPU: the answers of the ordinary way, in a few launches.

Triton's interpreter runs the launches on the CPU; what a GPU would do is counted by their log.
"""

import sys
from math import inf, nan
from threading import Thread, get_ident

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import gradclip
from gradclip import GradientClipper, GuardClip, NormClip, ObserveClip, ValueClip
from gradclip.clipping import engine, flags, kernels, short
from gradclip.clipping.kernels import device, tables, triton_launch
from gradclip.clipping.kernels import fused as reports
from gradclip.clipping.result import FusedResult
from gradclip.clipping.step import rows
from gradclip.errors import (
    DoubleClippingError,
    NonFiniteGradientError,
    OverlappingGradientsError,
    TooManySkipsError,
)
from pairwise import pairwise

triton_fused = pytest.importorskip("gradclip.clipping.kernels.triton_fused")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

POLICIES = {
    "norm": 1.0,
    "within": 1e9,
    "zero": 0.0,
    "unbounded": inf,
    "p = inf": NormClip(max_norm=1.0, norm_type=inf),
    "p = 1": NormClip(max_norm=1.0, norm_type=1.0),
    "observe": ObserveClip(),
    "guard": GuardClip(),
    "skips": NormClip(max_norm=inf, skip_above=2.0),
    "skips none": NormClip(max_norm=1.0, skip_above=1e9),
    "one pattern skips": {"w0": NormClip(max_norm=1.0, skip_above=2.0), "*": 1.0},
    "value": ValueClip(clip_value=0.5),
    "value zero": ValueClip(clip_value=0.0),
    "value unbounded": ValueClip(clip_value=inf),
    "two norms": {"w0": 1.0, "*": 2.0},
    "interleaved": {"w[02]": 1.0, "*": 1e9},
    "norm and observer": {"w0": 1.0, "*": ObserveClip()},
    "norm and value": {"w0": 1.0, "*": ValueClip(clip_value=0.5)},
    "two values": {"w0": ValueClip(clip_value=0.2), "*": ValueClip(clip_value=0.5)},
}
SPIKES = {"finite": 0.0, "nan": nan, "inf": inf}


def made(seed=0, spike=0.0, dtypes=(torch.float32, torch.bfloat16, torch.float32, torch.float16)):
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for number, (dtype, size) in enumerate(zip(dtypes, (300, 70, 5, 64), strict=True)):
        weight = torch.nn.Parameter(torch.zeros(size, dtype=dtype))
        weight.grad = torch.randn(size, generator=generator).to(dtype)
        pairs.append((f"w{number}", weight))
    pairs[1][1].grad[3] += spike
    return pairs


def regain(pairs, **kwargs):
    """Give parameters other gradients, elsewhere in memory."""
    for (_, weight), (_, other) in zip(pairs, made(**kwargs), strict=True):
        weight.grad = other.grad


def second_clip(policy, nonfinite, spike, grad_scale, backend):
    """Clip twice: the second time takes the short way, if there is one."""
    pairs = made()
    clipper = GradientClipper(pairs, policy, nonfinite=nonfinite, backend=backend)
    clipper.clip(grad_scale)
    regain(pairs, seed=1, spike=spike)
    try:
        result = clipper.clip(grad_scale)
    except NonFiniteGradientError as error:
        return None, str(error), [weight.grad for _, weight in pairs], clipper.stats
    return result, result.to_host(), [weight.grad for _, weight in pairs], clipper.stats


def numbers(stats):
    if isinstance(stats, str):
        return stats
    flags_of = stats.clipped, stats.skipped, stats.nonfinite, stats.skip_reason, stats.scope_names
    values = stats.norm_pre, stats.norm_post, stats.threshold, stats.coefficient, *stats.norms_S
    near = [pytest.approx(value, rel=1e-6, nan_ok=True) for value in values]
    return flags_of, near, {name: numbers(each) for name, each in stats.groups.items()}


@pairwise(
    policy=POLICIES,
    nonfinite=["skip", "propagate", "raise"],
    spike=SPIKES,
    grad_scale=[None, 4.0],
)
def test_it_answers_as_the_ordinary_way(policy, nonfinite, spike, grad_scale):
    result, ours, gradients, stats = second_clip(policy, nonfinite, spike, grad_scale, "triton")
    _, wanted, theirs, counted = second_clip(policy, nonfinite, spike, grad_scale, "reference")
    policies = list(policy.values()) if isinstance(policy, dict) else [policy]
    clamps = [each for each in policies if isinstance(each, ValueClip) and each.clip_value < inf]
    first = nonfinite == "raise" or (isinstance(policy, dict) and nonfinite == "propagate")
    ordinary = bool(clamps) and (grad_scale is not None or first)
    assert result is None or isinstance(result, FusedResult) is not ordinary
    assert numbers(ours) == numbers(wanted)
    assert repr(stats) == repr(counted)
    for ours_T, theirs_T in zip(gradients, theirs, strict=True):
        # Triton's interpreter cuts half precision off where a GPU rounds it.
        rtol = 2e-6 if ours_T.dtype is torch.float32 else torch.finfo(ours_T.dtype).eps
        torch.testing.assert_close(ours_T, theirs_T, rtol=rtol, atol=0, equal_nan=True)


@pytest.fixture
def launched(monkeypatch):
    """Log what a device would do, as if it were one: nothing is launched, and nothing read."""
    log = []

    class Copied:
        def __init__(self, values):
            log.append("copy to the host")
            self._numbers = [0.0] * values.numel()

        def read(self):
            return self._numbers

    def launch(self, program, grid, *arguments, **constants):
        log.append(getattr(program, "fn", program).__name__)

    monkeypatch.setattr(triton_launch.Launcher, "__call__", launch)
    monkeypatch.setattr(flags, "host_waits_for", lambda device: True)
    for module in (device, reports):
        monkeypatch.setattr(module, "HostCopy", Copied)
    return log


VIEWS = {"as_strided", "detach", "empty", "lift_fresh", "narrow", "select", "slice", "split",
         "split_with_sizes", "to", "unbind", "view"}  # fmt: skip
"""What a device does nothing for; a copy to another device would be a ``copy_``."""


def operations(log, call):
    """Return what a call would make a device do: launches, copies, and operations of torch."""
    log.clear()
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        call()
    names = [event.name.removeprefix("aten::") for event in watched.events()]
    return log + [name for name in names if name not in VIEWS]


def capture(monkeypatch):
    for module in (device, engine, rows, short, tables, triton_fused):
        monkeypatch.setattr(module, "is_capturing", lambda device: True)


COUNTED = {
    "one pattern": (1.0, torch.float32, 4),
    "observe": (ObserveClip(), torch.float32, 3),
    "value": (ValueClip(clip_value=0.5), torch.float32, 4),
    "two patterns": ({"w0": 1.0, "*": 2.0}, torch.float32, 4),
    "two patterns, norm and value": (POLICIES["norm and value"], torch.float32, 6),
    "two dtypes": (1.0, torch.bfloat16, 6),
}


@pytest.mark.parametrize("case", COUNTED)
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_a_clip_is_a_few_operations_of_the_device(launched, monkeypatch, case, captured):
    policy, other, most = COUNTED[case]
    pairs = made(dtypes=(torch.float32, other, torch.float32, torch.float32))
    clipper = GradientClipper(pairs, policy, backend="triton")
    for _ in range(3):
        clipper.clip()
    if captured:
        capture(monkeypatch)
    found = operations(launched, clipper.clip)
    assert isinstance(clipper.last, FusedResult)
    assert ("copy to the host" in found) is not captured
    assert found.count("copy_") == captured  # a graph copies addresses at each replay
    assert len(found) <= most, found


def test_a_clip_makes_few_calls_of_python(launched):
    """However many tensors there are, and the stubs of this test are among them."""
    weights = [torch.nn.Parameter(torch.zeros(3)) for _ in range(148)]
    for weight in weights:
        weight.grad = torch.ones(3)
    clipper = GradientClipper(weights, 1.0, backend="triton")
    for _ in range(6):
        clipper.clip()
    called = []
    sys.setprofile(lambda frame, event, _: event == "call" and called.append(frame.f_code.co_name))
    try:
        clipper.clip()
    finally:
        sys.setprofile(None)
    assert isinstance(clipper.last, FusedResult)
    assert len(called) <= 120, called


def test_a_captured_call_works_on_memory_of_its_own(launched, monkeypatch):
    """A graph writes there at each replay, whatever comes between."""
    pairs = made()
    clipper = GradientClipper(pairs, 1.0, backend="triton")
    for _ in range(3):
        clipper.clip()
    seen = []
    monkeypatch.setattr(
        triton_launch.Launcher,
        "__call__",
        lambda self, program, grid, *given, **k: seen.append(given),
    )
    with monkeypatch.context() as patch:
        capture(patch)
        captured = clipper.clip()
        inside = addresses_of(seen)
    seen.clear()
    again = clipper.clip()
    shared = inside & addresses_of(seen)
    tables_P = {table.on(torch.device("cpu")).data_ptr() for table in tables_of(clipper)}
    assert shared <= tables_P
    assert captured.norm_pre.data_ptr() != again.norm_pre.data_ptr()


def test_a_capture_behind_one_step_takes_the_ordinary_way(launched, monkeypatch):
    """Its tables are there, and those of the short way are not."""
    clipper = GradientClipper(made(), 1.0, backend="triton")
    clipper.clip()
    capture(monkeypatch)
    launched.clear()
    clipper.clip()
    assert not isinstance(clipper.last, FusedResult)
    assert "fold" in launched


def addresses_of(launches):
    return {
        each.data_ptr() for given in launches for each in given if isinstance(each, torch.Tensor)
    }


def tables_of(clipper):
    (plan,) = (
        plan
        for _, layout in clipper._engine._short._fused._known.values()
        for plan in layout._plans.values()
    )
    return [part.table for part in plan._parts] + [
        plan._spans, plan._layout.starts_table, plan._layout.limits_table
    ]  # fmt: skip


def test_too_many_skips_end_the_run_before_gradients_change():
    pairs = made(spike=nan)
    clipper = GradientClipper(pairs, 1.0, backend="triton", max_consecutive_skips=1)
    with pytest.warns(UserWarning, match="w1 holds a NaN"):
        clipper.clip()
    regain(pairs, seed=1, spike=nan)
    before = [weight.grad.clone() for _, weight in pairs]
    with pytest.raises(TooManySkipsError, match="w1"):
        clipper.clip()
    for (_, weight), kept in zip(pairs, before, strict=True):
        torch.testing.assert_close(weight.grad, kept, rtol=0, atol=0, equal_nan=True)


def test_too_many_skips_of_a_policy_are_said_to_be_its_own():
    policy = NormClip(max_norm=1.0, skip_above=2.0)
    pairs = made()
    clipper = GradientClipper(pairs, policy, backend="triton", max_consecutive_skips=1)
    with pytest.warns(UserWarning, match="the policy asked to"):
        clipper.clip()
    regain(pairs, seed=1)
    with pytest.raises(TooManySkipsError, match="The policy asked to skip step 1"):
        clipper.clip()


def test_the_first_skip_names_what_is_at_fault():
    pairs = made()
    pairs[0][1].grad = None
    clipper = GradientClipper(pairs, 1.0, backend="triton")
    clipper.clip()
    regain(pairs, seed=1, spike=nan)
    pairs[0][1].grad = None
    with pytest.warns(UserWarning, match="step 1: the gradient of w1 holds a NaN"):
        clipper.clip()
    assert isinstance(clipper.last, FusedResult)


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_gradients_that_share_bytes_are_refused_and_stay(nonfinite):
    pairs = made(dtypes=(torch.float32,) * 4)
    clipper = GradientClipper(pairs, 1.0, backend="triton", nonfinite=nonfinite)
    clipper.clip()
    pairs[2][1].grad = pairs[0][1].grad[:5]
    before = pairs[0][1].grad.clone()
    with pytest.raises(OverlappingGradientsError, match="w"):
        clipper.clip()
    assert torch.equal(pairs[0][1].grad, before)


def test_what_an_owner_finds_clipped_it_refuses_before_it_writes():
    pairs = made()
    optimizer = torch.optim.SGD([weight for _, weight in pairs], lr=0.1)
    attached = gradclip.attach(optimizer, 1.0, backend="triton")
    optimizer.step()
    regain(pairs, seed=1)
    GradientClipper(pairs, 5.0).clip()
    before = [weight.grad.clone() for _, weight in pairs]
    with pytest.raises(DoubleClippingError):
        optimizer.step()
    assert all(map(torch.equal, before, [weight.grad for _, weight in pairs]))
    attached.remove()


def test_threads_share_no_memory_of_a_call(launched, monkeypatch):
    """Models of one shape have one plan: what a thread sums has to be there when it decides."""
    monkeypatch.setenv("GRADCLIP_BACKEND", "triton")
    wrong = []

    def launch(self, program, grid, *given, **constants):
        if "RECOUNT" in constants:
            given[2].fill_(get_ident())
        elif "SKIPS" in constants:
            wrong.extend({*given[0][:1].tolist()} - {get_ident()})

    monkeypatch.setattr(triton_launch.Launcher, "__call__", launch)

    def clip():
        weight = torch.nn.Parameter(torch.zeros(3, 5))
        for _ in range(300):
            weight.grad = torch.ones(3, 5)
            gradclip.clip_grad_norm_([weight], 1e9)

    threads = [Thread(target=clip) for _ in range(3)]
    patience = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as they can
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(patience)
    assert not wrong


def test_the_functions_go_the_short_way(launched, monkeypatch):
    monkeypatch.setenv("GRADCLIP_BACKEND", "triton")
    weights = [weight for _, weight in made()]
    for clip in (
        lambda: gradclip.clip_grad_norm_(weights, 1.0),
        lambda: gradclip.clip_grad_value_(weights, 1.0),
    ):
        clip()
        clip()
        launched.clear()
        clip()
        assert launched.count("decide") == 1
        assert "fold" not in launched


def test_a_program_that_cannot_be_compiled_fails_before_anything_is_written(monkeypatch):
    """The ordinary way of the other backend takes over."""
    both = kernels._WithFallback(kernels._load("triton"), kernels._load("foreach"))
    monkeypatch.setattr(kernels.Backends, "on", lambda self, device: both)
    pairs = made()
    clipper = GradientClipper(pairs, 1.0, backend="triton")
    clipper.clip()
    regain(pairs, seed=1)
    launch = triton_launch.Launcher.__call__

    def broken(self, program, *given, **constants):
        if constants.get("DTYPE") == triton_fused.tl.bfloat16 and "PER_ROW" in constants:
            raise RuntimeError("ptxas was not found")
        launch(self, program, *given, **constants)

    monkeypatch.setattr(triton_launch.Launcher, "__call__", broken)
    wanted = [weight.grad.double() for _, weight in pairs]
    norm = torch.stack([each.norm() for each in wanted]).norm()
    with pytest.warns(RuntimeWarning, match="ptxas"):
        clipper.clip()
    for (_, weight), each in zip(pairs, wanted, strict=True):
        eps = max(torch.finfo(weight.dtype).eps, 2e-6)
        torch.testing.assert_close(weight.grad.double(), each / norm, rtol=eps, atol=0)
