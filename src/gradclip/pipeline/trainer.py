"""RoboOrchardLab's older trainer: the same run, with its settings as arguments."""

import weakref
from collections.abc import Iterable
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from typing_extensions import deprecated

from gradclip.errors import ArgumentValueError, warn
from gradclip.pipeline.batch_processor import BatchProcessorMixin
from gradclip.pipeline.hook_based_trainer import HookBasedTrainer, ResumeCheckpointConfig
from gradclip.pipeline.hooks.grad_clip import GradientClippingHookConfig
from gradclip.pipeline.hooks.mixin import PipelineHooksLike
from gradclip.pipeline.hooks.validation import ValidationHookConfig
from gradclip.pipeline.modes import evaluating, evaluating_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["HookBasedTrainer", "ResumeCheckpointConfig", "SimpleTrainer"]


@deprecated("SimpleTrainer is deprecated: use HookBasedTrainer")
class SimpleTrainer(HookBasedTrainer):
    """What RoboOrchardLab's scripts train with: clipping and validation are arguments.

    It is there so that these scripts run; new ones use ``HookBasedTrainer``.

    Args:
        model: The model.
        accelerator: Prepares the objects of the run.
        batch_processor: Runs forward and backward.
        dataloader: A DataLoader, or anything that can be iterated once per epoch; None, with
            ``optimizer``, for a trainer that only evaluates.
        optimizer: The optimizer of the model's parameters.
        lr_scheduler: Steps with the optimizer; None for none.
        lr_scheduler_step_at: ``"step"``.
        max_step: Batches, over all epochs, to stop after.
        max_epoch: Epochs to stop after. One of the two limits is needed.
        val_dataloader: What ``eval`` goes through.
        metric: Has ``update(batch, model_outputs)``, ``compute()`` and ``reset()``; ``compute``
            is given ``accelerator=`` if it takes that.
        step_eval_freq: Evaluate after every so many batches.
        epoch_eval_freq: Evaluate after every so many epochs.
        resume_from: A checkpoint, a folder of them, or ``"auto"``.
        resume_share_dir: Does nothing: a checkpoint is read where it is.
        grad_clip_mode: ``"norm"`` or ``"value"``; None for no clipping.
        grad_clip_value: The limit of ``"value"``.
        grad_max_norm: The limit of ``"norm"``.
        grad_norm_type: The p of the norm.
        hooks: Hooks, their configurations, and iterables of these.

    Raises:
        ArgumentValueError: GC010, ``lr_scheduler_step_at`` is not ``"step"``.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: "Accelerator",
        batch_processor: BatchProcessorMixin,
        dataloader: Iterable[Any] | None,
        optimizer: torch.optim.Optimizer | None,
        lr_scheduler: Any,
        lr_scheduler_step_at: Literal["step"] = "step",
        max_step: int | None = None,
        max_epoch: int | None = None,
        val_dataloader: Iterable[Any] | None = None,
        metric: Any = None,
        step_eval_freq: int | None = None,
        epoch_eval_freq: int | None = None,
        resume_from: str | None = None,
        resume_share_dir: str | None = None,
        grad_clip_mode: Literal["norm", "value"] | None = None,
        grad_clip_value: float | None = None,
        grad_max_norm: float | None = None,
        grad_norm_type: float = 2,
        hooks: PipelineHooksLike = None,
    ) -> None:
        if lr_scheduler_step_at != "step":
            raise ArgumentValueError(
                f"lr_scheduler_step_at = {lr_scheduler_step_at!r} is not supported: the scheduler "
                'steps with the optimizer ("step")'
            )
        if resume_share_dir is not None and resume_from is not None:
            warn("resume_share_dir does nothing: a checkpoint is read where it is")
        grad_clip = validation = None
        if grad_clip_mode is not None:
            grad_clip = GradientClippingHookConfig(
                clip_mode=grad_clip_mode,
                clip_value=grad_clip_value,
                max_norm=grad_max_norm,
                norm_type=grad_norm_type,
            )
        if val_dataloader is not None:
            this = weakref.ref(self)  # the hook must not keep its trainer

            def evaluate(model: nn.Module) -> None:  # noqa: ARG001 - it is the trainer's
                trainer = this()
                assert trainer is not None
                trainer.eval()

            validation = ValidationHookConfig(
                eval_callback=evaluate,
                step_eval_freq=step_eval_freq,
                epoch_eval_freq=epoch_eval_freq,
            )
        super().__init__(
            accelerator,
            model,
            dataloader,
            batch_processor,
            optimizer,
            lr_scheduler,
            hooks=hooks,
            max_step=max_step,
            max_epoch=max_epoch,
            grad_clip=grad_clip,
            validation=validation,
            resume_from=resume_from,
        )
        self.metric = metric
        self.val_dataloader = (
            None if val_dataloader is None else self.accelerator.prepare(val_dataloader)
        )

    @torch.no_grad()
    def eval(self) -> Any:
        """Go through ``val_dataloader`` with the model in evaluation mode.

        Returns:
            What ``metric.compute()`` returned; the metric is reset after that.

        Raises:
            ArgumentValueError: GC010, there is no ``val_dataloader``, or no ``metric``.
        """
        if self.val_dataloader is None or self.metric is None:
            raise ArgumentValueError("eval() needs val_dataloader and metric, and one is None")
        takes_accelerator = "accelerator" in signature(self.metric.compute).parameters
        self._log("BEGIN EVAL")
        with evaluating_optimizer(self.optimizer), evaluating(self.model):
            for number, batch in enumerate(self.val_dataloader, 1):
                self.metric.update(batch, self.model(batch))
                if number % 10 == 0:
                    self._log(f"eval: {number}")
            self.accelerator.wait_for_everyone()
            given = {"accelerator": self.accelerator} if takes_accelerator else {}
            result = self.metric.compute(**given)
            self.accelerator.wait_for_everyone()
            self.metric.reset()
        return result
