"""A record of the run as a hook: one JSON line per optimizer step."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from gradclip.config import ClassType
from gradclip.diagnostics.record import RunRecorder, StepRecord, read_record
from gradclip.errors import ArgumentValueError, RecordError, warn
from gradclip.hook import HookContext
from gradclip.pipeline.hooks.mixin import PipelineHookArgs, PipelineHooks, PipelineHooksConfig
from gradclip.pipeline.processes import together

if TYPE_CHECKING:
    from torch import Tensor

    from gradclip.clipping import ClipResult

__all__ = ["RecordHook", "RecordHookConfig"]

_BUFFERED = 64
"""Steps whose numbers stay on the device before they are read together."""


class _Step(NamedTuple):
    """An optimizer step whose numbers were not read yet."""

    number: int
    losses: "list[Tensor]"
    result: "ClipResult | None"
    overflowed: bool
    lr: float | None
    elapsed_ms: float


class RecordHook(PipelineHooks):
    """Writes a line for every optimizer step, made or skipped, when ``on_optimizer_step`` closes.

    To a path that ends in ``.jsonl`` it writes one file, as follows. Any other path is a folder,
    and the hook that clips writes it, as with ``record=``: with events, and the norm of each
    parameter.

    The loss is the mean over the accumulation window. Numbers are read from the device every 64
    steps, at the end of the loop, at a checkpoint, and when something fails. A run that resumes
    goes on in the same file, without its lines beyond the checkpoint. One that starts from scratch
    is refused where the file has steps of another. Only the main process writes.

    Where the file cannot be written any more (the disk is full, say), training goes on: a warning
    says from which step lines are missing. The next loop opens the file again.

    Args:
        cfg: Where to.
    """

    def __init__(self, cfg: "RecordHookConfig") -> None:
        super().__init__()
        self.path = Path(cfg.path)
        self._recorder: RunRecorder | None = None
        self._is_broken = False
        """Whether the file could not be written any more in this loop."""
        self._number: int | None = None
        self._losses: list[Tensor] = []
        self._waiting: list[_Step] = []
        self._since = perf_counter()
        name = "record"
        self._is_folder = self.path.suffix != ".jsonl" and not self.path.is_file()
        if self._is_folder:
            begin = HookContext.from_callable(name, before=self._hand_over)
            self.register_hook("on_loop", begin)
            return
        self.register_hook(
            "on_loop", HookContext.from_callable(name, self._before_loop, self._after_loop)
        )
        self.register_hook("on_step", HookContext.from_callable(name, after=self._after_step))
        self.register_hook("on_batch", HookContext.from_callable(name, after=self._after_batch))
        self.register_hook(
            "on_optimizer_step",
            HookContext.from_callable(name, after=self._after_optimizer_step),
        )

    def flush(self) -> None:
        """Write every step that is waiting."""
        waiting, self._waiting = self._waiting, []
        for step in waiting:
            if self._recorder is None:
                return
            with self._going_on(step.number):
                self._recorder.write(_read(step))

    def close(self) -> None:
        """Write every step that is waiting, and close the file; the next step opens it again."""
        self.flush()
        if self._recorder is not None:
            with self._going_on(self._number or 0):
                self._recorder.close()
        self._recorder = None

    def take_back(self) -> None:
        """Forget the losses of the window."""
        self._losses = []

    def state_dict(self) -> dict[str, Any]:
        """Return which step comes next, when all before it are in the file."""
        self.flush()
        return {} if self._number is None else {"step": self._number}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the step that ``state_dict`` named."""
        self._number = int(state["step"])

    def _hand_over(self, arg: PipelineHookArgs) -> None:
        """Let the hook that clips record: it has what a folder holds, the norm of each parameter.

        Raises:
            ArgumentValueError: GC010, there is none.
        """
        for hooks in () if arg.hooks is None else arg.hooks.walk():
            record_in = getattr(hooks, "record_in", None)
            if record_in is not None:
                record_in(str(self.path))
                return
        raise ArgumentValueError(
            f"{self.path} is a folder, which the hook that clips writes, and there is none. Give "
            "grad_clip=GradientClippingHookConfig(policy=ObserveClip()) to measure and change "
            "nothing, or a path that ends in .jsonl for a file without norms of parameters."
        )

    def _before_loop(self, arg: PipelineHookArgs) -> None:
        self._is_broken = False
        if not arg.micro_step_id:  # or it goes on inside a window
            self._losses = []
        if arg.accelerator is None:
            self._open(arg)
            return
        with together(arg.accelerator):
            self._open(arg)

    def _after_loop(self, arg: PipelineHookArgs) -> None:  # noqa: ARG002
        self.close()

    def _after_batch(self, arg: PipelineHookArgs) -> None:
        if arg.exception is None and arg.reduce_loss is not None:
            self._losses.append(arg.reduce_loss.detach())

    def _after_step(self, arg: PipelineHookArgs) -> None:
        if arg.exception is not None:
            self.flush()

    def _after_optimizer_step(self, arg: PipelineHookArgs) -> None:
        losses, self._losses = self._losses, []
        if arg.exception is not None and not arg.is_optimizer_step_settled:
            return
        if not losses and arg.reduce_loss is not None:
            losses = [arg.reduce_loss.detach()]
        now = perf_counter()
        number = self._open(arg)
        self._waiting.append(
            _Step(
                number,
                losses,
                arg.clip_result,
                _skipped_by_scaler(arg),
                None if arg.optimizer is None else float(arg.optimizer.param_groups[0]["lr"]),
                (now - self._since) * 1e3,
            )
        )
        self._number, self._since = number + 1, now
        if len(self._waiting) >= _BUFFERED:
            self.flush()

    def _open(self, arg: PipelineHookArgs) -> int:
        """Open the file if it is not, and return the number of the next step."""
        if self._number is None:
            self._number = arg.optimizer_step_id
        writes = arg.accelerator is None or arg.accelerator.is_main_process
        if self._recorder is None and writes and not self._is_broken:
            if self._number == 0 and arg.resume_from is None:
                _refuse_another_run(self.path)
            self._recorder = RunRecorder(self.path, start_step=self._number)
            self._since = perf_counter()
        return self._number

    @contextmanager
    def _going_on(self, number: int) -> Iterator[None]:
        """Warn where the file cannot be written, and write no more: a record stops no training."""
        try:
            yield
        except RecordError as error:
            recorder, self._recorder, self._is_broken = self._recorder, None, True
            if recorder is not None:
                with suppress(RecordError):  # it tries once more what it could not write
                    recorder.close()
            warn(f"{error} Lines are missing from step {number} on; training goes on without them.")


class RecordHookConfig(PipelineHooksConfig[RecordHook]):
    """Where the record goes."""

    class_type: ClassType[RecordHook] = RecordHook
    path: str
    """A file that ends in ``.jsonl``, or a folder."""


def _refuse_another_run(path: Path) -> None:
    """Refuse to write over the steps of another run.

    Raises:
        ArgumentValueError: GC010, there are some, or the file is something else.
    """
    steps = len(read_record(path)) if path.exists() and path.stat().st_size else 0
    if steps:
        raise ArgumentValueError(
            f"{path} has {steps} steps of an earlier run, and this one begins with step 0. Nothing "
            "was changed. Three ways out: go on with that run (the trainer's resume_from, with "
            '"auto" to start or resume); give this run another path; or move that file away.'
        )


def _read(step: _Step) -> StepRecord:
    loss = mean(map(float, step.losses)) if step.losses else None  # exact: a sum might overflow
    record = StepRecord.from_stats(
        step.number,
        None if step.result is None else step.result.to_host(),
        loss=loss,
        lr=step.lr,
        elapsed_ms=step.elapsed_ms,
    )
    if step.overflowed and not record.skipped:
        record = replace(record, skipped=True, reason="overflow")
    return record


def _skipped_by_scaler(arg: PipelineHookArgs) -> bool:
    scaling = arg.accelerator is not None and arg.accelerator.scaler is not None
    return scaling and not arg.is_optimizer_step_committed
