"""GradientClippingHook in loops that are written by hand, as the original's users write them."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from gradclip import ClipResult, NormClip
from gradclip.errors import (
    ArgumentValueError,
    DoubleClippingError,
    NonFiniteGradientError,
    StateError,
    TooManySkipsError,
)
from gradclip.pipeline.hooks import (
    GradientClippingHook,
    GradientClippingHookConfig,
    HookContext,
    OptimizerHook,
    OptimizerHookConfig,
    PipelineHookArgs,
    PipelineHooks,
)

CLIP = GradientClippingHookConfig(clip_mode="norm", max_norm=1.0)


def arguments(layer, **fields):
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    return PipelineHookArgs(model=layer, optimizer=optimizer, **fields)


def give(layer, *values):
    layer.weight.grad = torch.tensor([values])


def step(hooks, arg, *values):
    """One step whose gradient is known."""
    with hooks.begin("on_step", arg):
        give(arg.model, *values)
    return arg


@pytest.mark.smoke
def test_it_is_used_as_in_the_original():
    """hooks as a list of configurations, FIFO, begin as a context manager that yields the arg."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    hooks = PipelineHooks.from_hooks([CLIP, OptimizerHookConfig()])
    moved = []
    for number in range(3):
        arg = PipelineHookArgs(
            accelerator=accelerator,
            global_step_id=number,
            model=model,
            optimizer=optimizer,
            lr_scheduler=scheduler,
        )
        before = [parameter.detach().clone() for parameter in model.parameters()]
        rate = optimizer.param_groups[0]["lr"]
        with hooks.begin("on_step", arg) as given:
            assert given is arg
            accelerator.backward(100 * model(torch.ones(2, 3)).sum())
        steps = [a - b.detach() for a, b in zip(before, model.parameters(), strict=True)]
        moved.append(float(torch.cat([each.flatten() for each in steps]).norm()) / rate)
        assert arg.clip_result.norm_pre > 100
        assert [parameter.grad for parameter in model.parameters()] == [None, None]
    assert moved == pytest.approx([1.0, 1.0, 1.0], rel=1e-5)
    assert optimizer.param_groups[0]["lr"] == 0.5 * 0.5**3


@pytest.mark.parametrize("order", ["clip first", "optimizer first"])
def test_it_clips_in_either_order_of_registration(linear, order):
    """Registered after the optimizer hook, the original never clips anything, silently."""
    hooks = [CLIP(), OptimizerHook()]
    if order == "optimizer first":
        hooks.reverse()
    hooks = PipelineHooks.from_hooks(hooks)
    arg = arguments(linear())
    for number in range(1, 3):
        step(hooks, arg, 3.0, 4.0)
        assert arg.clip_result.norm_pre == 5.0
        expected = torch.tensor([[-0.6, -0.8]]) * number
        torch.testing.assert_close(arg.model.weight.detach(), expected)


@pytest.mark.smoke
@pytest.mark.parametrize("order", ["clip first", "optimizer first"])
def test_it_clips_once_per_step(linear, order):
    hooks = [CLIP(), OptimizerHook()]
    if order == "optimizer first":
        hooks.reverse()
    arg = arguments(linear())
    clipping = next(hook for hook in hooks if isinstance(hook, GradientClippingHook))
    hooks = PipelineHooks.from_hooks(hooks)
    for _ in range(3):
        step(hooks, arg, 3.0, 4.0)
    assert clipping.clipper.step == 3


def test_it_clips_without_an_optimizer_hook(linear):
    arg = arguments(linear())
    step(CLIP(), arg, 3.0, 4.0)
    torch.testing.assert_close(arg.model.weight.grad, torch.tensor([[0.6, 0.8]]))
    assert isinstance(arg.clip_result, ClipResult)
    assert arg.clip_result.clipped


def test_it_clips_by_value(linear):
    arg = arguments(linear())
    step(GradientClippingHookConfig(clip_mode="value", clip_value=3.5)(), arg, -9.0, 2.0)
    assert arg.model.weight.grad.tolist() == [[-3.5, 2.0]]


@pytest.mark.parametrize("norm_type", [1.0, 3.0, float("inf")])
def test_it_clips_by_other_norms(linear, norm_type):
    arg = arguments(linear())
    step(
        GradientClippingHookConfig(clip_mode="norm", max_norm=0.5, norm_type=norm_type)(),
        arg,
        3.0,
        4.0,
    )
    grad = arg.model.weight.grad
    assert torch.linalg.vector_norm(grad, norm_type) == pytest.approx(0.5, rel=2e-6)
    torch.testing.assert_close(grad / grad.norm(), torch.tensor([[0.6, 0.8]]))


def test_policies_by_pattern_find_the_names_in_the_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    config = GradientClippingHookConfig(
        policy={"*.bias": None, "0.*": 1.0, "*": NormClip(max_norm=2.0)}
    )
    arg = arguments(model)
    with config().begin("on_step", arg):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 10.0)
    norms = {name: float(p.grad.norm()) for name, p in model.named_parameters()}
    assert norms["0.weight"] == pytest.approx(1.0)
    assert norms["1.weight"] == pytest.approx(2.0)
    assert norms["0.bias"] == norms["1.bias"] == pytest.approx(200**0.5)
    assert set(arg.clip_result.groups) == {"0.*", "*"}


def test_parameters_that_are_frozen_or_outside_the_optimizer_do_not_count(linear):
    model = nn.ModuleList([linear(), linear(), linear()])
    model[1].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([*model[0].parameters(), *model[1].parameters()], lr=1.0)
    arg = PipelineHookArgs(model=model, optimizer=optimizer)
    with CLIP().begin("on_step", arg):
        give(model[0], 3.0, 4.0)
        give(model[2], 30.0, 40.0)
    assert arg.clip_result.norm_pre == 5.0
    assert model[2].weight.grad.tolist() == [[30.0, 40.0]]


def test_it_does_nothing_inside_an_accumulation_window(linear):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    arg = arguments(linear(), accelerator=accelerator)
    hook = CLIP()
    with accelerator.accumulate(arg.model):
        step(hook, arg, 3.0, 4.0)
        assert arg.clip_result is None
    assert arg.model.weight.grad.tolist() == [[3.0, 4.0]]
    with accelerator.accumulate(arg.model):
        step(hook, arg, 3.0, 4.0)
        assert arg.clip_result is not None
    torch.testing.assert_close(arg.model.weight.grad, torch.tensor([[0.6, 0.8]]))


def test_it_does_nothing_after_an_error(linear):
    hooks, arg = PipelineHooks(), arguments(linear())
    hooks.register_hook("on_step", HookContext.from_callable(after=lambda arg: {}["no"]))
    hooks += CLIP()
    with pytest.raises(KeyError):
        step(hooks, arg, 3.0, 4.0)
    assert arg.model.weight.grad.tolist() == [[3.0, 4.0]]
    assert arg.clip_result is None


def test_it_needs_an_optimizer():
    with (
        pytest.raises(ArgumentValueError, match=r"arg\.optimizer"),
        CLIP().begin("on_step", PipelineHookArgs()),
    ):
        pass


def test_the_last_result_is_forgotten_as_a_step_begins(linear):
    hook, arg = CLIP(), arguments(linear())
    step(hook, arg, 3.0, 4.0)
    first = arg.clip_result
    with hook.begin("on_step", arg):
        assert arg.clip_result is None
        give(arg.model, 0.0, 0.5)
    assert arg.clip_result is not first
    assert not arg.clip_result.clipped


def test_a_loop_that_opens_only_the_optimizer_step_clips_every_time(linear):
    hook, arg = CLIP(), arguments(linear())
    for _ in range(3):
        give(arg.model, 3.0, 4.0)
        with hook.begin("on_optimizer_step", arg):
            torch.testing.assert_close(arg.model.weight.grad, torch.tensor([[0.6, 0.8]]))
    assert hook.clipper.step == 3


def test_two_clipping_hooks_are_an_error(linear):
    for hooks in (
        [CLIP(), CLIP()],
        [CLIP(), OptimizerHook(), CLIP()],
        [OptimizerHook(), CLIP(), CLIP()],
    ):
        arg = arguments(linear())
        with pytest.raises(DoubleClippingError, match="another hook"):
            step(PipelineHooks.from_hooks(hooks), arg, 3.0, 4.0)
        if not isinstance(hooks[1], OptimizerHook):
            assert arg.model.weight.tolist() == [[0.0, 0.0]]


def test_another_optimizer_is_bound_anew_and_keeps_the_history(linear):
    hook = GradientClippingHookConfig(clip_mode="norm", max_norm=1.0, max_consecutive_skips=1)()
    first, second = arguments(linear()), arguments(linear())
    step(hook, first, float("nan"), 1.0)
    bound = hook.clipper
    step(hook, second, 3.0, 4.0)
    assert hook.clipper is not bound
    assert hook.clipper.step == 2
    assert second.clip_result.norm_pre == 5.0
    step(hook, first, float("nan"), 1.0)
    with pytest.raises(TooManySkipsError):
        step(hook, second, float("nan"), 1.0)


def test_a_parameter_that_joins_the_optimizer_is_clipped(linear):
    hook, arg = CLIP(), arguments(linear())
    step(hook, arg, 3.0, 4.0)
    late = linear()
    arg.optimizer.add_param_group({"params": late.parameters()})
    with hook.begin("on_step", arg):
        give(arg.model, 3.0, 0.0)
        give(late, 0.0, 4.0)
    assert arg.clip_result.norm_pre == 5.0
    torch.testing.assert_close(late.weight.grad, torch.tensor([[0.0, 0.8]]))


def test_nonfinite_gradients_can_raise(linear):
    hook = GradientClippingHookConfig(clip_mode="norm", max_norm=1.0, nonfinite="raise")()
    hooks = PipelineHooks.from_hooks([OptimizerHook(), hook])
    arg = arguments(linear([1.0, 2.0]))
    with pytest.raises(NonFiniteGradientError):
        step(hooks, arg, float("inf"), 1.0)
    assert arg.model.weight.tolist() == [[1.0, 2.0]]
    assert isinstance(arg.exception, NonFiniteGradientError)


def test_its_state_can_be_loaded_before_there_is_a_clipper(linear):
    hook, arg = CLIP(), arguments(linear())
    assert hook.state_dict() == {}
    step(hook, arg, 3.0, 4.0)
    state = hook.state_dict()
    assert state["step"] == 1

    again = CLIP()
    again.load_state_dict(state)
    assert again.state_dict() == state
    step(again, arg, 3.0, 4.0)
    assert again.clipper.step == 2
    again.load_state_dict(state)
    assert again.clipper.step == 1


def test_the_state_of_another_policy_is_refused(linear):
    hook, arg = CLIP(), arguments(linear())
    step(hook, arg, 3.0, 4.0)
    other = GradientClippingHookConfig(clip_mode="value", clip_value=1.0)()
    other.load_state_dict(hook.state_dict())
    with pytest.raises(StateError):
        step(other, arg, 3.0, 4.0)


def test_a_subclass_may_add_hooks_of_its_own(linear):
    class Logged(GradientClippingHook):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.norms = []
            self.register_hook(
                "on_step",
                HookContext.from_callable(
                    after=lambda arg: self.norms.append(float(arg.clip_result.norm_pre))
                ),
            )

    hook = Logged(CLIP)
    step(hook, arguments(linear()), 3.0, 4.0)
    assert hook.norms == [5.0]
