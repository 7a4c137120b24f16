"""The held step: who calls it, who comes past it, what it leaves behind."""

import contextlib
import copy
import functools
import gc
import inspect
import pickle
import sys
import threading
import warnings
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import TensorWeakRef

from gradclip import GradientClipper, ObserveClip, attach, clip_grad_norm_, withhold
from gradclip.clipping.step.wrappers import unwrapped
from gradclip.errors import ArgumentTypeError, ArgumentValueError
from gradclip.integrations.wrapped import behind_accelerate


def trainee(**options):
    weight = nn.Parameter(torch.zeros(2))
    return weight, torch.optim.SGD([weight], lr=1.0, momentum=0.9, **options)


def give(weight, value=3.0):
    weight.grad = torch.full((2,), value)


@pytest.mark.parametrize("when", ["before", "after", "both"])
def test_schedulers_wrap_it_and_are_wrapped(when):
    weight, optimizer = trainee()
    if when != "after":
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = dict(vars(optimizer))
    handle = attach(optimizer, 1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    with warnings.catch_warnings(action="error"):
        warnings.filterwarnings("ignore", ".* skipped step")
        give(weight, torch.nan)
        optimizer.step()
        scheduler.step()  # of a step that was withheld it hears too
    assert optimizer.param_groups[0]["lr"] == 0.5
    give(weight)
    optimizer.step()
    assert weight.tolist() == pytest.approx([-0.5 / 2**0.5] * 2, rel=1e-5)
    handle.remove()
    if when == "before":
        assert vars(optimizer)["step"] == before["step"]
    give(weight, 1.0)
    optimizer.step()  # what was made over it passes through
    assert handle.clipper.step == 2


def test_under_what_came_over_it_it_can_be_used_again():
    weight, optimizer = trainee()
    attach(optimizer, 1.0).remove()
    assert not {"step", "__getstate__"} & vars(optimizer).keys()
    first = attach(optimizer, 1.0)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    first.remove()
    second = attach(optimizer, 0.5)
    give(weight)
    optimizer.step()
    assert second.clipper.step == 1
    assert first.clipper.step == 0
    assert float(second.last.norm_post) == pytest.approx(0.5)


@pytest.mark.parametrize("how", ["bound", "class"])
@pytest.mark.parametrize("within", ["attach", "withhold"])
def test_a_call_that_comes_past_it_is_refused(how, within):
    weight, optimizer = trainee()
    taken = optimizer.step if how == "bound" else lambda: type(optimizer).step(optimizer)
    give(weight)
    if within == "attach":
        handle = attach(optimizer, 1.0)
        with pytest.raises(ArgumentValueError, match=r"SGD\.step was called past gradclip\.attach"):
            taken()
        handle.remove()
    else:
        with (
            withhold(optimizer, skipped=True),
            pytest.raises(ArgumentValueError, match=r"called past gradclip\.withhold"),
        ):
            taken()
    assert weight.tolist() == [0.0, 0.0]
    taken()
    assert weight.tolist() == [-3.0, -3.0]


def test_it_looks_like_the_step_that_it_replaces():
    _, optimizer = trainee()
    signature, name = inspect.signature(optimizer.step), optimizer.step.__qualname__
    attach(optimizer, 1.0)
    assert inspect.ismethod(optimizer.step)
    assert optimizer.step.__self__ is optimizer
    assert inspect.signature(optimizer.step) == signature
    assert optimizer.step.__qualname__ == name


def test_hooks_of_others_run_for_steps_that_are_made_and_after_clipping():
    weight, optimizer = trainee()
    seen = []
    hook = optimizer.register_step_pre_hook(lambda o, *_: seen.append(weight.grad.tolist()))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    with pytest.warns(UserWarning, match=r"SGD has step hooks \(.*<lambda>\).*after gradclip"):
        attach(optimizer, 1.0)
    give(weight)
    optimizer.step()
    give(weight, torch.inf)
    optimizer.step()
    assert seen == [pytest.approx([0.5**0.5] * 2, rel=1e-5), "after"]
    hook.remove()
    with warnings.catch_warnings(action="error"):
        attach(optimizer, ObserveClip())  # gradclip's own hook is none of others


@pytest.mark.parametrize("fused", [False, True])
def test_hooks_of_all_optimizers_are_as_hooks_of_one(fused):
    weight, optimizer = trainee(fused=fused)
    seen = []
    registered = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("after")),
    ]
    try:
        with pytest.warns(UserWarning, match=r"SGD has step hooks \(.*<lambda>\).*after gradclip"):
            attach(optimizer, 1.0)
        for value in (3.0, torch.inf):
            give(weight, value)
            optimizer.step()
        assert seen == ["before", "after"]
    finally:
        for each in registered:
            each.remove()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("where", ["pre", "post"])
def test_an_error_in_a_hook_leaves_nothing_lent(error, where):
    """Ctrl-C behind our hook left the loss scale of one step in the next."""
    weight, optimizer = trainee(fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    handle = attach(optimizer, 1.0)

    def fail(*_):
        raise error

    register = getattr(optimizer, f"register_step_{where}_hook")
    for expected in (False, True):
        hook = register(fail) if not expected else None
        give(weight, 3.0 * 1024)
        if hook is not None:
            with pytest.raises(error):
                scaler.step(optimizer)
            hook.remove()
            assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()
        else:
            scaler.step(optimizer)
        scaler.update()
        assert float(handle.last.norm_pre) == pytest.approx(18**0.5)


def test_a_closure_that_is_evaluated_again_is_refused():
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            loss = closure()
            super().step()
            return loss

    weight = nn.Parameter(torch.zeros(2))
    optimizer = Twice([weight], lr=1.0)
    attach(optimizer, 1.0)
    give(weight)
    with pytest.raises(ArgumentTypeError, match="Twice evaluates its closure more than once"):
        optimizer.step(lambda: torch.ones(()))
    assert weight.tolist() == [0.0, 0.0]


def test_steps_of_its_own_within_a_step_are_part_of_it():
    class Halves(torch.optim.SGD):
        def __init__(self, params):
            super().__init__(params, lr=0.5)
            self.depth = 0

        def step(self, closure=None):
            self.depth += 1
            if self.depth == 1:
                self.step()
            super().step()
            self.depth -= 1

    weight = nn.Parameter(torch.zeros(2))
    optimizer = Halves([weight])
    handle = attach(optimizer, 1.0)
    give(weight)
    optimizer.step()
    assert handle.clipper.step == 1
    assert weight.tolist() == pytest.approx([-(0.5**0.5)] * 2, rel=1e-5)


@pytest.mark.filterwarnings("ignore")  # of torch, about itself
def test_a_compiled_step_has_the_graphs_that_it_has_alone():
    """torch.compile(optimizer.step): the clip is a graph break, and the step is compiled."""
    from torch._dynamo.utils import counters  # noqa: PLC0415 - it takes seconds

    found = []
    for clips in (False, True):
        torch._dynamo.reset()
        counters.clear()
        weight, optimizer = trainee(foreach=True)
        before = torch.compile(optimizer.step, backend="eager")
        handle = attach(optimizer, 1.0) if clips else None
        step = torch.compile(optimizer.step, backend="eager")
        with warnings.catch_warnings():
            # Dynamo says what it cannot trace once in a process, on several lines.
            warnings.filterwarnings("error", "Dynamo does not know how to trace")
            for value in (3.0, 3.0, torch.nan, 3.0) if clips else (0.5**0.5,) * 3:
                give(weight, value)
                step()
        found.append((weight.tolist(), counters["stats"]["unique_graphs"]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == found[1][1]
    assert handle.clipper.step == 4
    with pytest.raises(ArgumentValueError, match=r"torch\.compile\(optimizer\.step\)"):
        before()


# What an attack found.


def test_no_gradient_of_a_step_outlives_it():
    """A batch of tensors that kept itself waited for the collector, with a model's gradients."""
    weight, optimizer = trainee()
    attach(optimizer, 1.0)
    clipper = GradientClipper([weight], 1e9)
    gc.collect()
    gc.disable()
    try:
        dead = []
        for _ in range(3):
            give(weight)
            dead.append(TensorWeakRef(weight.grad))
            clip_grad_norm_([weight], 1e9)
            optimizer.zero_grad()
            give(weight)
            dead.append(TensorWeakRef(weight.grad))
            optimizer.step()
            optimizer.zero_grad()
            give(weight)
            dead.append(TensorWeakRef(weight.grad))
            clipper.clip()
            weight.grad = None
        assert [each() for each in dead[:-3]] == [None] * 6
    finally:
        gc.enable()


class HandsOn(torch.optim.Optimizer):
    """Shows the attributes of the optimizer that it wraps, as NeMo's EMAOptimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self.__dict__["optimizer"], name)

    def step(self, closure=None):
        return self.optimizer.step(closure)


def test_every_step_is_clipped_where_torch_has_not_put_hooks_into_it():
    """timm's Lookahead does not call torch's ``__init__``: only ``zero_grad`` puts hooks in."""

    class Lookahead(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.inner, self.param_groups = optimizer, optimizer.param_groups
            self._optimizer_step_pre_hooks = OrderedDict()
            self._optimizer_step_post_hooks = OrderedDict()

        def step(self, closure=None):
            return self.inner.step(closure)

    weight, inner = trainee()
    inner.param_groups[0]["momentum"] = 0.0
    optimizer = Lookahead(inner)
    handle = attach(optimizer, 1.0)
    for number in range(1, 3):
        give(weight)
        optimizer.step()  # and the model's zero_grad, not the optimizer's
        assert handle.clipper.step == number
        assert float(weight.detach().norm()) == pytest.approx(number, rel=1e-5)


class Averages(torch.optim.AdamW):
    """Counts and averages beside the step of its base."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.count = 0

    def step(self, closure=None):
        super().step(closure)
        self.count += 1


class Dressed(Averages):
    """Shows the name and module of the step of its base."""

    @functools.wraps(torch.optim.AdamW.step)
    def step(self, closure=None):
        Averages.step(self, closure)


class Sees(Averages):
    """Counts in a method that the step of its base calls."""

    step = torch.optim.AdamW.step

    def _init_group(self, *args):
        self.count += 1
        return super()._init_group(*args)


@pytest.mark.parametrize("kind", ["hands on", "averages", "dressed", "sees", "hook"])
def test_only_torchs_own_fused_step_is_called_to_change_nothing(kind):
    weight = nn.Parameter(torch.ones(2))
    inner = torch.optim.AdamW([weight], lr=0.1, fused=True)
    optimizer = {"hands on": HandsOn(inner), "hook": inner}.get(kind)
    own = {"dressed": Dressed, "sees": Sees}.get(kind, Averages)
    optimizer = optimizer or own([weight], lr=0.1, fused=True)
    seen = []
    if kind == "hook":
        optimizer.register_step_post_hook(lambda *_: seen.append(1))
    give(weight)
    optimizer.step()
    before = weight.tolist(), getattr(optimizer, "count", 0), len(seen)
    give(weight, torch.nan)
    with withhold(optimizer, torch.tensor(True)):
        optimizer.step()
    assert (weight.tolist(), getattr(optimizer, "count", 0), len(seen)) == before


@pytest.mark.parametrize("where", ["closure", "hook"])
def test_an_error_keeps_nothing_of_the_batch_alive(where):
    weight, optimizer = trainee()
    attach(optimizer, 1.0)
    dead = []

    def fail(*_):
        activations = torch.zeros(3)
        dead.append(weakref.ref(activations))
        raise torch.OutOfMemoryError

    if where == "hook":
        optimizer.register_step_post_hook(fail)
    gc.disable()
    try:
        for _ in range(2):
            give(weight)
            with contextlib.suppress(torch.OutOfMemoryError):
                optimizer.step(fail if where == "closure" else None)
        assert [each() for each in dead] == [None, None]
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:an optimizer whose gradients")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_of_a_handle_is_one_that_was_removed(copied):
    weight, optimizer = trainee()
    handle = attach(optimizer, 1.0)
    give(weight)
    optimizer.step()
    other = copied(handle)
    assert "removed from SGD" in repr(other)
    assert float(other.last.norm_pre) == float(handle.last.norm_pre)
    give(weight)
    optimizer.step()
    assert handle.clipper.step == 2
    assert other.clipper.step == 1


class Whole(torch.optim.SGD):
    def __getstate__(self):
        return dict(vars(self))


@pytest.mark.filterwarnings("ignore:an optimizer whose gradients")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_an_optimizer_that_is_copied_with_all_its_attributes_steps_plainly(copied):
    weight = nn.Parameter(torch.zeros(2))
    optimizer = Whole([weight], lr=1.0)
    attach(optimizer, 1.0)
    other = copied(optimizer)
    (param,) = other.param_groups[0]["params"]
    give(param)
    other.step()
    assert param.tolist() == [-3.0, -3.0]
    give(param)
    with attach(other, 1.0) as handle:
        other.step()
    assert float(handle.last.norm_pre) == pytest.approx(3 * 2**0.5)
    assert param.tolist() == pytest.approx([-3.0 - 0.5**0.5] * 2, rel=1e-5)
    give(param)
    with withhold(other, skipped=True):
        other.step()
    assert param.tolist() == pytest.approx([-3.0 - 0.5**0.5] * 2, rel=1e-5)


def interrupted(at, action):
    """Raise behind a call within the held step, where a Ctrl-C comes; return whether one was."""
    left = at

    def profile(frame, event, _):
        nonlocal left
        left -= event == "c_return" and frame.f_code.co_filename.endswith("held.py")
        if left == 0:
            sys.setprofile(None)
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        sys.setprofile(profile)
        try:
            action()
        finally:
            sys.setprofile(None)
    return left == 0


def test_the_next_step_is_clipped_after_an_interrupt_at_any_call():
    at = found = 1
    while found:
        weight, optimizer = trainee()
        with attach(optimizer, 1.0):
            give(weight)
            found = interrupted(at, optimizer.step)
            give(weight)
            optimizer.step()
        assert float(weight.grad.norm()) == pytest.approx(1.0, rel=1e-5)
        at += 1
    assert at > 4


def test_a_closure_that_is_evaluated_where_the_weights_have_moved_is_refused():
    class Ahead(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(0.1)
            loss = closure()
            super().step()
            return loss

    weight = nn.Parameter(torch.zeros(2))
    optimizer = Ahead([weight], lr=1.0)
    attach(optimizer, 1.0)
    give(weight)
    with pytest.raises(ArgumentTypeError, match="Ahead evaluates its closure more than once"):
        optimizer.step(lambda: torch.ones(()))


@pytest.mark.parametrize("flag", [torch.tensor(False), False])
def test_a_step_that_is_not_withheld_has_its_closure(flag):
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.LBFGS([weight], lr=0.1, max_iter=4)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    with withhold(optimizer, flag):
        optimizer.step(closure)
    assert float(weight.detach().norm()) < 1.4
    before = weight.tolist()
    with withhold(optimizer, torch.tensor(True)):
        assert float(optimizer.step(closure).detach()) == pytest.approx(sum(w * w for w in before))
    assert weight.tolist() == before


def test_what_is_no_closure_is_left_alone():
    class Rated(torch.optim.SGD):
        def step(self, lr=None, closure=None):
            self.param_groups[0]["lr"] = lr
            return super().step(closure)

    weight = nn.Parameter(torch.zeros(2))
    optimizer = Rated([weight], lr=1.0)
    attach(optimizer, 10.0)
    give(weight)
    optimizer.step(0.5)
    assert weight.tolist() == [-1.5, -1.5]
    calls = []
    optimizer.step(0.0, lambda: calls.append(1))
    assert calls == [1]


def test_attributes_that_are_set_in_another_way_do_not_matter():
    class Sets(torch.optim.SGD):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)

    weight = nn.Parameter(torch.zeros(2))
    optimizer = Sets([weight], lr=1.0)
    before = dict(vars(optimizer))
    with attach(optimizer, 1.0):
        give(weight)
        optimizer.step()
    assert weight.tolist() == pytest.approx([-(0.5**0.5)] * 2, rel=1e-5)
    assert vars(optimizer).keys() == before.keys()


def test_an_attachment_that_cannot_hold_the_step_claims_nothing():
    class Property(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.inner, self.param_groups = optimizer, optimizer.param_groups

        @property
        def step(self):
            return self.inner.step

    optimizer = Property(trainee()[1])
    for _ in range(2):
        with pytest.raises(ArgumentTypeError, match=r"Property cannot be replaced"):
            attach(optimizer, 1.0)


def test_threads_have_optimizers_of_their_own():
    failures = []

    def train():
        weight, optimizer = trainee()
        attach(optimizer, 1.0)
        try:
            for _ in range(150):
                give(weight)
                optimizer.step()
                optimizer.zero_grad()
        except BaseException as error:  # noqa: BLE001 - of another thread
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=train) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []


def test_wrappers_that_are_subclassed_are_looked_through():
    from accelerate import Accelerator  # noqa: PLC0415
    from accelerate.optimizer import AcceleratedOptimizer  # noqa: PLC0415

    class Mine(AcceleratedOptimizer):
        pass

    Accelerator(cpu=True)
    _, optimizer = trainee()
    wrapper = Mine(optimizer, device_placement=False)
    assert unwrapped(wrapper) is optimizer
    assert behind_accelerate(wrapper) is optimizer
