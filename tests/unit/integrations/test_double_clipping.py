"""A clipper of a module or a list, left in the loop beside what clips before every step."""

import pytest
import torch
from torch import nn

import gradclip
from gradclip import GradientClipper, ObserveClip, attach
from gradclip.errors import DoubleClippingError
from gradclip.pipeline.hooks import GradientClippingHookConfig, PipelineHookArgs, PipelineHooks


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def backward(module):
    (30 * module(torch.ones(2, 4))).square().mean().backward()


def copies(module):
    return [(p.detach().clone(), p.grad.clone()) for p in module.parameters()]


def assert_unchanged(module, before):
    for parameter, (weight, gradient) in zip(module.parameters(), before, strict=True):
        assert torch.equal(parameter, weight)
        assert torch.equal(parameter.grad, gradient)


OTHERS = {
    "module": lambda module: GradientClipper(module, 0.5).clip,
    "list": lambda module: GradientClipper(list(module.parameters()), 0.5).clip,
    "part": lambda module: GradientClipper(module[2], 0.5).clip,
    "norm": lambda module: lambda: gradclip.clip_grad_norm_(module.parameters(), 0.5),
    "value": lambda module: lambda: gradclip.clip_grad_value_(module.parameters(), 0.5),
    "loose": lambda module: GradientClipper(module, 1e9).clip,  # it changes nothing this time
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("flags", [{}, {"fused": True}])
def test_an_attachment_finds_it_before_the_first_step(module, other, flags):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, **flags)
    attach(optimizer, 1.0)
    backward(module)
    OTHERS[other](module)()
    before = copies(module)
    with pytest.raises(DoubleClippingError, match=r"already clipped by .*; gradclip\.attach") as e:
        optimizer.step()
    assert ("clip_grad" if other in ("norm", "value") else "GradientClipper") in str(e.value)
    assert_unchanged(module, before)


def test_it_is_found_where_it_begins_later(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    attach(optimizer, 1.0)
    other = GradientClipper(module, 0.5)
    for step in range(3):
        optimizer.zero_grad()
        backward(module)
        if step < 2:
            optimizer.step()
    other.clip()
    with pytest.raises(DoubleClippingError):
        optimizer.step()


def test_the_hook_finds_it(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    hooks = PipelineHooks.from_hooks(GradientClippingHookConfig(clip_mode="norm", max_norm=1.0))

    def step():
        with hooks.begin("on_step", PipelineHookArgs(optimizer=optimizer)):
            backward(module)
            GradientClipper(module, 0.5).clip()

    with pytest.raises(DoubleClippingError, match="GradientClippingHook would clip them again"):
        step()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_before_and_after_it_are_other_gradients(module, set_to_none):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    other = GradientClipper(module, 0.5)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=set_to_none)
        backward(module)
        other.clip()
        optimizer.step()
    handle = attach(optimizer, 1.0)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=set_to_none)
        backward(module)
        optimizer.step()
    assert handle.clipper.step == 2


def test_what_was_added_since_is_clipped(module):
    """Two losses, the first of them with a limit of its own."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    handle = attach(optimizer, 1.0)
    backward(module)
    gradclip.clip_grad_norm_(module.parameters(), 0.5)
    backward(module)
    optimizer.step()
    assert handle.last.norm_pre > 1


@pytest.mark.parametrize("other", [ObserveClip(), float("inf")])
def test_to_measure_beside_it_is_fine(module, other):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    handle = attach(optimizer, 1.0)
    backward(module)
    measured = GradientClipper(module, other).clip()
    gradclip.get_total_norm(p.grad for p in module.parameters())
    optimizer.step()
    assert handle.last.norm_pre == measured.norm_pre


def test_to_measure_what_a_clipper_left_is_fine(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    handle = attach(optimizer, ObserveClip())
    backward(module)
    GradientClipper(module, 0.5).clip()
    optimizer.step()
    assert float(handle.last.norm_pre) == pytest.approx(0.5)


def test_an_attachment_that_measures_owns_nothing(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with attach(optimizer, 1.0) as clipping, attach(optimizer, ObserveClip()) as observing:
        backward(module)
        optimizer.step()
        assert float(observing.last.norm_pre) == pytest.approx(1.0)  # it came second
        assert clipping.last.norm_pre > 1
    with attach(optimizer, ObserveClip()), attach(optimizer, 1.0):
        pass


def test_gradients_that_were_put_in_place_of_clipped_ones_are_others(module):
    """As where each sample, or each worker, is clipped first, and their mean is stepped on."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    handle = attach(optimizer, 1.0)
    backward(module)
    gradclip.clip_grad_norm_(module.parameters(), 0.5)
    kept = [parameter.grad.data for parameter in module.parameters()]
    for parameter in module.parameters():
        parameter.grad.data = torch.ones_like(parameter)
    optimizer.step()
    assert handle.last.norm_pre > 1
    del kept
