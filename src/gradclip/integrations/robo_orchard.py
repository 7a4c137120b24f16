"""Clips in RoboOrchardLab's own trainer: gradclip's hook behind the face of one of its hooks.

Its trainer adds what ``grad_clip`` builds, then its ``OptimizerHook``, which steps optimizer and
scheduler after every batch, whatever happened in it. So the hook here decides before that, and
where nothing may be stepped on it stands in for both, for that one step.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch

from gradclip.clipping import ClipResult, withhold
from gradclip.config import ClassType
from gradclip.errors import ArgumentValueError, MissingDependencyError
from gradclip.integrations.wrapped import behind_accelerate
from gradclip.pipeline.hooks import grad_clip, mixin

try:
    from robo_orchard_lab.pipeline.hooks import mixin as theirs
except ImportError as error:
    raise MissingDependencyError(
        f"RoboOrchardLab cannot be imported ({error})\n"
        "  pip install robo-orchard-lab==0.4.0 'transformers<5'"
    ) from error

__all__ = ["GradientClippingHook", "GradientClippingHookConfig", "PipelineHookArgs"]


@dataclass
class PipelineHookArgs(theirs.PipelineHookArgs):  # type: ignore[misc]
    """What their hooks are given around a step, with a place for what clipping did."""

    clip_result: ClipResult | None = None
    """None before clipping, and where nothing was clipped."""


class GradientClippingHook(theirs.PipelineHooks):  # type: ignore[misc]
    """Clips the gradients of the optimizer's parameters before their ``OptimizerHook`` steps.

    What it clips, and when, is as in ``gradclip.pipeline.hooks.GradientClippingHook``. The result
    is on the ``clip_result`` of the ``on_step`` arg. A step on a NaN or an infinity is not made,
    nor is one after an error in the batch: weights, moments and the scheduler stay as they are.
    One number is read from the device per step: whether to skip.

    Args:
        cfg: What to clip to.

    Raises:
        ArgumentValueError: GC010, in ``optimizer.step()``: it would come before clipping, because
            this hook was not passed as the trainer's ``grad_clip``. No step is made.
    """

    def __init__(self, cfg: "GradientClippingHookConfig") -> None:
        super().__init__()
        self.clip_mode = cfg.clip_mode
        self.clip_value = cfg.clip_value
        self.max_norm = cfg.max_norm
        self.norm_type = cfg.norm_type
        self._clipping = grad_clip.GradientClippingHook(cfg)
        self._arg = mixin.PipelineHookArgs()
        self._step: Any = None
        self._outer_error: BaseException | None = None
        self._guarded: torch.optim.Optimizer | None = None
        self.register_hook(
            "on_step",
            theirs.HookContext.from_callable(
                "clip gradients", before=self._before_step, after=self._after_step
            ),
        )

    def _before_step(self, arg: Any) -> None:
        # Their dataclass has no such field, and copies itself from its attributes.
        if type(arg) is theirs.PipelineHookArgs:
            arg.__class__ = PipelineHookArgs
        arg.clip_result = None
        # Their hooks are not told of an error, but run while it is being handled.
        self._outer_error = sys.exception()
        self._guard(arg.optimizer)
        self._arg = mixin.PipelineHookArgs(
            accelerator=arg.accelerator, model=arg.model, optimizer=arg.optimizer
        )
        self._step = self._clipping.begin("on_step", self._arg)
        self._step.__enter__()

    def _after_step(self, arg: Any) -> None:
        error = sys.exception()
        outer, self._outer_error = self._outer_error, None
        if error is not None and error is not outer:
            _hold(arg, "optimizer", "lr_scheduler")
            self._leave_step(error)
            # An error that was kept would keep its frames alive, and the tensors in them.
            self._arg = mixin.PipelineHookArgs()
            return
        self._leave_step(None)
        arg.clip_result = self._arg.clip_result
        if arg.clip_result is not None:
            self._decide(arg, arg.clip_result)

    def _leave_step(self, error: BaseException | None) -> None:
        step, self._step = self._step, None
        if step is not None:
            step.__exit__(None if error is None else type(error), error, None)

    def _decide(self, arg: Any, result: ClipResult) -> None:
        scaled = arg.accelerator.scaler is not None
        skipped = bool(result.skipped | (result.nonfinite > 0) if scaled else result.withheld)
        if skipped:
            _hold(arg, "lr_scheduler")
            if scaled:
                # The scaler must learn of the overflow, from a step that finds no gradients.
                with withhold(arg.optimizer, skipped):
                    pass
            else:
                _hold(arg, "optimizer")
        self._arg.is_optimizer_step_committed = not skipped
        with self._clipping.begin("on_optimizer_step", self._arg):
            pass

    def _guard(self, optimizer: Any) -> None:
        """Refuse, from now on, the optimizer's steps on gradients that are not clipped yet."""
        inner = None if optimizer is None else behind_accelerate(optimizer)
        if inner is not self._guarded and isinstance(inner, torch.optim.Optimizer):
            inner.register_step_pre_hook(self._refuse_unclipped)
            self._guarded = inner

    def _refuse_unclipped(self, *_: Any) -> None:
        if self._step is None:
            return
        error = ArgumentValueError(
            "the optimizer is about to step on gradients that are not clipped yet: "
            "RoboOrchardLab's OptimizerHook runs before the hooks of hooks=. Pass the "
            "configuration to the trainer as grad_clip=. No step was made."
        )
        self._leave_step(error)
        raise error


class GradientClippingHookConfig(grad_clip.GradientClippingHookConfig):
    """What RoboOrchardLab's trainer takes as ``grad_clip``; the fields are those of gradclip's."""

    class_type: ClassType[GradientClippingHook] = GradientClippingHook


class _Held:
    """Stands on an arg for an object whose next ``step`` is not to be made, until that is asked."""

    def __init__(self, arg: Any, name: str) -> None:
        self._arg, self._name, self._held = arg, name, getattr(arg, name)

    def step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002, whatever step takes
        setattr(self._arg, self._name, self._held)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._held, name)


def _hold(arg: Any, *names: str) -> None:
    for name in names:
        if getattr(arg, name) is not None:
            setattr(arg, name, _Held(arg, name))
