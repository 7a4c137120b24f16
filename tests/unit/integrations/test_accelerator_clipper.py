"""A loop on Accelerate: windows, scalers, skips, and its wrappers around optimizers."""

import copy
import itertools
import math
from contextlib import ExitStack

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from documented_policies import SpikeSkip
from gradclip import ObserveClip, attach, withhold
from gradclip.errors import ArgumentTypeError, ArgumentValueError, DoubleClippingError
from gradclip.integrations.accelerate import AcceleratorClipper


@pytest.fixture(autouse=True)
def _fresh():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def batch(step, bad=None):
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    targets = 30 * inputs.sum(1, keepdim=True)
    if step == bad:
        inputs[0, 0] = math.nan
    return inputs, targets


def give_scaler(accelerator, optimizer):
    """Put a scaler where Accelerate has one on a GPU: on a CPU fp16 has none."""
    accelerator.scaler = optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    optimizer.__setstate__(optimizer.__dict__)


def train(clip, *, bad=None, steps=8, accumulate=2, scaler=False):
    """Run the documented loop; ``clip`` makes what is called in the place of Accelerate's."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    module, optimizer = accelerator.prepare(module, optimizer)
    if scaler:
        give_scaler(accelerator, optimizer)
    clipper = clip(accelerator, optimizer, module)
    said, losses, skips = [], [], []
    for step in range(steps):
        inputs, targets = batch(step, bad)
        with accelerator.accumulate(module):
            loss = nn.functional.mse_loss(module(inputs), targets)
            accelerator.backward(loss)
            said.append(clipper() if callable(clipper) else clipper.clip())
            optimizer.step()
            if not callable(clipper):
                skips.append(clipper.step_was_skipped)
            optimizer.zero_grad()
        losses.append(loss.item())
    weights = [p.detach().clone() for p in module.parameters()]
    return said, losses, skips, weights


def accelerates_own(accelerator, optimizer, module):
    def clip():
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(module.parameters(), 0.7)

    return clip


def ours(accelerator, optimizer, module):
    return AcceleratorClipper(accelerator, optimizer, 0.7, model=module)


@pytest.mark.smoke
@pytest.mark.parametrize("scaler", [False, True])
def test_it_is_accelerates_own_where_both_are_right(scaler):
    said, losses, skips, _ = train(ours, scaler=scaler)
    _, expected, _, _ = train(accelerates_own, scaler=scaler)
    assert losses == pytest.approx(expected, rel=1e-6)
    assert [each is not None for each in said] == [False, True] * 4  # the boundary only
    assert skips == [False] * 8


@pytest.mark.parametrize("scaler", [False, True])
def test_a_step_that_is_no_number_is_not_made(scaler):
    """Accelerate's own flag does not know of it."""
    _, _, skips, weights = train(ours, bad=3, steps=4, scaler=scaler)
    _, _, _, before = train(ours, steps=2, scaler=scaler)
    assert skips == [False, False, False, True]
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


class ZerosForNone(torch.optim.SGD):
    """Makes zeros where there is no gradient, and has momentum, as Muon."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return super().step(closure)


@pytest.mark.parametrize("way", ["attach", "AcceleratorClipper"])
def test_what_makes_zeros_of_no_gradient_is_withheld(way):
    """KellerJordan/Muon#56: the momentum moved the weights at a skipped step."""
    accelerator = Accelerator(cpu=True)
    weight = nn.Parameter(torch.zeros(2))
    optimizer = accelerator.prepare(ZerosForNone([weight], lr=1.0, momentum=0.9))
    owner = (
        attach(optimizer, 1.0)
        if way == "attach"
        else AcceleratorClipper(accelerator, optimizer, 1.0)
    )
    for value in (1.0, math.nan):
        before = weight.detach().clone()
        weight.grad = torch.full((2,), value)
        if way == "AcceleratorClipper":
            owner.clip()
        optimizer.step()
    assert bool(before.any())
    assert torch.equal(weight, before)


def test_it_unscales_once_also_where_the_loop_did():
    accelerator = Accelerator(cpu=True)
    module = model()
    optimizer = accelerator.prepare(torch.optim.SGD(module.parameters(), lr=0.1))
    give_scaler(accelerator, optimizer)
    clipper = AcceleratorClipper(accelerator, optimizer, 1e9)
    inputs, targets = batch(0)
    loss = nn.functional.mse_loss(module(inputs), targets)
    accelerator.backward(loss)
    accelerator.unscale_gradients(optimizer)
    found = float(clipper.clip().norm_pre)
    wanted = torch.autograd.grad(
        nn.functional.mse_loss(module(inputs), targets), list(module.parameters())
    )
    assert found == pytest.approx(torch.cat([g.flatten() for g in wanted]).norm().item(), rel=1e-6)


def test_gradients_that_were_added_since_are_still_scaled():
    """A loop that drops a step without an update has to know: torch says so."""
    accelerator = Accelerator(cpu=True)
    module = model()
    optimizer = accelerator.prepare(torch.optim.SGD(module.parameters(), lr=0.1))
    give_scaler(accelerator, optimizer)
    clipper = AcceleratorClipper(accelerator, optimizer, 1.0)
    for step in range(2):
        inputs, targets = batch(step)
        accelerator.backward(nn.functional.mse_loss(module(inputs), targets))
        if step == 0:
            clipper.clip()
            optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="already been called"):
        clipper.clip()


def test_each_optimizer_says_whether_it_stepped():
    accelerator = Accelerator(cpu=True)
    modules = [model(), model()]
    optimizers = accelerator.prepare(
        *(torch.optim.SGD(module.parameters(), lr=0.1, fused=True) for module in modules)
    )
    give_scaler(accelerator, optimizers[0])
    give_scaler(accelerator, optimizers[1])
    optimizers[0].scaler = accelerator.scaler
    policies = [ObserveClip(), 1.0]
    clippers = [
        AcceleratorClipper(accelerator, optimizer, policy)
        for optimizer, policy in zip(optimizers, policies, strict=True)
    ]
    for number, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
        inputs, targets = batch(0, bad=0 if number == 0 else None)
        accelerator.backward(nn.functional.mse_loss(module(inputs), targets))
        clippers[number].clip()
        optimizer.step()
    assert [clipper.step_was_skipped for clipper in clippers] == [True, False]


def test_attach_unwraps_the_prepared_optimizer_and_keeps_to_the_boundary():
    """The wrapper passes for an optimizer, and has no working hooks of its own."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    module, optimizer = accelerator.prepare(model(), torch.optim.SGD(model().parameters(), lr=0.0))
    with pytest.raises(AttributeError):
        optimizer.register_step_pre_hook(lambda *_: None)
    handle = attach(optimizer, 1.0)
    seen = []
    for step in range(4):
        inputs, targets = batch(step)
        with accelerator.accumulate(module):
            accelerator.backward(nn.functional.mse_loss(module(inputs), targets))
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            seen.append(handle.clipper.step)
    assert seen == [0, 1, 1, 2]
    with pytest.raises(DoubleClippingError, match=r"gradclip\.attach"):
        AcceleratorClipper(accelerator, optimizer, 1.0)


def test_the_history_is_saved_with_the_loop(tmp_path):
    accelerator = Accelerator(cpu=True)
    _, optimizer = accelerator.prepare(model(), torch.optim.SGD(model().parameters()))
    clipper = AcceleratorClipper(accelerator, optimizer, 1.0)
    accelerator.register_for_checkpointing(clipper)
    fresh = clipper.state_dict()
    clipper.load_state_dict({**fresh, "step": 5})
    accelerator.save_state(tmp_path / "there")
    clipper.load_state_dict(fresh)
    accelerator.load_state(tmp_path / "there", load_kwargs={"weights_only": False})
    assert clipper.clipper.step == 5


def test_what_is_no_accelerator_is_refused():
    with pytest.raises(ArgumentTypeError, match=r"accelerate.Accelerator"):
        AcceleratorClipper(None, torch.optim.SGD(model().parameters()), 1.0)


def test_a_new_one_takes_the_place_of_an_old_one():
    """As where a cell of a notebook runs again: the old object is still there."""
    accelerator = Accelerator(cpu=True)
    module, optimizer = accelerator.prepare(model(), torch.optim.SGD(model().parameters(), lr=0.1))
    old = AcceleratorClipper(accelerator, optimizer, 1.0)
    new = AcceleratorClipper(accelerator, optimizer, max_norm=0.5)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(DoubleClippingError, match="was removed, or another one took"):
        old.clip()
    assert float(new.clip().norm_post) == pytest.approx(0.5)
    new.remove()
    attach(optimizer, 1.0).remove()
    del module


@pytest.mark.parametrize("way", ["attach", "AcceleratorClipper", "withhold"])
@pytest.mark.parametrize("scaler", [False, True])
def test_a_finite_step_that_a_policy_skips_is_not_made(way, scaler):
    """The wrapper took ``optimizer.step`` when it was made; under a scaler it steps by that."""
    accelerator = Accelerator(cpu=True)
    module = model()
    optimizer = accelerator.prepare(torch.optim.AdamW(module.parameters(), lr=0.1))
    if scaler:
        give_scaler(accelerator, optimizer)
    before = [p.detach().clone() for p in module.parameters()]
    stored = {k: v for k, v in vars(optimizer).items() if "_step_method" in k}
    policy = SpikeSkip(max_norm=1.0, skip_above=1e-6)
    owner = None
    if way == "attach":
        owner = attach(optimizer, policy)
    elif way == "AcceleratorClipper":
        owner = AcceleratorClipper(accelerator, optimizer, policy)
    inputs, targets = batch(0)
    accelerator.backward(nn.functional.mse_loss(module(inputs), targets))
    if way == "AcceleratorClipper":
        owner.clip()
        assert all(p.grad is not None for p in module.parameters())
    with withhold(optimizer, skipped=way == "withhold"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))
    assert not optimizer.optimizer.state
    if scaler:
        assert accelerator.scaler.get_scale() == 64.0  # a finite skip does not lower it
    if owner is not None:
        owner.remove()
    assert {k: v for k, v in vars(optimizer).items() if "_step_method" in k} == stored
    optimizer.step()
    assert not torch.equal(module[0].weight, before[0])


def test_a_step_after_a_skipped_one_is_made_though_nobody_clipped():
    accelerator = Accelerator(cpu=True)
    module = model()
    optimizer = accelerator.prepare(torch.optim.SGD(module.parameters(), lr=0.1))
    clipper = AcceleratorClipper(accelerator, optimizer, 1.0)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    clipper.clip()
    before = module[0].weight.detach().clone()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)  # others: the verdict is not of these
    optimizer.step()
    assert not torch.equal(module[0].weight, before)


def test_a_model_in_the_place_of_the_optimizer_is_named():
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ArgumentTypeError, match=r"optimizer is of type Sequential.*goes into mod"):
        AcceleratorClipper(accelerator, model(), 1.0)


@pytest.mark.parametrize("scaler", [False, True])
def test_its_stats_count_optimizer_steps(scaler):
    made = []

    def clip(accelerator, optimizer, module):
        made.append(AcceleratorClipper(accelerator, optimizer, 1.0, model=module))
        return made[0]

    train(clip, bad=3, scaler=scaler)
    stats = made[0].stats
    assert (stats.steps, stats.skipped, stats.nonfinite) == (4, 1, 1)
    assert stats.clipped == 3
    assert stats.max > 1.0


def take(way, accelerator, optimizer):
    """Return how often this owner was asked, and how it lets the optimizer go."""
    if way == "withhold":
        stack = ExitStack()
        stack.enter_context(withhold(optimizer, torch.tensor(False)))
        return None, stack.close
    if way == "attach":
        handle = attach(optimizer, ObserveClip())
        return (lambda: handle.clipper.step), handle.remove
    clipper = AcceleratorClipper(accelerator, optimizer, 1.0)
    return (lambda: clipper.clip() and clipper.clipper.step), clipper.remove


def test_owners_may_come_and_go_in_any_order():
    """Accelerate's wrapper under a scaler kept the step of one that had left, or lost another's."""
    ways = ("attach", "withhold", "AcceleratorClipper")
    orders = list(itertools.permutations(ways))
    for scaled, come, go in itertools.product([False, True], orders, orders):
        accelerator = Accelerator(cpu=True)
        weight = nn.Parameter(torch.zeros(2))
        inner = torch.optim.SGD([weight], lr=1.0)
        optimizer = accelerator.prepare(inner)
        if scaled:
            give_scaler(accelerator, optimizer)
            accelerator.scaler.scale(torch.zeros(()))
        steps = inner.step, vars(optimizer).get("_optimizer_original_step_method")
        names = vars(inner).keys() | {"step"}  # which Accelerate sets under a scaler
        patched = vars(optimizer).get("_optimizer_patched_step_method")
        owners = {way: take(way, accelerator, optimizer) for way in come}
        asked = 0
        for way in go:
            weight.grad = torch.full((2,), 3.0)
            if "AcceleratorClipper" in owners:
                owners["AcceleratorClipper"][0]()
            optimizer.step()
            asked += "attach" in owners
            if "attach" in owners:
                assert owners["attach"][0]() == asked, (scaled, come, go)
            owners.pop(way)[1]()
        assert vars(inner).keys() <= names, (scaled, come, go)
        assert inner._optimizer_step_pre_hooks == {}
        found = inner.step, vars(optimizer).get("_optimizer_original_step_method")
        assert found == steps, (scaled, come, go)
        assert vars(optimizer).get("_optimizer_patched_step_method") is patched
        AcceleratorState._reset_state()


def test_a_step_that_a_wrapper_put_back_is_held_as_at_first():
    accelerator = Accelerator(cpu=True)
    weight = nn.Parameter(torch.zeros(2))
    inner = torch.optim.SGD([weight], lr=1.0)
    handle = attach(inner, 1.0)
    optimizer = accelerator.prepare(inner)
    give_scaler(accelerator, optimizer)
    accelerator.scaler.scale(torch.zeros(()))
    handle.remove()
    weight.grad = torch.ones(2)
    optimizer.step()  # puts the step that it knows on the optimizer
    attach(inner, 1.0)
    with pytest.raises(ArgumentValueError, match="was called past"):
        type(inner).step(inner)
    with pytest.warns(UserWarning, match="copied or pickled"):
        copy.deepcopy(inner)
