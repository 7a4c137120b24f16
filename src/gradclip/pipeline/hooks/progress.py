"""Progress as a hook: a bar on a terminal, and plain lines elsewhere."""

from collections.abc import Sized
from datetime import timedelta
from importlib import import_module
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field

from gradclip.config import ClassType
from gradclip.errors import MissingDependencyError
from gradclip.hook import HookContext
from gradclip.pipeline.hooks.mixin import PipelineHookArgs, PipelineHooks, PipelineHooksConfig

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from gradclip.clipping import ClipResult

__all__ = ["ProgressHook", "ProgressHookConfig"]

_INTERVAL_S = 0.1
"""The bar is drawn at most so often; between two drawings nothing is read from the device."""


class ProgressHook(PipelineHooks):
    """Shows while ``on_loop`` is open: steps, loss, norm before clipping, share clipped.

    On a terminal it draws a bar. Where there is none, as in the log of a cluster's job, it writes a
    line every so many seconds. Only the main process shows anything.

    Args:
        cfg: Whether to show it, and how often a line is written.
        console: Where to; standard error if it is left out.

    Raises:
        MissingDependencyError: GC401, rich is not installed.
    """

    def __init__(
        self, cfg: "ProgressHookConfig | None" = None, console: "Console | None" = None
    ) -> None:
        super().__init__()
        try:
            import_module("rich.progress")
            self._console = console or import_module("rich.console").Console(stderr=True)
        except ImportError as error:
            raise MissingDependencyError(
                "ProgressHook draws with rich, which is not installed\n"
                "  pip install 'gradclip[cli]'"
            ) from error
        self._cfg = ProgressHookConfig() if cfg is None else cfg
        self._display: _Display | None = None
        self._shown = float("-inf")
        self._results: list[ClipResult] = []
        self._counted = self._clipped = 0
        self._last: ClipResult | None = None
        self._loss: Tensor | None = None
        name = "progress"
        self.register_hook(
            "on_loop", HookContext.from_callable(name, self._before_loop, self._after_loop)
        )
        self.register_hook("on_step", HookContext.from_callable(name, after=self._after_step))
        self.register_hook(
            "on_optimizer_step",
            HookContext.from_callable(name, after=self._after_optimizer_step),
        )

    def _before_loop(self, arg: PipelineHookArgs) -> None:
        if not arg.is_main_process or self._cfg.enabled is False:
            return
        self._results, self._last, self._loss = [], None, None
        self._counted = self._clipped = 0
        self._shown = float("-inf")
        if self._console.is_terminal:
            self._display = _Bar(self._console, _total(arg), arg.global_step_id)
        else:
            interval_s = self._cfg.seconds_per_line
            self._display = _Lines(self._console, _total(arg), arg.global_step_id, interval_s)

    def _after_optimizer_step(self, arg: PipelineHookArgs) -> None:
        if self._display is not None and arg.clip_result is not None:
            self._results.append(arg.clip_result)

    def _after_step(self, arg: PipelineHookArgs) -> None:
        if self._display is None:
            return
        self._loss = arg.reduce_loss
        if monotonic() - self._shown >= self._display.interval_s:
            self._show(arg.global_step_id + 1)

    def _after_loop(self, arg: PipelineHookArgs) -> None:
        display, self._display = self._display, None
        if display is not None:
            display.show(arg.global_step_id, self._numbers())
            display.close()

    def _show(self, steps: int) -> None:
        assert self._display is not None
        self._display.show(steps, self._numbers())
        self._shown = monotonic()

    def _numbers(self) -> str:
        """Read what happened since the last time from the device, and say it."""
        if self._results:
            self._counted += len(self._results)
            self._clipped += int(sum(result.clipped for result in self._results))
            self._last = self._results[-1]
            self._results = []
        numbers = [] if self._loss is None else [f"loss {self._loss.item():.4g}"]
        if self._last is not None:
            numbers += [
                f"norm {float(self._last.norm_pre):.3g}",
                f"clipped {100 * self._clipped / self._counted:.0f} %",
            ]
        return "  ".join(numbers)


class ProgressHookConfig(PipelineHooksConfig[ProgressHook]):
    """Whether progress is shown, and how often where there is no terminal."""

    class_type: ClassType[ProgressHook] = ProgressHook
    enabled: bool | None = None
    """False for not at all."""
    seconds_per_line: float = Field(default=30.0, gt=0)
    """How often a line is written where there is no terminal to draw a bar on."""


class _Display(Protocol):
    """Where progress is shown."""

    interval_s: float
    """How often, at most."""

    def show(self, steps: int, numbers: str) -> None:
        """Show how many batches are done, and what happened in them."""

    def close(self) -> None:
        """Show nothing more."""


class _Bar:
    """A bar on a terminal."""

    interval_s = _INTERVAL_S

    def __init__(self, console: "Console", total: int | None, start: int) -> None:
        rich: Any = import_module("rich.progress")
        self._bar = rich.Progress(
            rich.TextColumn("{task.description}"),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TextColumn("{task.fields[numbers]}"),
            rich.TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
        )
        self._task = self._bar.add_task("training", total=total, completed=start, numbers="")
        self._bar.start()

    def show(self, steps: int, numbers: str) -> None:
        self._bar.update(self._task, completed=steps, numbers=numbers, refresh=True)

    def close(self) -> None:
        self._bar.stop()


class _Lines:
    """A line now and then."""

    def __init__(
        self, console: "Console", total: int | None, start: int, interval_s: float
    ) -> None:
        self.interval_s = interval_s
        self._file = console.file
        self._total, self._start, self._begun = total, start, monotonic()
        self._last = -1

    def show(self, steps: int, numbers: str) -> None:
        if steps == self._last:
            return
        self._last = steps
        of_total = "" if self._total is None else f"/{self._total}"
        said = [f"training {steps}{of_total}", numbers, self._left(steps)]
        self._file.write("  ".join(filter(None, said)) + "\n")
        self._file.flush()

    def close(self) -> None:
        pass

    def _left(self, steps: int) -> str:
        elapsed, done = monotonic() - self._begun, steps - self._start
        if self._total is None or not done or not 0 < steps < self._total:
            return ""
        return f"{timedelta(seconds=round(elapsed / done * (self._total - steps)))} left"


def _total(arg: PipelineHookArgs) -> int | None:
    """Return how many batches there will be, where that is known."""
    totals = [] if arg.max_step is None else [arg.max_step]
    if arg.max_epoch is not None and isinstance(arg.dataloader, Sized):
        totals.append(arg.max_epoch * len(arg.dataloader))
    return min(totals, default=None)
