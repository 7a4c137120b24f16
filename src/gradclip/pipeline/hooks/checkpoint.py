"""Checkpoints as a hook: when they are taken."""

import logging
import os
import shlex
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from gradclip.config import ClassType
from gradclip.errors import ArgumentValueError, warn
from gradclip.hook import HookContext
from gradclip.pipeline.absent import refusing, warn_of_idle
from gradclip.pipeline.checkpoint import store as checkpoint_store
from gradclip.pipeline.checkpoint.progress import TrainerProgressState
from gradclip.pipeline.checkpoint.resuming import AUTO, refuse_another_run
from gradclip.pipeline.checkpoint.training_state import (
    check_checkpointable,
    hooks_state,
    keepable,
    save_training_state,
)
from gradclip.pipeline.hooks.mixin import (
    PipelineHookArgs,
    PipelineHooks,
    PipelineHooksConfig,
    falls_on,
)
from gradclip.pipeline.modes import evaluating_optimizer
from gradclip.pipeline.processes import together

if TYPE_CHECKING:
    from accelerate import Accelerator

    from gradclip.pipeline.stopping import StopRequest

__all__ = ["SaveCheckpoint", "SaveCheckpointConfig"]

__getattr__ = refusing(__name__)

logger = logging.getLogger(__name__)


class SaveCheckpoint(PipelineHooks):
    """Writes checkpoints that training resumes from exactly.

    A checkpoint is taken at optimizer-step boundaries: one that falls due within an accumulation
    window waits for its end. After an error none is taken, but after Ctrl-C and SIGTERM one is, and
    standard error is told how to go on. It must come after the optimizer's step: the trainer places
    it behind all other hooks, and a loop of your own registers it last.

    A run that starts from scratch is refused where there are checkpoints of another one.

    Args:
        cfg: Where and when.
    """

    def __init__(self, cfg: "SaveCheckpointConfig") -> None:
        super().__init__()
        self.cfg = cfg
        self.save_root = cfg.save_root
        self.save_epoch_freq = cfg.save_epoch_freq
        self.save_step_freq = cfg.save_step_freq
        self._due = False
        self._saved: TrainerProgressState | None = None
        self._place: Path | None = None
        self._run: StopRequest | None = None
        name = "save checkpoint"
        self.register_hook("on_step", HookContext.from_callable(name, after=self._on_step_end))
        self.register_hook("on_epoch", HookContext.from_callable(name, after=self._on_epoch_end))
        self.register_hook(
            "on_loop", HookContext.from_callable(name, self._before_loop, self._on_loop_end)
        )

    def is_due(self, global_step_id: int) -> bool:
        """Whether a checkpoint is wanted after this batch."""
        return self._due or falls_on(self.save_step_freq, global_step_id)

    def save(self, arg: PipelineHookArgs, progress: TrainerProgressState) -> None:
        """Write a checkpoint now.

        Args:
            arg: The argument of the hook that is under way.
            progress: How far the run is when that hook is done.

        Raises:
            ArgumentValueError: GC010, there is no accelerator, or nothing says where to save.
        """
        accelerator = _accelerator(arg)
        root = self.root(accelerator)
        progress = keepable(accelerator, progress)
        with evaluating_optimizer(arg.optimizer):
            self._place = checkpoint_store.write(
                root,
                progress,
                partial(save_training_state, arg=arg, progress=progress),
                keep_last=_kept(self.cfg, accelerator),
                main=accelerator.is_main_process,
                together=partial(together, accelerator),
            )
        self._due, self._saved = False, progress

    def _before_loop(self, arg: PipelineHookArgs) -> None:
        # What cannot be saved is better known now than after the first hour.
        accelerator = _accelerator(arg)
        root = self.root(accelerator)
        _check_one_limit(arg.hooks, accelerator)
        check_checkpointable(accelerator)
        _warn_of_workers(arg.dataloader)
        with together(accelerator):
            # A run goes on after an error, or was resumed by a loop of the user's own.
            goes_on = arg.stop is self._run or (arg.resume_from is None and arg.global_step_id > 0)
            hooks_state(arg.hooks)
            if accelerator.is_main_process and not goes_on:
                refuse_another_run(root, arg.resume_from)
        self._run = arg.stop  # every run has one of its own
        self._due, self._place = False, None
        # Where a run resumes need not be written again.
        self._saved = TrainerProgressState.of(arg) if arg.global_step_id else None

    def _on_step_end(self, arg: PipelineHookArgs) -> None:
        self._due = self.is_due(arg.global_step_id)
        if self._due and arg.exception is None and arg.is_optimizer_step_boundary:
            self.save(arg, TrainerProgressState.after_step(arg))
            self._say(arg, f"step {arg.global_step_id}")

    def _on_epoch_end(self, arg: PipelineHookArgs) -> None:
        cut = arg.data_position is not None and arg.data_position.batches > 0
        if arg.exception is not None or cut or not falls_on(self.save_epoch_freq, arg.epoch_id):
            return
        if not arg.is_optimizer_step_boundary:
            self._due = True
            return
        progress = TrainerProgressState.of(arg)
        progress.update_epoch()
        self.save(arg, progress)
        self._say(arg, f"epoch {arg.epoch_id}")

    def _on_loop_end(self, arg: PipelineHookArgs) -> None:
        interrupted = _was_interrupted(arg)
        wanted = interrupted or (self.cfg.save_when_loop_end and arg.exception is None)
        progress = TrainerProgressState.of(arg)
        if interrupted and not progress.global_step_id:  # there is nothing to go on with
            return
        if wanted and progress != self._saved:
            self.save(arg, progress)
            self._say(arg, "training, which was interrupted," if interrupted else "training")
        if interrupted and _accelerator(arg).is_main_process:
            _say_how_to_go_on(self._place, self.root(_accelerator(arg)), arg.resume_from)

    def _say(self, arg: PipelineHookArgs, what: str) -> None:
        if self._place is not None and _accelerator(arg).is_main_process:
            logger.info("Save checkpoint at the end of %s to %s", what, self._place)

    def root(self, accelerator: "Accelerator") -> Path:
        """Return the folder that checkpoints go to.

        Raises:
            ArgumentValueError: GC010, nothing says where.
        """
        if self.save_root is not None:
            return Path(self.save_root)
        if accelerator.project_dir is None:
            raise ArgumentValueError(
                "nothing says where checkpoints go: set save_root, or make the accelerator with "
                "project_dir"
            )
        return Path(accelerator.project_dir) / "checkpoints"


class SaveCheckpointConfig(PipelineHooksConfig[SaveCheckpoint]):
    """Where checkpoints go, when they are taken, and how many are kept."""

    class_type: ClassType[SaveCheckpoint] = SaveCheckpoint
    save_root: str | None = None
    """The folder of this run's checkpoints; None for ``checkpoints`` in the accelerator's
    ``project_dir``."""
    save_epoch_freq: int | None = Field(default=1, ge=1)
    """Save at the end of every so many epochs."""
    save_step_freq: int | None = Field(default=None, ge=1)
    """Save after every so many batches."""
    save_when_loop_end: bool = True
    """Save when training ends, if that was not just done; one of the frequencies is needed too."""
    keep_last: int | None = Field(default=3, ge=1)
    """How many checkpoints to keep, the last ones; None for all. Where it is left out and the
    accelerator names checkpoints (``automatic_checkpoint_naming``), its ``total_limit`` counts."""
    save_model: bool = True
    """Does nothing: the weights are in every checkpoint, in ``model.safetensors``."""

    def __post_init__(self) -> None:
        """Warn of a field that does nothing."""
        warn_of_idle(self, "save_model")

    @model_validator(mode="after")
    def _some_time(self) -> Self:
        if self.save_epoch_freq is None and self.save_step_freq is None:
            raise ValueError(
                "either save_epoch_freq or save_step_freq must be specified: a run that is killed "
                "before its end would have saved nothing"
            )
        return self


def _warn_of_workers(dataloader: object) -> None:
    """Warn of workers whose random numbers a run that resumes does not repeat."""
    if getattr(dataloader, "persistent_workers", False) and getattr(dataloader, "num_workers", 0):
        warn(
            "the dataloader has persistent_workers=True: what its workers draw from random "
            "generators goes on from epoch to epoch, and a run that resumes draws other numbers. "
            "Its batches come in the same order. For an exact resume set it to False."
        )


def _kept(cfg: "SaveCheckpointConfig", accelerator: "Accelerator") -> int | None:
    """Return how many checkpoints to keep; None for all."""
    project = accelerator.project_configuration
    if "keep_last" in cfg.model_fields_set or not project.automatic_checkpoint_naming:
        return cfg.keep_last
    return project.total_limit  # type: ignore[no-any-return]


def _check_one_limit(hooks: PipelineHooks | None, accelerator: "Accelerator") -> None:
    """Refuse hooks that save to one folder and keep different numbers: the lowest would count.

    Raises:
        ArgumentValueError: GC010, there are some.
    """
    limits: dict[Path, int | None] = {}
    for each in () if hooks is None else hooks.walk():
        if isinstance(each, SaveCheckpoint):
            root, kept = each.root(accelerator).resolve(), _kept(each.cfg, accelerator)
            if limits.setdefault(root, kept) != kept:
                raise ArgumentValueError(
                    f"two SaveCheckpoint hooks save to {root}, one with keep_last={limits[root]} "
                    f"and one with keep_last={kept}, so one would remove what the other keeps: "
                    "give each a save_root of its own"
                )


def _accelerator(arg: PipelineHookArgs) -> "Accelerator":
    """Return what a checkpoint is saved through.

    Raises:
        ArgumentValueError: GC010, there is none.
    """
    if arg.accelerator is None:
        raise ArgumentValueError(
            "SaveCheckpoint saves through arg.accelerator, which is None. Give "
            "PipelineHookArgs(accelerator=...) to begin()."
        )
    return arg.accelerator


def _was_interrupted(arg: PipelineHookArgs) -> bool:
    """Whether Ctrl-C or SIGTERM ended the run, on every process."""
    if arg.stop.at_once:
        return False
    if arg.stop.agreed in (signal.SIGINT, signal.SIGTERM):
        return isinstance(arg.exception, KeyboardInterrupt | SystemExit)
    # One that was raised without a signal, say in a hook: on one process alone, for nobody knows
    # where the others are.
    return isinstance(arg.exception, KeyboardInterrupt) and _accelerator(arg).num_processes == 1


def _say_how_to_go_on(place: Path | None, root: Path, resume_from: str | None) -> None:
    command = shlex.join(sys.orig_argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        command = "the command that started all processes"
    how = "" if resume_from == AUTO else f'with resume_from="{root}" (or "auto"), '
    sys.stderr.write(f"saved {place or root}\nto go on, {how}run again: {command}\n")
