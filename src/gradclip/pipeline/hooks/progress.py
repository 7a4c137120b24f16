"""A progress bar as a hook."""

from collections.abc import Sized
from importlib import import_module
from time import monotonic
from typing import TYPE_CHECKING, Any

from gradclip.config import ClassType
from gradclip.errors import MissingDependencyError
from gradclip.hook import HookContext
from gradclip.pipeline.hooks.mixin import PipelineHookArgs, PipelineHooks, PipelineHooksConfig

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from torch import Tensor

    from gradclip.clipping import ClipResult

__all__ = ["ProgressHook", "ProgressHookConfig"]

_INTERVAL_S = 0.1
"""The bar is drawn at most so often; between two drawings nothing is read from the device."""


class ProgressHook(PipelineHooks):
    """Draws a bar while ``on_loop`` is open: steps, loss, norm before clipping, share clipped.

    Only the main process draws, and only on a terminal unless it is told to.

    Args:
        cfg: Whether to draw.
        console: Where to; standard error if it is left out.

    Raises:
        MissingDependencyError: GC401, rich is not installed.
    """

    def __init__(
        self, cfg: "ProgressHookConfig | None" = None, console: "Console | None" = None
    ) -> None:
        super().__init__()
        try:
            self._rich: Any = import_module("rich.progress")
            import_module("rich.console")
        except ImportError as error:
            raise MissingDependencyError(
                "ProgressHook draws with rich, which is not installed\n"
                "  pip install 'gradclip[cli]'"
            ) from error
        self._enabled = None if cfg is None else cfg.enabled
        self._console = console or import_module("rich.console").Console(stderr=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._drawn = 0.0
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
        main = arg.accelerator is None or arg.accelerator.is_main_process
        wanted = self._console.is_terminal if self._enabled is None else self._enabled
        if not (main and wanted):
            return
        self._results, self._last, self._loss = [], None, None
        self._counted = self._clipped = 0
        self._bar = self._rich.Progress(
            self._rich.TextColumn("{task.description}"),
            self._rich.BarColumn(),
            self._rich.MofNCompleteColumn(),
            self._rich.TextColumn("{task.fields[numbers]}"),
            self._rich.TimeRemainingColumn(),
            console=self._console,
            auto_refresh=False,
        )
        assert self._bar is not None
        self._task = self._bar.add_task(
            "training", total=_total(arg), completed=arg.global_step_id, numbers=""
        )
        self._bar.start()

    def _after_optimizer_step(self, arg: PipelineHookArgs) -> None:
        if self._bar is not None and arg.clip_result is not None:
            self._results.append(arg.clip_result)

    def _after_step(self, arg: PipelineHookArgs) -> None:
        if self._bar is None:
            return
        self._loss = arg.reduce_loss
        if monotonic() - self._drawn >= _INTERVAL_S:
            self._draw(arg.global_step_id + 1)

    def _after_loop(self, arg: PipelineHookArgs) -> None:
        if self._bar is not None:
            self._draw(arg.global_step_id)
            self._bar.stop()
        self._bar = None

    def _draw(self, steps: int) -> None:
        assert self._bar is not None
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
        self._bar.update(self._task, completed=steps, numbers="  ".join(numbers), refresh=True)
        self._drawn = monotonic()


class ProgressHookConfig(PipelineHooksConfig[ProgressHook]):
    """Whether a bar is drawn."""

    class_type: ClassType[ProgressHook] = ProgressHook
    enabled: bool | None = None
    """None for on a terminal alone."""


def _total(arg: PipelineHookArgs) -> int | None:
    """Return how many batches there will be, where that is known."""
    totals = [] if arg.max_step is None else [arg.max_step]
    if arg.max_epoch is not None and isinstance(arg.dataloader, Sized):
        totals.append(arg.max_epoch * len(arg.dataloader))
    return min(totals, default=None)
