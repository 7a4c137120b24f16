"""The short way of a GPU: the answers of the ordinary way, in a few launches.

Triton's interpreter runs the launches on the CPU; what a GPU would do is counted by their log.
"""

import copy
import gc
import pickle
import sys
import warnings
from math import nan
from threading import Thread, get_ident

import pytest
import torch
from fused_models import made, regain
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile

import gradclip
from gradclip import GradientClipper, GuardClip, NormClip, ObserveClip, ValueClip
from gradclip.clipping import engine, flags, kernels
from gradclip.clipping.kernels import device, tables, triton_launch
from gradclip.clipping.kernels import fused as reports
from gradclip.clipping.short import fused, ways
from gradclip.clipping.short.results import FusedResult
from gradclip.clipping.step import rows
from gradclip.errors import (
    ArgumentValueError,
    DoubleClippingError,
    OverlappingGradientsError,
    TooManySkipsError,
)

triton_fused = pytest.importorskip("gradclip.clipping.kernels.triton_fused")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


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
    for module in (device, engine, rows, tables, triton_fused, ways):
        monkeypatch.setattr(module, "is_capturing", lambda device: True)


COUNTED = {
    "one pattern": (1.0, torch.float32, 4),
    "observe": (ObserveClip(), torch.float32, 3),
    "value": (ValueClip(clip_value=0.5), torch.float32, 4),
    "skips": (NormClip(max_norm=1.0, skip_above=9.0), torch.float32, 4),
    "guard": (GuardClip(), torch.float32, 4),
    "two patterns": ({"w0": 1.0, "*": 2.0}, torch.float32, 4),
    "two patterns, norm and value": ({"w0": 1.0, "*": ValueClip(clip_value=0.5)}, torch.float32, 6),
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


def test_a_graph_keeps_its_counter(launched, monkeypatch):
    """It is not memory of the graph: freed with the plan, replays would write into others'."""
    clipper = GradientClipper(made(), 1.0, backend="triton")
    for _ in range(3):
        clipper.clip()
    counters = []
    monkeypatch.setattr(
        triton_launch.Launcher,
        "__call__",
        lambda self, program, grid, *given, **k: (
            "SKIPS" in k and counters.append(StorageWeakRef(given[8].untyped_storage()))
        ),
    )
    capture(monkeypatch)
    clipper.clip()
    del clipper
    gc.collect()
    assert [counter.expired() for counter in counters] == [False]


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


@pytest.fixture
def both(monkeypatch):
    """Triton, and what takes over where it fails, as on a GPU."""
    both = kernels._WithFallback(kernels._load("triton"), kernels._load("foreach"))
    monkeypatch.setattr(kernels.Backends, "on", lambda self, device: both)
    return both


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("program", ["decide", "clamp"])
def test_a_program_that_cannot_be_compiled_fails_before_it_clamps(monkeypatch, program):
    pairs = made()
    clipper = GradientClipper(pairs, ValueClip(clip_value=0.5), backend="triton")
    clipper.clip()
    regain(pairs, seed=1)
    launch, norm = triton_launch.Launcher.__call__, norm_of(pairs)

    def broken(self, each, *given, **constants):
        in_half = constants.get("DTYPE") == triton_fused.tl.bfloat16
        if each.fn.__name__ == program and (in_half or program == "decide"):
            raise RuntimeError("ptxas was not found")
        launch(self, each, *given, **constants)

    monkeypatch.setattr(triton_launch.Launcher, "__call__", broken)
    with pytest.warns(RuntimeWarning, match="ptxas"):
        result = clipper.clip()
    assert float(result.norm_pre) == pytest.approx(norm, rel=1e-6)
    assert result.clipped


def norm_of(pairs):
    return float(torch.stack([weight.grad.double().norm() for _, weight in pairs]).norm())


def test_a_warning_that_is_an_error_is_none_of_the_backend(both):
    pairs = made()
    clipper = GradientClipper(pairs, 1.0, backend="triton")
    clipper.clip()
    regain(pairs, seed=1, spike=nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UserWarning, match="w1 holds a NaN"):
            clipper.clip()
    assert both._active is kernels._load("triton")


def test_what_is_written_into_a_result_is_nothing_else():
    pairs = made()
    clipper = GradientClipper(pairs, {"w0": 1.0, "*": 2.0}, backend="triton")
    clipper.clip()
    clipper.clip().thresholds_S.zero_()
    assert clipper.clip().thresholds_S.tolist() == [1.0, 2.0]
    clipper = GradientClipper(pairs, 1.0, backend="triton")
    clipper.clip()
    result = clipper.clip()
    assert isinstance(result, FusedResult)
    result.norm_pre.zero_()
    assert result.norms_S.all()


SCALES = {
    "two numbers": (2, torch.float32),
    "an integer": (1, torch.int64),
}


@pytest.mark.parametrize("case", SCALES)
def test_a_scale_on_the_device_is_refused_as_in_the_ordinary_way(launched, case):
    size, dtype = SCALES[case]
    clipper = GradientClipper(made(), 1.0, backend="triton")
    clipper.clip()
    launched.clear()
    with pytest.raises(ArgumentValueError, match="grad_scale is a tensor of shape"):
        clipper.clip(torch.empty(size, dtype=dtype, device="meta"))
    assert not launched


def test_a_scale_of_another_device_takes_the_ordinary_way(launched):
    """No program of one device reads memory of another."""
    clipper = GradientClipper(made(), 1.0, backend="triton")
    clipper.clip()
    launched.clear()
    with pytest.raises(NotImplementedError, match="meta"):  # nothing is copied from there
        clipper.clip(torch.empty((), device="meta"))
    assert not launched


def test_a_copy_knows_no_layout(monkeypatch):
    """Layouts are found by identities, which other objects may have there."""
    monkeypatch.setattr(fused, "id", lambda specs: 1, raising=False)
    clipper = GradientClipper(made(), 1.0, backend="triton")
    clipper.clip()
    clipper.clip()
    for each in (copy.deepcopy(clipper), pickle.loads(pickle.dumps(clipper))):
        weight = each._engine.source.tensors()[1]
        for _ in range(2):
            weight.grad = torch.full_like(weight, 2.0)
            each.clip()
        assert isinstance(each.last, FusedResult)
        assert weight.grad.double().norm() == pytest.approx(1.0, rel=1e-2)


def test_a_result_is_copied_without_programs_and_memory_of_other_calls(launched):
    clipper = GradientClipper(made(), {"w0": 1.0, "*": 2.0}, backend="triton")
    for _ in range(3):
        result = clipper.clip()
    for each in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert repr(each.to_host()) == repr(result.to_host())
        assert each.on_host.numbers() == result.on_host.numbers()
    (layout,) = (layout for _, layout in clipper._engine._short._fused._known.values())
    (plan,) = layout._plans.values()
    plan._launch._kept["compiled"] = lambda: None  # cannot be pickled
    assert len(pickle.dumps(result)) < 15_000
    assert len(pickle.dumps(clipper)) < 30_000


def test_the_functions_remember_many_models(launched, monkeypatch):
    monkeypatch.setenv("GRADCLIP_BACKEND", "triton")
    made_anew = []
    layout = fused.Layout
    monkeypatch.setattr(
        fused, "Layout", lambda *args, **k: made_anew.append(args) or layout(*args, **k)
    )
    models = [torch.nn.Parameter(torch.zeros(3, n)) for n in range(20, 28)]
    for _ in range(3):
        for weight in models:
            weight.grad = torch.ones_like(weight)
            gradclip.clip_grad_norm_([weight], 1.0)
    assert len(made_anew) == len(models)


@pytest.mark.usefixtures("both")
def test_a_program_that_cannot_be_compiled_fails_before_anything_is_written(monkeypatch):
    """The ordinary way of the other backend takes over."""
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
