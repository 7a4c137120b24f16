"""The optimizer's step as a hook: it steps, or it does not, and everything else follows that."""

import copy
from typing import TYPE_CHECKING, Any

from gradclip.clipping import withhold
from gradclip.clipping.flags import as_known
from gradclip.config import ClassType
from gradclip.errors import ArgumentValueError, warn
from gradclip.hook import HookContext
from gradclip.integrations.deepspeed import engine_of
from gradclip.integrations.wrapped import behind_accelerate
from gradclip.pipeline.hooks.mixin import PipelineHookArgs, PipelineHooks, PipelineHooksConfig
from gradclip.pipeline.shortcuts import step_scheduler, stepping

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["OptimizerHook", "OptimizerHookConfig"]


class OptimizerHook(PipelineHooks):
    """Steps the optimizer and the scheduler after ``on_step``, and drops the gradients.

    It does so where an accumulation window ends, and only if nothing failed. The step itself
    stands inside ``on_optimizer_step``. A step whose clipping was skipped, or that the loss scaler
    skips, changes neither weights nor moments nor the scheduler. One number is read from the
    device per step: whether to skip.

    What fails after the step does not undo it: the scheduler follows, and the gradients go.

    Where the accelerator has ``step_scheduler_with_optimizer=False``, the scheduler also steps with
    the batches that end no window.

    DeepSpeed's engine steps by itself. There the hook tells whether it did, and the scheduler
    follows, unless that is the engine's too.

    Args:
        cfg: Has nothing to say yet.
    """

    def __init__(self, cfg: "OptimizerHookConfig | None" = None) -> None:  # noqa: ARG002
        super().__init__()
        self._engine_steps = 0
        self._undo_scheduler: Callable[[], None] | None = None
        self._warned = False
        self.register_hook(
            "on_step",
            HookContext.from_callable("optimizer step", self._before_step, self._after_step),
        )

    def _before_step(self, arg: PipelineHookArgs) -> None:
        arg.is_optimizer_step_committed = arg.is_optimizer_step_settled = False
        engine = engine_of(arg.accelerator, arg.model)
        self._engine_steps = 0 if engine is None else engine.global_steps

    def _after_step(self, arg: PipelineHookArgs) -> None:
        # DeepSpeed's engine steps at the end of the backward pass, and before what failed after it.
        engine = engine_of(arg.accelerator, arg.model)
        if arg.exception is not None:
            if engine is not None and engine.global_steps > self._engine_steps:
                made = engine.was_step_applied()
                arg.is_optimizer_step_committed, arg.is_optimizer_step_settled = made, True
                _follow(arg, drop=False)
            return
        if arg.optimizer is None:
            raise ArgumentValueError(
                "OptimizerHook steps arg.optimizer, which is None. Give "
                "PipelineHookArgs(optimizer=...) to begin()."
            )
        if not arg.is_optimizer_step_boundary:
            if engine is None and arg.lr_scheduler is not None:
                self._step_scheduler_alone(arg)
            return
        # Through arg.hooks, so that every hook of the pipeline sees the step.
        try:
            with (arg.hooks or self).begin("on_optimizer_step", arg), arg.stop.held():
                made = _step(arg, arg.optimizer) if engine is None else engine.was_step_applied()
                arg.is_optimizer_step_committed, arg.is_optimizer_step_settled = made, True
        finally:
            if arg.is_optimizer_step_settled:
                self._undo_scheduler = None
                with arg.stop.held():
                    _follow(arg, drop=engine is None)

    def _step_scheduler_alone(self, arg: PipelineHookArgs) -> None:
        """Step the scheduler with a batch that ends no window, if the accelerator says so."""
        accelerator = arg.accelerator
        if accelerator is None or accelerator.step_scheduler_with_optimizer:
            return
        if not self._warned:
            self._warned = True
            warn(
                "the accelerator has step_scheduler_with_optimizer=False, so the scheduler steps "
                f"with every batch, {accelerator.gradient_accumulation_steps} times for each step "
                "of the optimizer. For one step each, make the accelerator without it."
            )
        with arg.stop.held():
            if self._undo_scheduler is None:
                self._undo_scheduler = _undoing(arg.lr_scheduler, arg.optimizer)
            step_scheduler(accelerator, arg.lr_scheduler)

    def take_back(self) -> None:
        """Bring the scheduler back to where the broken window began."""
        undo, self._undo_scheduler = self._undo_scheduler, None
        if undo is not None:
            undo()


class OptimizerHookConfig(PipelineHooksConfig[OptimizerHook]):
    """The configuration of ``OptimizerHook``."""

    class_type: ClassType[OptimizerHook] = OptimizerHook


def _follow(arg: PipelineHookArgs, *, drop: bool) -> None:
    """Step the scheduler with the optimizer, and drop the gradients that were stepped on."""
    try:
        if arg.is_optimizer_step_committed and arg.lr_scheduler is not None:
            step_scheduler(arg.accelerator, arg.lr_scheduler)
    finally:
        if drop and arg.optimizer is not None:
            # Not through Accelerate's wrapper: at a boundary it does the same, and slower.
            behind_accelerate(arg.optimizer).zero_grad()


def _undoing(scheduler: Any, optimizer: Any) -> "Callable[[], None]":
    """Return what brings a scheduler, and the learning rates, back to now."""
    state = copy.deepcopy(scheduler.state_dict())
    rates = [copy.copy(group["lr"]) for group in optimizer.param_groups]

    def undo() -> None:
        scheduler.load_state_dict(state)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    return undo


def _step(arg: PipelineHookArgs, optimizer: "torch.optim.Optimizer") -> bool:
    """Step unless the gradients may not be stepped on; return whether the weights changed."""
    result = arg.clip_result
    scaler = None if arg.accelerator is None else arg.accelerator.scaler
    if scaler is None:
        withheld = False if result is None else as_known(result.withheld)
        if withheld is not True:
            inner = stepping(arg.accelerator, optimizer)
            with withhold(inner, withheld):
                inner.step()
        return not bool(withheld)  # read behind the step: a device need not be idle before it
    # The scaler skips whatever overflowed, so its answer is read with ours: one number.
    found = False if result is None else result.skipped | (result.nonfinite > 0)
    withheld = as_known(found)
    # Accelerate does not notice that a fused optimizer skipped; the scale does.
    unnoticed = result is None and all(group.get("fused") for group in optimizer.param_groups)
    scale = scaler.get_scale() if unnoticed else 0.0
    with withhold(optimizer, withheld):
        # Also when skipped: the scaler must learn of the overflow.
        optimizer.step()
    skipped_by_scaler = getattr(optimizer, "step_was_skipped", False) or (
        unnoticed and scaler.get_scale() < scale
    )
    return not (bool(withheld) or skipped_by_scaler)
