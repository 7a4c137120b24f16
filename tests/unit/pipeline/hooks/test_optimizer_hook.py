from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from gradclip.clipping import flags
from gradclip.errors import ArgumentValueError, TooManySkipsError
from gradclip.pipeline.hooks import (
    GradientClippingHookConfig,
    HookContext,
    OptimizerHook,
    OptimizerHookConfig,
    PipelineHookArgs,
    PipelineHooks,
)
from gradclip.pipeline.hooks import optimizer as optimizer_module

NAN = float("nan")


def run(layer, optimizer=None, hooks=None, **fields):
    optimizer = optimizer or torch.optim.SGD(layer.parameters(), lr=1.0)
    return PipelineHookArgs(model=layer, optimizer=optimizer, **fields), PipelineHooks.from_hooks(
        hooks or OptimizerHookConfig()
    )


def step(hooks, arg, *values):
    with hooks.begin("on_step", arg):
        arg.model.weight.grad = torch.tensor([values])


@pytest.mark.smoke
def test_it_steps_optimizer_and_scheduler_and_drops_the_gradients(linear):
    layer = linear([1.0, 1.0])
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    arg, hooks = run(layer, optimizer, lr_scheduler=scheduler)
    step(hooks, arg, 0.25, 0.5)
    assert layer.weight.tolist() == [[0.75, 0.5]]
    assert layer.weight.grad is None
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert arg.is_optimizer_step_committed


def test_it_needs_no_scheduler_but_an_optimizer():
    with (
        pytest.raises(ArgumentValueError, match=r"arg\.optimizer"),
        OptimizerHook().begin("on_step", PipelineHookArgs()),
    ):
        pass


def test_it_opens_the_optimizer_step_of_the_whole_pipeline(linear):
    layer = linear([1.0, 1.0])
    seen = []
    hooks = PipelineHooks.from_hooks(OptimizerHook())
    hooks.register_hook(
        "on_optimizer_step",
        HookContext.from_callable(
            before=lambda arg: seen.append(
                (layer.weight.tolist(), arg.is_optimizer_step_committed)
            ),
            after=lambda arg: seen.append(
                (
                    layer.weight.tolist(),
                    arg.is_optimizer_step_committed,
                    arg.model.weight.grad.tolist(),
                )
            ),
        ),
    )
    arg, _ = run(layer)
    step(hooks, arg, 0.5, 1.0)
    assert seen == [([[1.0, 1.0]], False), ([[0.5, 0.0]], True, [[0.5, 1.0]])]


def test_it_opens_its_own_channel_where_there_is_no_pipeline(linear):
    hook, seen = OptimizerHook(), []
    hook.register_hook("on_optimizer_step", HookContext.from_callable(before=seen.append))
    arg, _ = run(linear([1.0, 1.0]))
    arg.model.weight.grad = torch.tensor([[1.0, 1.0]])
    hook.hooks["on_step"][0].after(arg)
    assert seen == [arg]
    assert arg.model.weight.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("where", ["body", "before", "after", "optimizer step"])
def test_nothing_steps_after_anything_failed(linear, where):
    """The original steps on the partial gradients of a failed forward or backward."""
    layer = linear([1.0, 1.0])
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def fail(arg):
        raise KeyError

    hooks = PipelineHooks()
    if where in ("before", "after"):
        hooks.register_hook("on_step", HookContext.from_callable(**{where: fail}))
    if where == "optimizer step":
        hooks.register_hook("on_optimizer_step", HookContext.from_callable(before=fail))
    hooks += OptimizerHook()
    if where == "body":
        hooks.register_hook("on_batch", HookContext.from_callable(before=fail))
    arg, _ = run(layer, optimizer, lr_scheduler=scheduler)
    layer.weight.grad = torch.tensor([[1.0, 1.0]])
    with (
        pytest.raises(KeyError),
        hooks.begin("on_step", arg),
        hooks.begin("on_batch", arg.copy_with_updates()),
    ):
        pass
    assert layer.weight.tolist() == [[1.0, 1.0]]
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert not arg.is_optimizer_step_committed


def test_it_acts_where_the_accumulation_window_ends(linear):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    layer = linear([1.0, 1.0])
    arg, hooks = run(layer, accelerator=accelerator)
    with accelerator.accumulate(layer):
        step(hooks, arg, 0.25, 0.5)
    assert layer.weight.tolist() == [[1.0, 1.0]]
    assert layer.weight.grad.tolist() == [[0.25, 0.5]]
    assert not arg.is_optimizer_step_committed
    with accelerator.accumulate(layer):
        step(hooks, arg, 0.5, 1.0)
    assert layer.weight.tolist() == [[0.5, 0.0]]
    assert arg.is_optimizer_step_committed
    with accelerator.accumulate(layer):
        step(hooks, arg, 0.5, 1.0)
    assert not arg.is_optimizer_step_committed


@pytest.mark.parametrize("stepped", [True, False])
def test_an_engine_that_has_stepped_when_something_fails_has_made_the_step(
    linear, monkeypatch, stepped
):
    """DeepSpeed's steps at the end of the backward pass."""

    class Engine:
        global_steps = 3

        def was_step_applied(self):
            return True

    engine = Engine()
    monkeypatch.setattr(optimizer_module, "engine_of", lambda accelerator, model: engine)
    layer = linear([1.0, 1.0])
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.step()  # or the scheduler warns
    arg, hooks = run(layer, optimizer, lr_scheduler=scheduler)

    def fail():
        with hooks.begin("on_step", arg):
            engine.global_steps += stepped
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert arg.is_optimizer_step_settled == arg.is_optimizer_step_committed == stepped
    assert optimizer.param_groups[0]["lr"] == (0.5 if stepped else 1.0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("order", [1, -1])
def test_a_skipped_step_changes_nothing(linear, weights, kind, fused, order):
    layer = linear([1.0, 1.0])
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(layer.parameters(), lr=0.1, fused=fused, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    clip = GradientClippingHookConfig(clip_mode="norm", max_norm=1.0)
    arg, hooks = run(
        layer, optimizer, [clip, OptimizerHookConfig()][::order], lr_scheduler=scheduler
    )

    step(hooks, arg, NAN, 1.0)
    assert weights(layer) == weights(linear([1.0, 1.0]))
    assert optimizer.state_dict()["state"] == {}

    step(hooks, arg, 1.0, 1.0)
    assert arg.is_optimizer_step_committed
    after_one = weights(layer)
    state = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in optimizer.state_dict()["state"][0].items()
    }
    for bad in (NAN, float("inf")):
        step(hooks, arg, bad, 1.0)
        assert arg.clip_result.skipped
        assert not arg.is_optimizer_step_committed
        assert weights(layer) == after_one
        assert layer.weight.grad is None
        now = optimizer.state_dict()["state"][0]
        assert {
            name: torch.equal(torch.as_tensor(now[name]), torch.as_tensor(state[name]))
            for name in state
        } == dict.fromkeys(state, True)
    assert scheduler.last_epoch == 1
    step(hooks, arg, 1.0, 1.0)
    assert scheduler.last_epoch == 2
    assert weights(layer) != after_one


class Reads:
    """A result that counts how often its flag is read on the host."""

    def __init__(self):
        self.count = 0

    @property
    def withheld(self):
        self.count += 1
        return torch.tensor(False)


def test_one_number_is_read_per_step(linear):
    arg, hooks = run(linear([1.0, 1.0]))
    result = Reads()
    hooks.register_hook(
        "on_optimizer_step",
        HookContext.from_callable(before=lambda arg: setattr(arg, "clip_result", result)),
    )
    step(hooks, arg, 1.0, 1.0)
    assert result.count == 1


def scaled(layer, optimizer, scale=1024.0):
    """An accelerator with a loss scaler; on the CPU Accelerate makes none itself."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    return accelerator, accelerator.prepare_optimizer(optimizer)


CLIP = GradientClippingHookConfig(clip_mode="norm", max_norm=1.0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("hooks", [[CLIP, OptimizerHookConfig()], [OptimizerHookConfig(), CLIP]])
def test_gradients_are_unscaled_once_before_they_are_clipped(linear, hooks, fused):
    layer = linear([1.0, 1.0])
    accelerator, optimizer = scaled(layer, torch.optim.SGD(layer.parameters(), lr=1.0, fused=fused))
    arg, hooks = run(layer, optimizer, hooks, accelerator=accelerator)
    for number in (1, 2):
        with hooks.begin("on_step", arg):
            accelerator.backward((layer.weight * torch.tensor([[3.0, 4.0]])).sum())
        assert arg.clip_result.norm_pre == 5.0
        assert arg.is_optimizer_step_committed
        expected = torch.tensor([[1.0 - 0.6 * number, 1.0 - 0.8 * number]])
        torch.testing.assert_close(layer.weight.detach(), expected)


def test_gradients_that_the_loop_unscaled_are_not_unscaled_again(linear):
    layer = linear([1.0, 1.0])
    accelerator, optimizer = scaled(layer, torch.optim.SGD(layer.parameters(), lr=1.0))
    arg, hooks = run(layer, optimizer, [CLIP, OptimizerHook()], accelerator=accelerator)
    with hooks.begin("on_step", arg):
        accelerator.backward((layer.weight * torch.tensor([[0.3, 0.4]])).sum())
        accelerator.unscale_gradients()
    assert arg.clip_result.norm_pre == pytest.approx(0.5)
    torch.testing.assert_close(layer.weight.detach(), torch.tensor([[0.7, 0.6]]))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [[CLIP], []], ids=["clip", "no clip"])
def test_an_overflow_skips_the_step_and_lowers_the_scale(linear, weights, fused, clip):
    layer = linear([1.0, 1.0])
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9, fused=fused)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    accelerator, optimizer = scaled(layer, optimizer)
    scheduler = accelerator.prepare_scheduler(scheduler)
    hooks = [*clip, OptimizerHook()]
    arg, hooks = run(layer, optimizer, hooks, accelerator=accelerator, lr_scheduler=scheduler)

    def go(slope):
        with hooks.begin("on_step", arg):
            accelerator.backward((layer.weight * slope).sum())

    go(1.0)
    before, rate = weights(layer), optimizer.param_groups[0]["lr"]
    go(float("inf"))
    assert not arg.is_optimizer_step_committed
    assert accelerator.scaler.get_scale() == 512.0
    assert weights(layer) == before
    assert optimizer.param_groups[0]["lr"] == rate
    assert layer.weight.grad is None
    go(1.0)
    assert arg.is_optimizer_step_committed
    assert weights(layer) != before
    assert optimizer.param_groups[0]["lr"] == rate / 2


def test_overflows_do_not_count_until_the_scale_is_at_its_floor(linear):
    layer = linear([1.0, 1.0])
    accelerator, optimizer = scaled(layer, torch.optim.SGD(layer.parameters(), lr=1.0), scale=16.0)
    clip = GradientClippingHookConfig(clip_mode="norm", max_norm=1.0, max_consecutive_skips=2)
    arg, hooks = run(layer, optimizer, [clip, OptimizerHook()], accelerator=accelerator)

    def overflow():
        with hooks.begin("on_step", arg):
            accelerator.backward((layer.weight * float("inf")).sum())

    for scale in (8.0, 4.0, 2.0, 1.0):
        overflow()
        assert accelerator.scaler.get_scale() == scale
    overflow()
    overflow()
    with pytest.raises(TooManySkipsError):
        overflow()


def test_the_scale_is_read_only_after_a_step_that_was_not_made(linear, monkeypatch):
    layer = linear([1.0, 1.0])
    accelerator, optimizer = scaled(layer, torch.optim.SGD(layer.parameters(), lr=0.01))
    arg, hooks = run(layer, optimizer, [CLIP, OptimizerHook()], accelerator=accelerator)
    reads = []
    scale = accelerator.scaler.get_scale
    monkeypatch.setattr(accelerator.scaler, "get_scale", lambda: reads.append(1) or scale())

    def go(slope):
        with hooks.begin("on_step", arg):
            accelerator.backward((layer.weight * slope).sum())

    for _ in range(3):
        go(1.0)
    assert reads == []
    go(float("inf"))
    assert reads == []
    go(1.0)
    assert len(reads) == 1
    go(1.0)
    assert len(reads) == 1


@pytest.mark.parametrize("skipped", [False, True])
def test_a_fused_step_is_queued_before_the_verdict_is_read(monkeypatch, skipped):
    """Else the device would be idle between the two."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.ones(3, 2)).sum().backward()
    optimizer.step()  # one that never stepped is not called under a flag
    before = model.weight.detach().clone()
    done = []
    monkeypatch.setattr(flags, "host_waits_for", lambda device: True)
    read = torch.Tensor.__bool__
    fused = torch._fused_adamw_
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: done.append("read") or read(self))
    monkeypatch.setattr(
        torch,
        "_fused_adamw_",
        lambda *given, **named: done.append("step") or fused(*given, **named),
    )
    result = SimpleNamespace(withheld=torch.tensor(skipped))
    arg = PipelineHookArgs(model=model, optimizer=optimizer, clip_result=result)
    with OptimizerHook().begin("on_step", arg):
        pass
    assert done == ["step", "read"]
    assert arg.is_optimizer_step_committed is not skipped
    assert torch.equal(model.weight, before) is skipped
