"""Evaluation during training, as a hook."""

from collections.abc import Callable
from typing import Any, Self

from pydantic import Field, model_validator
from torch import nn

from gradclip.config import ClassType
from gradclip.errors import ArgumentValueError
from gradclip.hook import HookContext
from gradclip.pipeline.hooks.mixin import PipelineHookArgs, PipelineHooks, PipelineHooksConfig
from gradclip.pipeline.modes import evaluating, evaluating_optimizer

__all__ = ["ValidationHook", "ValidationHookConfig"]


class ValidationHook(PipelineHooks):
    """Calls a function with the model in evaluation mode, every so many steps or epochs.

    An optimizer with a mode of its own, as schedule-free ones have, is in evaluation mode too.

    Args:
        cfg: When, and what is called. After an error it is not.
    """

    def __init__(self, cfg: "ValidationHookConfig") -> None:
        super().__init__()
        self.cfg = cfg
        name = "validation"
        if cfg.step_eval_freq is not None:
            self.register_hook("on_step", HookContext.from_callable(name, after=self._after_step))
        if cfg.epoch_eval_freq is not None:
            self.register_hook("on_epoch", HookContext.from_callable(name, after=self._after_epoch))
        if cfg.eval_at_begin:
            self.register_hook("on_loop", HookContext.from_callable(name, before=self.evaluate))

    def evaluate(self, arg: PipelineHookArgs) -> None:
        """Evaluate ``arg.model`` now.

        Raises:
            ArgumentValueError: ``arg.model`` is None.
        """
        if arg.model is None:
            raise ArgumentValueError(
                "ValidationHook evaluates arg.model, which is None. Give "
                "PipelineHookArgs(model=...) to begin()."
            )
        with evaluating_optimizer(arg.optimizer), evaluating(arg.model):
            self.cfg.eval_callback(arg.model)

    def _after_step(self, arg: PipelineHookArgs) -> None:
        self._evaluate_at(arg, arg.global_step_id, self.cfg.step_eval_freq)

    def _after_epoch(self, arg: PipelineHookArgs) -> None:
        if not arg.stop.agreed:  # or the epoch is not at its end
            self._evaluate_at(arg, arg.epoch_id, self.cfg.epoch_eval_freq)

    def _evaluate_at(self, arg: PipelineHookArgs, number: int, frequency: int | None) -> None:
        if arg.exception is None and frequency is not None and (number + 1) % frequency == 0:
            self.evaluate(arg)


class ValidationHookConfig(PipelineHooksConfig[ValidationHook]):
    """When the model is evaluated, and by what; at least one frequency is needed."""

    class_type: ClassType[ValidationHook] = ValidationHook
    eval_callback: Callable[[nn.Module], Any]
    """Called with the model; a function has no place in a file, so this configuration has none."""
    step_eval_freq: int | None = Field(default=None, ge=1)
    """Evaluate after every so many batches."""
    epoch_eval_freq: int | None = Field(default=None, ge=1)
    """Evaluate after every so many epochs."""
    eval_at_begin: bool = False
    """Evaluate before the first step too."""

    @model_validator(mode="after")
    def _some_frequency(self) -> Self:
        if self.step_eval_freq is None and self.epoch_eval_freq is None:
            raise ValueError(
                "either step_eval_freq or epoch_eval_freq must be specified: nothing else says "
                "when to evaluate"
            )
        return self
