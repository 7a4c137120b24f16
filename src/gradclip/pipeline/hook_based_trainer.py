"""A trainer that hooks drive: it goes through the data, and everything else is a hook."""

import logging
from collections.abc import Iterable
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn
from torch.optim import Optimizer

from gradclip.config import Config
from gradclip.errors import ArgumentTypeError, ArgumentValueError, MissingDependencyError

try:
    from accelerate import Accelerator
except ImportError as _error:
    raise MissingDependencyError(
        "the trainer runs on Accelerate, which is not installed\n  pip install 'gradclip[pipeline]'"
    ) from _error

from gradclip.integrations.loss_scaling import begin_anew
from gradclip.integrations.wrapped import behind_accelerate
from gradclip.pipeline.absent import warn_of_idle
from gradclip.pipeline.arguments import (
    NOT_GIVEN,
    arranged,
    check_accelerator,
    check_complete,
    check_kinds,
    check_limits,
    one,
)
from gradclip.pipeline.batch_processor import BatchProcessorMixin
from gradclip.pipeline.checkpoint.data_position import DataPosition
from gradclip.pipeline.checkpoint.progress import TrainerProgressState
from gradclip.pipeline.checkpoint.resuming import resumed_path
from gradclip.pipeline.checkpoint.training_state import load_training_state
from gradclip.pipeline.deepspeed import (
    refuse_a_broken_window,
    refuse_checkpoints,
)
from gradclip.pipeline.hooks.checkpoint import SaveCheckpoint
from gradclip.pipeline.hooks.grad_clip import GradientClippingHook, GradientClippingHookConfig
from gradclip.pipeline.hooks.mixin import (
    PipelineHookArgs,
    PipelineHooks,
    PipelineHooksConfig,
    PipelineHooksLike,
)
from gradclip.pipeline.hooks.validation import ValidationHook, ValidationHookConfig
from gradclip.pipeline.modes import switch_optimizer
from gradclip.pipeline.preparation import prepared
from gradclip.pipeline.processes import default_accelerator
from gradclip.pipeline.shortcuts import accumulating
from gradclip.pipeline.stopping import StopRequest, noting_signals, raise_for_signal

__all__ = [
    "GradientClippingHookConfig",
    "HookBasedTrainer",
    "PipelineHookOrConfigType",
    "ResumeCheckpointConfig",
    "ValidationHookConfig",
]

logger = logging.getLogger(__name__)

PipelineHookOrConfigType: TypeAlias = PipelineHooksConfig[Any] | PipelineHooks
"""A set of hooks, as itself or as its configuration."""


class ResumeCheckpointConfig(Config):
    """What a run resumes from."""

    resume_from: str
    """A checkpoint, or a folder of checkpoints, of which the last complete one is taken; or
    ``"auto"``: the folder of ``SaveCheckpoint`` if there is a checkpoint in it, else nothing."""
    cache_dir: str | None = None
    """Does nothing: a checkpoint is read where it is."""
    safe_serialization: bool = True
    """Does nothing: files are recognised by what they are."""

    def __post_init__(self) -> None:
        """Warn of fields that do nothing."""
        warn_of_idle(self, "cache_dir", "safe_serialization")


class HookBasedTrainer:
    """Trains a model; calling it runs the loop.

    .. code-block:: text

        on_loop
          on_epoch
            on_step                          for every batch
              on_batch
                on_model_forward             the batch processor
                on_model_backward
            after on_step: clip, then on_optimizer_step

    Model, dataloader, optimizer and scheduler are prepared with the accelerator, which also
    accumulates gradients. Hooks run in this order: ``grad_clip``, the optimizer's step,
    ``validation``, ``hooks``. An ``OptimizerHook`` among ``hooks`` takes the place of the trainer's
    own; ``validation`` then comes last. Checkpoint hooks are moved behind all others, so that what
    they save is the finished step.

    An optimizer step and the place in the data go together. When an error or Ctrl-C ends a call,
    what was stepped on is done. The next call, or a run that resumes, begins with the first batch
    that was not: with cleared gradients, and with the whole of its accumulation window. Hooks end a
    run by ``arg.request_stop()``; Ctrl-C and SIGTERM end it where an optimizer step ends, and are
    raised as ``KeyboardInterrupt`` and ``SystemExit`` when ``SaveCheckpoint`` has saved.

    Args:
        accelerator: Made by default.
        model: The model.
        dataloader: A DataLoader, or anything that can be iterated once per epoch. It and the
            optimizer may be None for a trainer that is never called.
        batch_processor: Runs forward and backward; see ``SimpleBatchProcessor``.
        optimizer: The optimizer of the model's parameters.
        lr_scheduler: Steps with every optimizer step that was made; None for none.
        hooks: Hooks, their configurations, and iterables of these.
        max_step: Batches, over all epochs, to stop after.
        max_epoch: Epochs to stop after. One of the two limits is needed.
        grad_clip: A ``GradientClippingHookConfig`` or hook; it may be among ``hooks`` instead.
        validation: A ``ValidationHookConfig`` or hook.
        resume_from: A checkpoint, a folder of them, or ``"auto"``, which starts or resumes; see
            ``ResumeCheckpointConfig``.

    Raises:
        ArgumentTypeError: GC011, an argument of the wrong kind, or missing.
        ArgumentValueError: GC010, no limit, two optimizer hooks, or ``"auto"`` and nothing that
            saves.
        DoubleClippingError: GC101, two clipping hooks, or one that DeepSpeed cannot do.
        CheckpointError: GC301, there is nothing to resume from.
    """

    # The order of RoboOrchardLab's trainer, with a default for the first; what has no default of
    # its own is checked below.
    def __init__(
        self,
        accelerator: Accelerator | None = None,
        model: nn.Module = None,  # type: ignore[assignment]
        dataloader: Iterable[Any] | None = NOT_GIVEN,
        batch_processor: BatchProcessorMixin = None,  # type: ignore[assignment]
        optimizer: Optimizer | None = NOT_GIVEN,
        lr_scheduler: Any = None,
        hooks: PipelineHooksLike = None,
        max_step: int | None = None,
        max_epoch: int | None = None,
        grad_clip: PipelineHookOrConfigType | None = None,
        validation: PipelineHookOrConfigType | None = None,
        resume_from: "str | PathLike[str] | ResumeCheckpointConfig | None" = None,
    ) -> None:
        check_kinds(model, dataloader, batch_processor, optimizer, lr_scheduler)
        check_limits(max_step, max_epoch)
        self._resume_from = _as_text(resume_from)
        self.max_step = max_step
        self.max_epoch = max_epoch
        self.hooks = arranged(
            one("grad_clip", grad_clip, GradientClippingHook),
            one("validation", validation, ValidationHook),
            PipelineHooks.from_hooks(hooks).registered_sets,
        )
        self.accelerator = default_accelerator() if accelerator is None else accelerator
        check_accelerator(self.accelerator)
        if self._resume_from is not None:
            refuse_checkpoints(self.accelerator)
        checkpoints = [each for each in self.hooks.walk() if isinstance(each, SaveCheckpoint)]
        roots = [each.root(self.accelerator) for each in checkpoints if self._resume_from]
        resume_path = resumed_path(self._resume_from, roots, self.accelerator)

        self.model, self.optimizer, self.dataloader, self.lr_scheduler = prepared(
            self.accelerator, self.hooks, model, optimizer, dataloader, lr_scheduler
        )
        self.batch_processor = batch_processor
        batch_processor.prepare(self.accelerator)
        self._gave_back = False
        self._stop = StopRequest()
        self._checkpoints = checkpoints
        self._position = DataPosition(
            () if self.dataloader is None else self.dataloader,
            self._may_save,
            look_ahead=self.accelerator.gradient_accumulation_steps > 1,
        )
        self.trainer_progress_state = self._loaded(resume_path)
        self._arg = self._first_arg()

    def _loaded(self, path: Path | None) -> TrainerProgressState:
        """Load a checkpoint, if there is one to resume from, and return how far the run is."""
        if path is None:
            return TrainerProgressState()
        return load_training_state(
            path, self.accelerator, self.optimizer, self.hooks, self._position
        )

    def _first_arg(self) -> PipelineHookArgs:
        """Return what every hook is told of the run."""
        return PipelineHookArgs(
            accelerator=self.accelerator,
            max_epoch=self.max_epoch,
            max_step=self.max_step,
            start_epoch=self.trainer_progress_state.epoch_id,
            start_step=self.trainer_progress_state.step_id,
            dataloader=self.dataloader,
            model=self.model,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            data_position=self._position,
            resume_from=self._resume_from,
            stop=self._stop,
        )

    def __call__(self) -> None:
        """Train until a limit is reached; go on from where the last call ended.

        Raises:
            ArgumentTypeError: GC011, there is no dataloader, or no optimizer.
            ArgumentValueError: GC010, the dataloader yields no batch; or, under DeepSpeed, an
                error ended the last call and may have left gradients behind.
            KeyboardInterrupt: Ctrl-C was pressed.
            SystemExit: SIGTERM was sent.
        """
        check_complete(self.dataloader, self.optimizer)
        self._begin()
        progress = self.trainer_progress_state
        self._log(f"BEGIN TRAINING from epoch {progress.epoch_id} and step {progress.step_id}")
        tell = self.accelerator.is_local_main_process
        try:
            with (
                noting_signals(self._stop, tell=tell),
                self.hooks.begin("on_loop", self._new_arg()) as loop_arg,
            ):
                self._loop(loop_arg)
        finally:
            switch_optimizer(self.optimizer, train=False)
        raise_for_signal(self._stop.wanted)  # one that came when the loop was at its end
        clipping = [each for each in self.hooks.walk() if isinstance(each, GradientClippingHook)]
        clipped = "".join(
            f"; {each.stats.clipped} of {each.stats.steps} optimizer steps were clipped"
            for each in clipping
        )
        self._log(
            f"FINISH TRAINING after {progress.epoch_id} epochs and {progress.global_step_id} steps"
            f"{clipped}"
        )

    def _log(self, message: str) -> None:
        if self.accelerator.is_main_process:
            logger.info(message)

    def _begin(self) -> None:
        """Put model, optimizer and gradients in the state that training begins with."""
        progress = self.trainer_progress_state
        self._stop.clear()
        self.model.train()
        switch_optimizer(self.optimizer, train=True)
        if self._gave_back:
            refuse_a_broken_window(self.accelerator)
            self._gave_back = False
        # Whatever ran with this accelerator or model before left its window and gradients behind.
        self.accelerator.step = progress.micro_step_id
        if progress.micro_step_id == 0:
            behind_accelerate(self.optimizer).zero_grad()
            begin_anew(self.accelerator.scaler)

    def _loop(self, loop_arg: PipelineHookArgs) -> None:
        progress = self.trainer_progress_state
        self._position.restore()
        while not (
            progress.is_training_end(self.max_step, self.max_epoch)
            or self._stop.agree(self.accelerator, wait=True)
        ):
            try:
                with self.hooks.begin("on_epoch", self._new_arg()) as epoch_arg:
                    if self._epoch(epoch_arg):
                        # Before the hooks after it: the data is at the next epoch already.
                        progress.update_epoch()
            finally:
                progress.sync_pipeline_hook_arg(loop_arg)
        self._stop.agree(self.accelerator, wait=True)
        raise_for_signal(self._stop.agreed)

    def _epoch(self, epoch_arg: PipelineHookArgs) -> bool:
        """Train on the rest of an epoch; return False if it was cut short."""
        progress = self.trainer_progress_state
        try:
            for batch in self._position.epoch():
                arg = self._new_arg()
                try:
                    self._step(arg, batch)
                except BaseException:
                    if arg.is_optimizer_step_settled:
                        self._count(arg)
                    raise
                self._count(arg)
                progress.sync_pipeline_hook_arg(epoch_arg)
                if self._is_cut(arg):
                    self._position.stop(progress.micro_step_id)
                    return False
        except BaseException:
            with self._stop.held():
                self._gave_back = self._position.give_back(progress.drop_window())
                for hooks in self.hooks.walk() if self._gave_back else ():
                    hooks.take_back()
            progress.sync_pipeline_hook_arg(epoch_arg)
            raise
        if progress.step_id == 0:
            raise ArgumentValueError(
                f"the dataloader yielded no batch in epoch {progress.epoch_id}, so training would "
                "never end. An iterator can be gone through once: give a DataLoader, a list, or "
                "another object that can be iterated once per epoch."
            )
        return True

    def _count(self, arg: PipelineHookArgs) -> None:
        """Count a batch that was trained on, here and in the data."""
        with self._stop.held():
            self._position.finish()
            self.trainer_progress_state.update_step(
                boundary=arg.is_optimizer_step_boundary, committed=arg.is_optimizer_step_committed
            )

    def _is_cut(self, arg: PipelineHookArgs) -> bool:
        """Whether the run ends after this batch."""
        at_limit = self.trainer_progress_state.is_training_end(self.max_step, None)
        # All processes ask at the same steps, so also at a limit.
        stopped = arg.is_optimizer_step_boundary and self._stop.agree(self.accelerator, wait=False)
        return at_limit or stopped

    def _step(self, arg: PipelineHookArgs, batch: Any) -> None:
        with (
            accumulating(self.accelerator, self.model, last=self._position.is_last),
            self.hooks.begin("on_step", arg),
            self.hooks.begin("on_batch", arg.copy_with_updates(batch=batch)) as batch_arg,
        ):
            self.batch_processor(
                pipeline_hooks=self.hooks, on_batch_hook_args=batch_arg, model=self.model
            )
            arg.model_outputs = batch_arg.model_outputs
            arg.reduce_loss = batch_arg.reduce_loss

    def _new_arg(self) -> PipelineHookArgs:
        return self._arg.copy_with_updates(**vars(self.trainer_progress_state))

    def _may_save(self) -> bool:
        """Whether a checkpoint is due after the next batch."""
        step = self.trainer_progress_state.global_step_id
        return step + 1 == self.max_step or any(each.is_due(step) for each in self._checkpoints)


def _as_text(
    resume_from: "str | PathLike[str] | ResumeCheckpointConfig | None",
) -> str | None:
    if isinstance(resume_from, ResumeCheckpointConfig):
        return resume_from.resume_from
    if resume_from is None or isinstance(resume_from, str | PathLike):
        return None if resume_from is None else fspath(resume_from)
    raise ArgumentTypeError(
        f'resume_from is of type {type(resume_from).__qualname__}: expected a path, "auto", or a '
        "ResumeCheckpointConfig"
    )
