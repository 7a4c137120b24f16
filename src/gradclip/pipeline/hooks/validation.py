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
        self.step_eval_freq = cfg.step_eval_freq
        self.epoch_eval_freq = cfg.epoch_eval_freq
        self._after_epoch = False
        name = "validation"
        if cfg.step_eval_freq is not None:
            self.register_hook("on_step", HookContext.from_callable(name, after=self._on_step_end))
        if cfg.epoch_eval_freq is not None:
            self.register_hook(
                "on_epoch", HookContext.from_callable(name, after=self._on_epoch_end)
            )
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

    def need_eval(self, arg: PipelineHookArgs) -> bool:
        """Whether to evaluate now, after a step or after an epoch; a subclass may decide it."""
        number, frequency = arg.global_step_id, self.step_eval_freq
        if self._after_epoch:
            number, frequency = arg.epoch_id, self.epoch_eval_freq
        return frequency is not None and (number + 1) % frequency == 0

    def _on_step_end(self, arg: PipelineHookArgs) -> None:
        self._after_epoch = False
        self._evaluate_if_needed(arg)

    def _on_epoch_end(self, arg: PipelineHookArgs) -> None:
        self._after_epoch = True
        if not arg.stop.agreed:  # or the epoch is not at its end
            self._evaluate_if_needed(arg)

    def _evaluate_if_needed(self, arg: PipelineHookArgs) -> None:
        if arg.exception is None and self.need_eval(arg):
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
