"""Metrics as a hook: updated with every batch, computed and logged now and then."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import Field

from gradclip.config import ClassType
from gradclip.errors import ArgumentValueError
from gradclip.hook import HookContext
from gradclip.pipeline.hooks.mixin import (
    ModelOutput,
    PipelineHookArgs,
    PipelineHooks,
    PipelineHooksConfig,
    falls_on,
)

__all__ = ["MetricEntry", "MetricProtocol", "MetricTracker", "MetricTrackerConfig"]

logger = logging.getLogger(__name__)


@runtime_checkable
class MetricProtocol(Protocol):
    """What a metric has; those of torchmetrics do."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Take in a batch."""

    def compute(self) -> Any:
        """Return the value, over all processes if the metric is made so."""

    def reset(self) -> Any:
        """Forget everything."""


@dataclass
class MetricEntry:
    """A metric, and what its values are called.

    Args:
        names: One name, or one for each value that ``metric.compute()`` returns.
        metric: The metric.
    """

    names: Sequence[str] | str
    metric: MetricProtocol

    def __post_init__(self) -> None:
        """Make a list of one name."""
        self.names = _listed(self.names)

    def get(self) -> Iterable[tuple[str, Any]]:
        """Compute the metric.

        Returns:
            Pairs of a name and a value.

        Raises:
            ArgumentValueError: GC010, there are more names than values, or fewer.
        """
        values = _listed(self.metric.compute())
        if len(self.names) != len(values):
            raise ArgumentValueError(
                f"{type(self.metric).__name__}.compute() returned {len(values)} values for the "
                f"names {list(self.names)}: each value needs a name"
            )
        return zip(self.names, values, strict=True)


class MetricTracker(PipelineHooks):
    """Updates metrics with every batch and logs their values; subclass it for ``update_metric``.

    Where a metric is computed over all processes, all of them compute it.

    Args:
        cfg: Which metrics, how often they are logged, and when they are reset.
    """

    def __init__(self, cfg: "MetricTrackerConfig") -> None:
        super().__init__()
        self.metric_entrys: Sequence[MetricEntry] = _listed(cfg.metric_entrys)
        self.metrics = [entry.metric for entry in self.metric_entrys]
        self.reset_by = cfg.reset_by
        self.reset_freq = cfg.reset_freq
        self.step_log_freq = cfg.step_log_freq
        self.epoch_log_freq = cfg.epoch_log_freq
        self.log_main_process_only = cfg.log_main_process_only
        self._reset()
        name = "metric tracker"
        self.register_hook("on_loop", HookContext.from_callable(name, self._on_loop_begin))
        self.register_hook("on_batch", HookContext.from_callable(name, after=self._on_batch_end))
        self.register_hook("on_step", HookContext.from_callable(name, after=self._on_step_end))
        self.register_hook("on_epoch", HookContext.from_callable(name, after=self._on_epoch_end))

    def update_metric(self, batch: Any, model_outputs: ModelOutput) -> None:
        """Update ``self.metrics`` with a batch; a subclass says how.

        Args:
            batch: What the dataloader gave.
            model_outputs: What ``forward`` of the batch processor returned first.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not say how a batch updates its metrics: write "
            "update_metric(self, batch, model_outputs) in a subclass, and give the subclass as "
            "class_type"
        )

    def _reset(self) -> None:
        for metric in self.metrics:
            metric.reset()

    def _on_loop_begin(self, arg: PipelineHookArgs) -> None:
        for metric in self.metrics:
            if hasattr(metric, "to") and arg.accelerator is not None:
                metric.to(device=arg.accelerator.device)

    def _on_batch_end(self, arg: PipelineHookArgs) -> None:
        if arg.exception is not None:
            return
        if arg.model_outputs is None:
            raise ArgumentValueError(
                "MetricTracker updates its metrics with arg.model_outputs, which is None: return "
                "the outputs from forward"
            )
        self.update_metric(arg.batch, arg.model_outputs)

    def _on_step_end(self, arg: PipelineHookArgs) -> None:
        if arg.exception is not None:
            return
        if falls_on(self.step_log_freq, arg.step_id):
            where = f"Epoch[{arg.epoch_id}] Step[{arg.step_id}] GlobalStep[{arg.global_step_id}]: "
            self._log(where, is_main_process=arg.is_main_process)
        if self.reset_by == "step" and falls_on(self.reset_freq, arg.global_step_id):
            self._reset()

    def _on_epoch_end(self, arg: PipelineHookArgs) -> None:
        if arg.exception is not None or arg.stop.agreed:
            return
        if falls_on(self.epoch_log_freq, arg.epoch_id):
            self._log(f"Epoch[{arg.epoch_id}]: ", is_main_process=arg.is_main_process)
        if self.reset_by == "epoch" and falls_on(self.reset_freq, arg.epoch_id):
            self._reset()

    def _log(self, prefix: str = "", is_main_process: bool = True) -> None:
        values = [pair for entry in self.metric_entrys for pair in entry.get()]
        if is_main_process or not self.log_main_process_only:
            logger.info("%s%s", prefix, "".join(f"{n}[{_in_words(v)}] " for n, v in values))


class MetricTrackerConfig(PipelineHooksConfig[MetricTracker]):
    """Which metrics are tracked, and when they are logged and reset."""

    class_type: ClassType[MetricTracker] = MetricTracker
    metric_entrys: Sequence[MetricEntry] | MetricEntry
    """The metrics; an object has no place in a file, so this configuration has none."""
    reset_by: Literal["epoch", "step"] = "epoch"
    """Whether metrics are reset after epochs or after batches."""
    reset_freq: int = Field(default=1, ge=1)
    """Reset after every so many of them."""
    step_log_freq: int = 512
    """Log after every so many batches of an epoch; 0 for never."""
    epoch_log_freq: int = 1
    """Log after every so many epochs; 0 for never."""
    log_main_process_only: bool = True
    """Whether the main process alone logs."""


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _in_words(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else str(value)
