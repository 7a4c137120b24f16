"""What clipping did as a hook: its numbers go to Accelerate's trackers."""

import re
from typing import TYPE_CHECKING

from pydantic import Field

from gradclip.clipping.step.recorded import Noted, RecordedStep, RecordRow, copy_recorded
from gradclip.config import ClassType
from gradclip.errors import ArgumentValueError, warn
from gradclip.hook import HookContext
from gradclip.integrations.tracked import named
from gradclip.pipeline.hooks.grad_clip import GradientClippingHook
from gradclip.pipeline.hooks.mixin import PipelineHookArgs, PipelineHooks, PipelineHooksConfig
from gradclip.record.ring import StepNumbers, StepRing
from gradclip.record.stats import StepStats, together

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["TrackerHook", "TrackerHookConfig"]

_NOT_IN_MLFLOW = re.compile(r"[^\w\-. :/]", re.ASCII)
"""What MLflow refuses in a name: the ``*`` of a pattern is one."""


class TrackerHook(PipelineHooks):
    """Logs what clipping did to the trackers of the accelerator: TensorBoard, W&B, MLflow.

    Every so many optimizer steps, made or skipped, it logs ``gradclip/norm_pre`` and
    ``gradclip/norm_post`` of the last step, and of the steps since the last log
    ``gradclip/norm_max``, the largest norm, ``gradclip/clip_fraction``, the share that was clipped,
    and ``gradclip/skipped``, how many were not made. With limits by name pattern
    ``gradclip/<pattern>/norm_pre`` too. The end of the loop logs what is left.

    The host does not wait for the numbers. On an accelerator they are there four steps later, and
    are logged at that step. The step of a log is the number of the batch, as in the other hooks
    that log. Only the main process logs.

    Args:
        cfg: How often.
    """

    def __init__(self, cfg: "TrackerHookConfig") -> None:
        super().__init__()
        self.every = cfg.every
        self._accelerator: Accelerator | None = None
        self._ring: StepRing[RecordRow, RecordedStep] = StepRing(copy_recorded, self)
        self._since = StepStats()
        self._last: RecordedStep | None = None
        self._pushed = self._batch = 0
        name, each = "tracker", HookContext.from_callable
        self.register_hook("on_loop", each(name, self._before_loop, self._after_loop))
        self.register_hook("on_optimizer_step", each(name, after=self._after_optimizer_step))

    def add(self, found: RecordedStep, /) -> None:
        """Take the numbers of a step, once they are on the host."""
        numbers, self._last = found.numbers[0], found
        clipped, skipped = bool(numbers.clipped), bool(numbers.skipped)
        step, limit = found.row.noted.step, numbers.threshold
        self._since.add(StepNumbers(step, numbers.norm_pre, limit, clipped, skipped, False))
        if self._since.steps == self.every:
            self._log()

    def _before_loop(self, arg: PipelineHookArgs) -> None:
        """Look for what clips, and for a tracker.

        Raises:
            ArgumentValueError: GC010, nothing clips.
        """
        hooks = () if arg.hooks is None else arg.hooks.walk()
        if not any(isinstance(each, GradientClippingHook) for each in hooks):
            raise ArgumentValueError(
                "TrackerHook logs what clipping did, and no hook clips. Give "
                "grad_clip=GradientClippingHookConfig(policy=ObserveClip()) to measure and change "
                "nothing."
            )
        if arg.is_main_process and not getattr(arg.accelerator, "trackers", ()):
            warn(
                "TrackerHook has nothing to log to: the accelerator has no tracker. Give "
                'Accelerator(log_with="tensorboard", project_dir=...) and call '
                "accelerator.init_trackers(...) before the training. Training goes on without."
            )

    def _after_optimizer_step(self, arg: PipelineHookArgs) -> None:
        failed = arg.exception is not None and not arg.is_optimizer_step_settled
        if failed or arg.clip_result is None or not arg.is_main_process:
            return
        self._accelerator, self._batch = arg.accelerator, arg.global_step_id
        noted = Noted(self._pushed, False, 0.0, (), None, None)
        # Without norms of parameters: those are for a record.
        row = RecordRow.of(arg.clip_result, noted)._replace(tensors=())
        self._pushed += 1
        self._ring.push(row, row.size, asked=self._pushed % self.every == 0)

    def _after_loop(self, arg: PipelineHookArgs) -> None:
        self._batch = max(self._batch, arg.global_step_id - 1)
        self._ring.flush()
        if self._since.steps:
            self._log()
        self._accelerator, self._last, self._pushed = None, None, 0

    def _log(self) -> None:
        assert self._last is not None
        of_all, *of_groups = self._last.numbers
        groups = dict(zip(self._last.row.names, of_groups, strict=True))
        numbers = named(of_all, groups, together([self._since]))
        self._since.clear()
        for tracker in getattr(self._accelerator, "trackers", ()):
            is_mlflow = tracker.name == "mlflow"
            tracker.log(_named_for_mlflow(numbers) if is_mlflow else numbers, step=self._batch)


class TrackerHookConfig(PipelineHooksConfig[TrackerHook]):
    """How often the numbers of clipping are logged."""

    class_type: ClassType[TrackerHook] = TrackerHook
    every: int = Field(default=50, ge=1)
    """After every so many optimizer steps."""


def _named_for_mlflow(numbers: dict[str, float]) -> dict[str, float]:
    return {_NOT_IN_MLFLOW.sub("_", name): value for name, value in numbers.items()}
