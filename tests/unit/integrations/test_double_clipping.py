"""A clipper of a module or a list, left in the loop beside what clips before every step."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.weak import TensorWeakRef

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


# Two owners, and what clips a part.


def shared(*policies, flags=()):
    """Two optimizers that share a parameter: SGD([p, q]) and SGD([q, r])."""
    p, q, r = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    optimizers = [torch.optim.SGD(each, lr=1.0, **dict(flags)) for each in ([p, q], [q, r])]
    handles = [attach(o, policy) for o, policy in zip(optimizers, policies, strict=True)]
    for each in (p, q, r):
        each.grad = torch.tensor([3.0, 4.0])
    return (p, q, r), optimizers, handles


@pytest.mark.parametrize("flags", [{}, {"fused": True}])
@pytest.mark.parametrize("when", ["first", "later"])
def test_a_parameter_of_two_optimizers_is_clipped_once(flags, when):
    """pytorch#56843: the second would measure what the first left, and clip it again."""
    (p, q, r), (first, second), _ = shared(1.0, 1.0, flags=flags.items())
    if when == "later":
        second.param_groups[0]["params"][:] = [r]
        for _ in range(3):
            first.step()
            second.step()
            for each in (p, q, r):
                each.grad = torch.tensor([3.0, 4.0])
        second.param_groups[0]["params"][:] = [r, q]
        first.param_groups[0]["params"][:] = [q, p]
    first.step()
    before = copies(nn.ParameterList([p, q, r]))
    with pytest.raises(DoubleClippingError, match="two optimizers share a parameter"):
        second.step()
    assert_unchanged(nn.ParameterList([p, q, r]), before)


def test_a_shared_parameter_with_a_backward_pass_for_each_is_fine():
    """As an encoder that an actor and a critic train, one after the other."""
    (p, q, r), (first, second), handles = shared(1.0, 1.0)
    for optimizer in (first, second, first, second):
        for each in (p, q, r):
            each.grad = torch.tensor([3.0, 4.0])
        optimizer.step()
    assert [float(handle.last.norm_pre) for handle in handles] == pytest.approx([50**0.5] * 2)


def test_a_shared_parameter_may_be_measured_twice():
    _, (first, second), handles = shared(1.0, ObserveClip())
    first.step()
    second.step()
    assert float(handles[1].last.norm_pre) == pytest.approx((25 + 0.5) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("part", [slice(0, 1), slice(3, 4), slice(1, 3)])
@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("what", ["norm", "value", "with norm"])
def test_a_function_that_clips_a_part_is_found(module, part, settled, what):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    attach(optimizer, 1.0)
    if settled:
        for _ in range(2):
            backward(module)
            optimizer.step()
            optimizer.zero_grad()
    backward(module)
    some = list(module.parameters())[part]
    {
        "norm": lambda: gradclip.clip_grad_norm_(some, 0.5),
        "value": lambda: gradclip.clip_grad_value_(some, 0.5),
        "with norm": lambda: gradclip.clip_grads_with_norm_(some, 0.5, 100.0),
    }[what]()
    before = copies(module)
    with pytest.raises(DoubleClippingError, match="clip_grad_norm_, clip_grads_with_norm_ or"):
        optimizer.step()
    assert_unchanged(module, before)


def test_marks_keep_no_gradient_and_no_clipper_alive(module):
    clipper = GradientClipper(module, 0.5)
    backward(module)
    clipper.clip()
    gradient, dead = weakref.ref(clipper), TensorWeakRef(module[0].weight.grad)
    del clipper
    module.zero_grad()
    GradientClipper(module, 0.5)
    backward(module)
    GradientClipper(module, 0.5).clip()
    gc.collect()
    assert dead() is None
    assert gradient() is None


def test_what_was_removed_is_not_kept_by_a_gradient_that_lives_on(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    gone = []
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        backward(module)
        with attach(optimizer, 0.5) as handle:
            optimizer.step()
        gone.append(weakref.ref(handle._step._role))
        del handle
    gc.collect()
    assert [each() for each in gone[:-1]] == [None, None]


def test_a_clipper_of_a_large_model_leaves_few_marks():
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(300)]
    clipper = GradientClipper(parameters, 1.0)
    for parameter in parameters:
        parameter.grad = torch.ones(1)
    clipper.clip()  # all of them at first, and where an owner came since
    for _ in range(2):
        clipper.clip()
        role = clipper._engine._role
        assert [len(marks) for marks in role.marks] == [1]
