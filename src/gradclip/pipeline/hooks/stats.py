"""Speed as a hook: samples per second, time left and learning rates go to the log."""

import logging
from collections import deque
from collections.abc import Iterable, Sized
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any

from pydantic import Field

from gradclip.config import ClassType
from gradclip.errors import ArgumentValueError
from gradclip.hook import HookContext
from gradclip.pipeline.hooks.mixin import (
    PipelineHookArgs,
    PipelineHooks,
    PipelineHooksConfig,
    falls_on,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["StatsMonitor", "StatsMonitorConfig"]

logger = logging.getLogger(__name__)


class StatsMonitor(PipelineHooks):
    """Logs how fast the training is, how long it will take, and its learning rates.

    The main process logs. ``LR/group<n>`` goes to the trackers of the accelerator.

    Args:
        cfg: How often.
    """

    def __init__(self, cfg: "StatsMonitorConfig") -> None:
        super().__init__()
        self.batch_size = cfg.batch_size
        self.steps_per_epoch = cfg.steps_per_epoch
        self.step_log_freq = cfg.step_log_freq
        self.epoch_log_freq = cfg.epoch_log_freq
        self.total_batch_size: int | None = None
        """Samples of a step, of all processes together."""
        self._step_times: deque[float] = deque(maxlen=cfg.window_size)
        self._step_began = self._epochs_began = monotonic()
        self._first_epoch = self._first_step = 0
        name = "stats monitor"
        self.register_hook("on_loop", HookContext.from_callable(name, self._on_loop_begin))
        self.register_hook("on_step", HookContext.from_callable(name, after=self._on_step_end))
        self.register_hook("on_epoch", HookContext.from_callable(name, after=self._on_epoch_end))

    def _on_loop_begin(self, arg: PipelineHookArgs) -> None:
        self._estimate_data_stats(arg.accelerator, arg.dataloader)
        self._step_times.clear()
        self._step_began = self._epochs_began = monotonic()
        self._first_epoch, self._first_step = arg.epoch_id, arg.global_step_id

    def _estimate_data_stats(
        self, accelerator: "Accelerator | None", dataloader: Iterable[Any] | None
    ) -> None:
        """Find out how many samples a step has, and how many steps an epoch.

        Raises:
            ArgumentValueError: GC010, the dataloader does not tell its batch size.
        """
        if self.total_batch_size is None:
            processes = 1 if accelerator is None else accelerator.num_processes
            if self.batch_size is None:
                self.batch_size = _batch_size(dataloader, processes)
            self.total_batch_size = self.batch_size * processes
        if self.steps_per_epoch is None and isinstance(dataloader, Sized):
            self.steps_per_epoch = len(dataloader)

    def _on_step_end(self, arg: PipelineHookArgs) -> None:
        if arg.exception is not None or not arg.is_main_process:
            return
        now = monotonic()
        self._step_times.append(now - self._step_began)
        self._step_began = now
        if not falls_on(self.step_log_freq, arg.global_step_id):
            return
        self._estimate_data_stats(arg.accelerator, arg.dataloader)
        assert self.total_batch_size is not None
        step_time = self._step_time()
        rates = _learning_rates(arg)
        if arg.accelerator is not None and rates:
            scalars = {f"LR/group{number}": rate for number, rate in enumerate(rates)}
            arg.accelerator.log(scalars, step=arg.global_step_id)
        done = arg.global_step_id + 1
        logger.info(
            "Epoch[%s] Step[%s] GlobalStep[%s] Training Speed: %.2f samples/sec across all "
            "devices.\tAverage Step Time: %.2f sec.\tEstimated Remaining Time: %s.\t%s",
            arg.epoch_id,
            arg.step_id,
            arg.global_step_id,
            self.total_batch_size / max(step_time, 1e-9),
            step_time,
            self._left(arg, done, arg.step_id + 1),
            _in_words(rates),
        )

    def _on_epoch_end(self, arg: PipelineHookArgs) -> None:
        if arg.exception is not None or arg.stop.agreed or not arg.is_main_process:
            return
        if self.steps_per_epoch is None:
            self.steps_per_epoch = arg.step_id
        if not falls_on(self.epoch_log_freq, arg.epoch_id):
            return
        self._estimate_data_stats(arg.accelerator, arg.dataloader)
        assert self.total_batch_size is not None
        now = monotonic()
        duration = now - self._epochs_began
        epochs = max(arg.epoch_id - self._first_epoch + 1, 1)
        steps = arg.global_step_id - self._first_step
        logger.info(
            "Epoch[%s] completed. Epoch Time: %.2f sec.\tAverage Training Speed: %s samples/sec "
            "across all devices.\tAverage Epoch Time: %.2f sec.\tAverage Step Time: %s sec.\t"
            "Estimated Remaining Time: %s.\t%s",
            arg.epoch_id,
            duration,
            f"{steps * self.total_batch_size / max(duration, 1e-9):.2f}" if steps > 0 else "N/A",
            duration / epochs,
            f"{duration / steps:.2f}" if steps > 0 else "N/A",
            self._left(arg, arg.global_step_id, arg.step_id),
            _in_words(_learning_rates(arg)),
        )
        self._epochs_began = now
        self._first_epoch, self._first_step = arg.epoch_id + 1, arg.global_step_id

    def _step_time(self) -> float:
        return sum(self._step_times) / max(len(self._step_times), 1)

    def _left(self, arg: PipelineHookArgs, done: int, done_in_epoch: int) -> str:
        """Say how long the run will take from here, if it can be known.

        Args:
            arg: Has the limits.
            done: Batches that are done.
            done_in_epoch: Those of this epoch among them.
        """
        left = [] if arg.max_step is None else [arg.max_step - done]
        if arg.max_epoch is not None:
            if self.steps_per_epoch is None:
                return "N/A"
            epochs = arg.max_epoch - arg.epoch_id
            left.append(epochs * self.steps_per_epoch - done_in_epoch)
        if not left or not self._step_times:
            return "N/A"
        return str(timedelta(seconds=int(max(min(left), 0) * self._step_time())))


class StatsMonitorConfig(PipelineHooksConfig[StatsMonitor]):
    """How often the speed is logged, and what the dataloader does not tell."""

    class_type: ClassType[StatsMonitor] = StatsMonitor
    batch_size: int | None = Field(default=None, ge=1)
    """Samples of a batch of one process; None to ask the dataloader."""
    steps_per_epoch: int | None = Field(default=None, ge=1)
    """Batches of an epoch; None to ask the dataloader."""
    step_log_freq: int = 512
    """Log after every so many batches; 0 for never."""
    epoch_log_freq: int = 1
    """Log after every so many epochs; 0 for never."""
    window_size: int = Field(default=128, ge=1)
    """Over how many batches the time of one is averaged."""


def _batch_size(dataloader: object, processes: int) -> int:
    # Accelerate's loaders know the samples of all processes together.
    total = getattr(dataloader, "total_batch_size", None)
    size = getattr(dataloader, "batch_size", None)
    if isinstance(total, int):
        return total // processes
    if isinstance(size, int):
        return size
    raise ArgumentValueError(
        f"StatsMonitor cannot see the batch size of the dataloader, a {type(dataloader).__name__}: "
        "set batch_size in StatsMonitorConfig"
    )


def _learning_rates(arg: PipelineHookArgs) -> list[float]:
    groups = [] if arg.optimizer is None else arg.optimizer.param_groups
    return [float(group["lr"]) for group in groups]


def _in_words(rates: list[float]) -> str:
    return "".join(f"Learning Rate Group {n}: {rate:.5e}.\t" for n, rate in enumerate(rates))
