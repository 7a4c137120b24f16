"""Checkpoints as a hook: when they are taken."""

from functools import partial
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from gradclip.config import ClassType
from gradclip.errors import ArgumentValueError
from gradclip.hook import HookContext
from gradclip.pipeline.checkpoint import store as checkpoint_store
from gradclip.pipeline.checkpoint.progress import TrainerProgressState
from gradclip.pipeline.checkpoint.training_state import (
    check_checkpointable,
    keepable,
    save_training_state,
)
from gradclip.pipeline.hooks.mixin import PipelineHookArgs, PipelineHooks, PipelineHooksConfig
from gradclip.pipeline.processes import together

__all__ = ["SaveCheckpoint", "SaveCheckpointConfig"]


class SaveCheckpoint(PipelineHooks):
    """Writes checkpoints that training resumes from exactly.

    A checkpoint is taken at optimizer-step boundaries: one that falls due within an accumulation
    window waits for its end. After an error none is taken. It must come after the optimizer's
    step: the trainer places it behind all other hooks, and a loop of your own registers it last.

    Args:
        cfg: Where and when.
    """

    def __init__(self, cfg: "SaveCheckpointConfig") -> None:
        super().__init__()
        self.cfg = cfg
        self._due = False
        self._saved: TrainerProgressState | None = None
        name = "save checkpoint"
        self.register_hook("on_step", HookContext.from_callable(name, after=self._after_step))
        self.register_hook("on_epoch", HookContext.from_callable(name, after=self._after_epoch))
        self.register_hook(
            "on_loop", HookContext.from_callable(name, self._before_loop, self._after_loop)
        )

    def is_due(self, global_step_id: int) -> bool:
        """Whether a checkpoint is wanted after this batch."""
        return self._due or _falls_on(self.cfg.save_step_freq, global_step_id)

    def save(self, arg: PipelineHookArgs, progress: TrainerProgressState) -> None:
        """Write a checkpoint now.

        Args:
            arg: The argument of the hook that is under way.
            progress: How far the run is when that hook is done.

        Raises:
            ArgumentValueError: GC010, there is no accelerator, or nothing says where to save.
        """
        root = self._root(arg)
        assert arg.accelerator is not None
        progress = keepable(arg.accelerator, progress)
        checkpoint_store.write(
            root,
            progress,
            partial(save_training_state, arg=arg, progress=progress),
            keep_last=self.cfg.keep_last,
            main=arg.accelerator.is_main_process,
            together=partial(together, arg.accelerator),
        )
        self._due, self._saved = False, progress

    def _before_loop(self, arg: PipelineHookArgs) -> None:
        # What cannot be saved is better known now than after the first hour.
        self._root(arg)
        if arg.accelerator is not None:
            check_checkpointable(arg.accelerator)
        self._due = False
        # Where a run resumes need not be written again.
        self._saved = TrainerProgressState.of(arg) if arg.global_step_id else None

    def _after_step(self, arg: PipelineHookArgs) -> None:
        self._due = self.is_due(arg.global_step_id)
        if self._due and arg.exception is None and arg.is_optimizer_step_boundary:
            self.save(arg, TrainerProgressState.after_step(arg))

    def _after_epoch(self, arg: PipelineHookArgs) -> None:
        cut = arg.data_position is not None and arg.data_position.batches > 0
        if (
            arg.exception is not None
            or cut
            or not _falls_on(self.cfg.save_epoch_freq, arg.epoch_id)
        ):
            return
        if not arg.is_optimizer_step_boundary:
            self._due = True
            return
        progress = TrainerProgressState.of(arg)
        progress.update_epoch()
        self.save(arg, progress)

    def _after_loop(self, arg: PipelineHookArgs) -> None:
        progress = TrainerProgressState.of(arg)
        if self.cfg.save_when_loop_end and arg.exception is None and progress != self._saved:
            self.save(arg, progress)

    def _root(self, arg: PipelineHookArgs) -> Path:
        if arg.accelerator is None:
            raise ArgumentValueError(
                "SaveCheckpoint saves through arg.accelerator, which is None. Give "
                "PipelineHookArgs(accelerator=...) to begin()."
            )
        if self.cfg.save_root is not None:
            return Path(self.cfg.save_root)
        if arg.accelerator.project_dir is None:
            raise ArgumentValueError(
                "nothing says where checkpoints go: set save_root, or make the accelerator with "
                "project_dir"
            )
        return Path(arg.accelerator.project_dir) / "checkpoints"


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
    """Save when training ends, if that was not just done."""
    keep_last: int | None = Field(default=3, ge=1)
    """How many checkpoints to keep, the last ones; None for all."""

    @model_validator(mode="after")
    def _some_time(self) -> Self:
        never = self.save_epoch_freq is None and self.save_step_freq is None
        if never and not self.save_when_loop_end:
            raise ValueError(
                "save_epoch_freq and save_step_freq are None and save_when_loop_end is false, so "
                "nothing would ever be saved"
            )
        return self


def _falls_on(frequency: int | None, number: int) -> bool:
    return frequency is not None and (number + 1) % frequency == 0
