"""What turns the steps of one clipper into the lines, rows and events of a record."""

import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import compress, islice
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import finalize, ref

import torch
import torch.distributed as dist
from torch import Tensor

from gradclip.clipping.arguments import check_one_number
from gradclip.clipping.collect.shards import local_part
from gradclip.clipping.collect.sources import ParameterSource
from gradclip.clipping.kernels.device import is_capturing
from gradclip.clipping.measure.norm import shown_order
from gradclip.clipping.measure.pattern import Pattern
from gradclip.clipping.policies import Policy
from gradclip.clipping.step.recorded import Noted, Numbers, RecordedStep, RecordRow, copy_recorded
from gradclip.errors import ArgumentTypeError, GradClipError, warn
from gradclip.record.ring import READING, StepRing
from gradclip.record.writer import Batch, Layout, Place, Writer

if TYPE_CHECKING:
    from gradclip.clipping.result import ClipResult

Policies: TypeAlias = Mapping[str, Policy | None]

SPIKE = 0.1
"""A step is a spike where gradients were multiplied by less than this."""

_NAMED = 8
"""How many parameters at fault an event names."""

_LATE = [False, True, True, True]
"""Of the first steps, whether a loss was told before them, where it is told after each."""

_EXPONENT = 0x7C00
"""The bits that are all set in a float16 that is infinite or a NaN."""

_MINUS_INFINITY = 0xFC00
"""A norm of 0: log10 of it."""


class NoRecord:
    """Records nothing."""

    asks = False
    """Whether it asks for what is found of each tensor."""
    is_open = True
    """Whether there is nothing to open before the first step writes."""

    def open(self, step: int, patterns: Sequence[Pattern], policies: Policies) -> None:
        """Open nothing."""

    def note(self, *, loss: float | Tensor | None = None, lr: float | Tensor | None = None) -> None:
        """Note nothing."""

    def note_last(self, loss: float) -> None:
        """Note nothing."""

    def watching(self, step: int) -> AbstractContextManager[None]:  # noqa: ARG002
        """Watch nothing."""
        return _NOTHING

    def push(
        self,
        result: "ClipResult",
        step: int,
        patterns: Sequence[Pattern],
        expected: bool,
        scale: float | Tensor | None,
    ) -> None:
        """Take nothing."""

    def close(self) -> None:
        """Close nothing."""

    def resume(self) -> None:
        """Go on with nothing."""


_NOTHING = nullcontext()


def recorder_of(
    owner: object, folder: Path | None, called: str | None, source: ParameterSource
) -> NoRecord:
    """Return what records, until its owner is gone, or Python ends.

    Args:
        owner: What is recorded.
        folder: Where to; None for nowhere.
        called: What clips, as its user knows it.
        source: Its parameters.
    """
    if folder is None:
        return NoRecord()
    recorder = Recorder(folder, called or "gradclip", source)
    finalize(owner, recorder.close)
    return recorder


class Recorder(NoRecord):
    """Records the steps of one clipper, in a folder that is opened before the first one writes.

    It holds neither parameters nor their optimizer: what is recorded may go.

    Args:
        folder: Where to.
        called: What clips, as its user knows it.
        source: Its parameters; those of an optimizer tell the learning rate.
    """

    asks = True

    def __init__(self, folder: Path, called: str, source: ParameterSource) -> None:
        self._writer = Writer.of(folder)
        self._number, self._has_joined = self._writer.join(), True
        self._called, self._process = called, os.getpid()
        optimizer = getattr(source, "optimizer", None)
        self._optimizer: Callable[[], Any] = _nothing if optimizer is None else ref(optimizer)
        self._ring: StepRing[RecordRow, RecordedStep] = StepRing(copy_recorded, self)
        self._batch = Batch()
        self._losses: list[float | Tensor] = []
        self._lr: float | Tensor | None = None
        self._late: dict[int, float] = {}
        self._told: list[bool] = []
        self._last = -1
        self._place = Place()
        self._first: Callable[[], Pattern | None] = _nothing
        self._layout: Layout | None = None
        self._since = perf_counter()
        self._resumes = self.is_open = False

    def __reduce__(self) -> tuple[type[NoRecord], tuple[()]]:
        """Copy and pickle as none: a copy of a clipper records nothing."""
        return NoRecord, ()

    @property
    def _is_here(self) -> bool:
        """Whether this is the process that writes, and not a fork of it."""
        return os.getpid() == self._process

    def open(self, step: int, patterns: Sequence[Pattern], policies: Policies) -> None:
        """Open the folder, before the first step writes.

        Args:
            step: Which call that is.
            patterns: What is clipped.
            policies: What bounds it, by pattern.

        Raises:
            RecordError: GC302, it cannot be written, or has the steps of another run.
            ArgumentValueError: GC010, it has something that is no record.
        """
        self._place = _place()
        if not self._is_here:  # it was made before a fork
            self._writer, self._process = Writer.of(self._writer.folder), os.getpid()
            self._has_joined = False
        if not self._has_joined:
            self._number, self._has_joined = self._writer.join(), True
        optimizer = self._optimizer()
        about = {
            "called": self._called,
            "kind": None if optimizer is None else type(optimizer).__name__,
            "policies": {name: repr(policy) for name, policy in policies.items()},
            "torch": torch.__version__,
        }
        self._writer.begin(self._number, step, self._place, about, resumes=self._resumes)
        self._first, self._layout, self._told = _nothing, None, []
        self._lay_out(patterns, step)
        self.is_open, self._since = True, perf_counter()

    def note(self, *, loss: float | Tensor | None = None, lr: float | Tensor | None = None) -> None:
        """Note what the next step has; a tensor on a device is not read now."""
        if loss is not None:
            self._losses.append(_checked("loss", loss))
        if lr is not None:
            self._lr = _checked("lr", lr)

    def note_last(self, loss: float) -> None:
        """Note the loss of the last step: its line waits for the next one."""
        with READING:
            if self.is_open and not self._place.rank:
                self._late[self._last] = loss

    def push(
        self,
        result: "ClipResult",
        step: int,
        patterns: Sequence[Pattern],
        expected: bool,
        scale: float | Tensor | None,
    ) -> None:
        """Take a step; nothing is computed or read now. One in a CUDA graph is not recorded.

        Args:
            result: What was measured and done.
            step: Which call it was.
            patterns: What was clipped.
            expected: A loss scaler answers for an overflow.
            scale: What gradients were still multiplied by.
        """
        now, losses, lr = perf_counter(), self._losses, self._lr
        self._losses, self._lr = [], None
        if is_capturing(result.device) or not self.is_open or not self._is_here:
            return
        if lr is None and (optimizer := self._optimizer()) is not None:
            lr = _rate(optimizer)
        self._watch_order(bool(losses))
        elapsed = 1e3 * (now - self._since)
        with READING:
            self._lay_out(patterns, step)
            row = RecordRow.of(result, Noted(step, expected, elapsed, losses, lr, scale))
            self._last = step
            self._ring.push(row, row.size)
            self._write(but_last=True)
        self._since = now

    def add(self, found: RecordedStep, /) -> None:
        """Take what a step came to, once it is on the host."""
        row, batch, of_all = found.row, self._batch, found.numbers[0]
        step, reason = row.noted.step, _reason(row, of_all)
        spike = 0 < of_all.coefficient < SPIKE and reason is None
        if found.norms:
            batch.norms.append((step, found.norms))
            if spike or reason is not None or of_all.nonfinite:
                batch.event_norms.append((step, found.norms))
        if of_all.nonfinite:
            self._add_nonfinite(found)
        if self._place.rank:
            return
        groups = {
            name: _entry(numbers)
            for name, numbers in zip(row.names, found.numbers[1:], strict=True)
        }
        batch.steps.append(
            {
                "step": step,
                "loss": mean(found.losses) if found.losses else None,
                "lr": found.lr,
                **_entry(of_all),
                "reason": reason,
                "elapsed_ms": round(row.noted.elapsed_ms, 3),
                "new_policy": row.new_policy,
                "groups": groups,
            }
        )
        if reason is not None:
            batch.events.append({"event": "skip", "step": step, "reason": reason})
        if spike:
            entry = _entry(of_all)
            names = ("norm_pre", "threshold", "coefficient")
            batch.events.append({"event": "spike", "step": step, **{n: entry[n] for n in names}})
        if row.new_policy is not None:
            batch.events.append({"event": "limit", "step": step, "policy": row.new_policy})

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Write what there is before an error leaves a step."""
        try:
            yield
        except BaseException as error:
            if self.is_open and self._is_here:
                self._fail(step, error)
            raise

    def _fail(self, step: int, error: BaseException) -> None:
        with suppress(Exception), READING:  # the device may be gone
            self._ring.flush()
            if isinstance(error, GradClipError):
                said = str(error).split("\n", 1)[0][:400]
                entry = {"event": "error", "step": step, "code": error.code, "error": said}
                self._batch.events.append(entry)
            self._write()

    def flush(self) -> None:
        """Write every step that was made; waits for the device."""
        if self._is_here:  # a fork has a copy of what waits
            with READING:
                self._ring.flush()
                self._write()

    def close(self) -> None:
        """Write every step that was made, and close the folder; the next step opens it again."""
        if self._has_joined and self._is_here:
            if self.is_open:
                self.flush()
                self.is_open, self._resumes = False, True
            self._has_joined = False
            self._writer.leave(self._number)

    def resume(self) -> None:
        """Go on with the step of a state that was loaded: what was written beyond it is dropped."""
        if self.is_open:
            self.flush()
        self.is_open, self._resumes = False, True

    def _lay_out(self, patterns: Sequence[Pattern], step: int) -> None:
        """Begin another file of norms where other parameters are clipped now."""
        if patterns and patterns[0] is self._first():  # all are made anew together
            return
        layout = _layout(patterns)
        if layout.names and layout != self._layout:
            self._ring.flush()  # rows of the old ones
            self._write()
            self._writer.lay_out(self._number, layout, step)
        self._first, self._layout = ref(patterns[0]) if patterns else _nothing, layout

    def _write(self, *, but_last: bool = False) -> None:
        """Write what is on the host, but for the line of the last step, whose loss may be told."""
        batch = self._batch
        last = batch.steps[-1:] if but_last else []
        waits = [line for line in last if line["step"] == self._last]
        batch.steps = batch.steps[: len(batch.steps) - len(waits)]
        for line in batch.steps:
            line["loss"] = self._late.pop(int(str(line["step"])), line["loss"])
        self._batch = Batch(waits)
        if batch.steps or batch.norms or batch.events:
            at = [step for step, _ in batch.norms] or [
                int(str(each["step"])) for each in (*batch.steps, *batch.events)
            ]
            self._writer.write(self._number, at[0], batch)

    def _watch_order(self, told: bool) -> None:
        """Warn, once, where losses seem to be told after their steps."""
        if len(self._told) < len(_LATE):
            self._told.append(told)
            if self._told == _LATE:
                warn(
                    f"{self._called}: note(loss=...) was not called before the first recorded step "
                    "and was before each of the next three. If it comes after the step, each loss "
                    "is recorded one step late: call it before, right behind backward()."
                )

    def _add_nonfinite(self, found: RecordedStep) -> None:
        names: list[str] = []
        if found.norms and self._layout is not None:
            bits = struct.unpack(f"<{len(found.norms) // 2}H", found.norms)
            odd = (b & _EXPONENT == _EXPONENT and b != _MINUS_INFINITY for b in bits)
            names = list(islice(compress(self._layout.names, odd), _NAMED))
        if names or not self._place.rank:
            self._batch.events.append(
                {
                    "event": "nonfinite",
                    "step": found.row.noted.step,
                    "tensors": int(found.numbers[0].nonfinite),
                    "parameters": names,
                }
            )


def _nothing() -> None:
    """Stand for what is not there, or not any more."""


def _rate(optimizer: Any) -> float | Tensor | None:
    """Return the learning rate of the first group of an optimizer."""
    groups = optimizer.param_groups
    lr: float | Tensor | None = groups[0].get("lr") if groups else None
    return lr.clone() if isinstance(lr, Tensor) else lr  # it is changed in place


def _checked(name: str, value: float | Tensor) -> float | Tensor:
    """Return a number, or a tensor that is still on a device.

    Raises:
        ArgumentTypeError: GC011, for anything else.
        ArgumentValueError: GC010, for a tensor of several numbers.
    """
    if isinstance(value, Tensor):
        check_one_number(value, name)
        # A copy: loops add up losses in place.
        return value.item() if value.is_cpu else value.detach().clone()
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ArgumentTypeError(
            f"{name} is of type {type(value).__qualname__}: expected a number, or a tensor of one"
        ) from None


def _place() -> Place:
    """Return which process this is, without asking others."""
    if dist.is_available() and dist.is_initialized():
        return Place(dist.get_rank(), dist.get_world_size())
    rank, processes = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return (
        Place(int(rank), int(processes)) if rank.isdecimal() and processes.isdecimal() else Place()
    )


def _layout(patterns: Sequence[Pattern]) -> Layout:
    names: list[str] = []
    sizes: list[int] = []
    orders: list[float] = []
    weights: list[float] = []
    for pattern in patterns:
        parameters = pattern.parameters.parameters
        names += pattern.parameters.names
        sizes += [local_part(each.detach()).numel() for each in parameters]
        orders += [shown_order(pattern.order)] * len(parameters)
        weights += pattern.portions
    seen: dict[str, int] = {}
    for at, name in enumerate(names):  # two models in one clipper may have the same ones
        seen[name] = seen.get(name, 0) + 1
        names[at] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return Layout(names, sizes, orders, weights)


def _reason(row: RecordRow, numbers: Numbers) -> str | None:
    """Return why a step was skipped; None where it was not."""
    if not numbers.skipped:
        return None
    if numbers.by_policy:
        return "policy"
    if row.ranked and not numbers.nonfinite:
        return "rank"
    return "overflow" if row.noted.expected else "nonfinite"


def _entry(numbers: Numbers) -> dict[str, Any]:
    return {
        "norm_pre": numbers.norm_pre,
        "norm_post": numbers.norm_post,
        "threshold": numbers.threshold,
        "coefficient": numbers.coefficient,
        "clipped": bool(numbers.clipped),
        "skipped": bool(numbers.skipped),
        "nonfinite": int(numbers.nonfinite),
    }
