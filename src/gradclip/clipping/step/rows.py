"""The steps of a clipper: what each leaves on the device, and how many come to the host at once."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import finalize

import torch
from torch import Tensor

from gradclip.clipping import flags
from gradclip.clipping.apply.coefficients import OneCoefficient
from gradclip.clipping.flags import Flag
from gradclip.clipping.kernels.device import HostCopy, copy_to_host, is_capturing
from gradclip.clipping.kernels.fused import CLIPPED, NORM, SKIPPED, HostReport
from gradclip.clipping.step.loop import LoopWatch
from gradclip.errors import CaptureError
from gradclip.record.ring import Copied, Reader, StepNumbers, StepRing
from gradclip.record.stats import Stats, StepStats, together

if TYPE_CHECKING:
    from gradclip.clipping.result import ClipResult


_ON_DEVICE: Any = object()
_TRY = 10
"""A loop of fewer steps is a try: it ends without a word."""


class StepRow(NamedTuple):
    """What one step left behind: small tensors that exist anyway, and no gradient.

    Attributes:
        step: Which call it was.
        expected: A loss scaler answers for an overflow.
        norms_S: Norm of each scope before clipping.
        order: p of the norm of all.
        threshold: The norm that all gradients may have; NaN where there is not one for all.
        kept: What scopes were multiplied by, (S,), or one number for all.
        clamped: Whether any element was changed, where elements are clamped.
        skipped: Whether the step should not be made.
    """

    step: int
    expected: bool
    norms_S: Tensor
    order: float
    threshold: float | Tensor
    kept: float | Tensor
    clamped: Flag | None
    skipped: Flag

    @classmethod
    def of(cls, result: "ClipResult", step: int, *, expected: bool) -> "StepRow":
        """Take from a result what counts, without computing anything."""
        found = result.coefficients
        number = None if isinstance(found, Tensor) else found.number
        kept = result.coefficients_S if number is None else number
        return cls(
            step,
            expected,
            result.measured_S,
            result.norm_type,
            result.one_threshold,
            kept,
            result.clamped,
            result.withheld,
        )


class ReportRow(NamedTuple):
    """What one step left behind whose numbers are on their way to the host already.

    Attributes:
        step: Which call it was.
        expected: A loss scaler answers for an overflow.
        report: Its numbers.
        threshold: The norm that all gradients may have; NaN where there is not one for all.
    """

    step: int
    expected: bool
    report: HostReport
    threshold: float

    def read(self) -> StepNumbers:
        """Return the numbers; waits until they are there."""
        norm, clipped, skipped = map(self.report.of_all, (NORM, CLIPPED, SKIPPED))
        return StepNumbers(
            self.step, norm, self.threshold, clipped != 0, skipped != 0, self.expected
        )


def copy_rows(
    rows: Sequence[StepRow | ReportRow | StepNumbers], waiting: bool
) -> list[Copied[StepNumbers]]:
    """Begin to bring rows to the host: together, as far as they are on one device.

    Args:
        rows: What each step left behind, or its numbers where the host knows them.
        waiting: Whether the host waits for them now.
    """
    by_device = groupby(rows, lambda row: row.norms_S.device if isinstance(row, StepRow) else None)
    parts: list[tuple[object, list[Any]]] = [(device, list(part)) for device, part in by_device]
    return [
        KnownRows(part, waiting) if device is None else CopiedRows(part, waiting)
        for device, part in parts
    ]


class KnownRows:
    """The numbers of some steps that are on the host, or on their way there already.

    Args:
        rows: Those of each step.
        waiting: Whether the host waits for them now.
    """

    def __init__(self, rows: Sequence[ReportRow | StepNumbers], waiting: bool) -> None:
        self._rows = rows
        reports = (row for row in rows if isinstance(row, ReportRow))
        self.waits = not waiting and any(row.report.waits for row in reports)

    def read(self) -> list[StepNumbers]:
        """Return the numbers; waits until they are there."""
        return [row.read() if isinstance(row, ReportRow) else row for row in self._rows]


class CopiedRows:
    """The numbers of some steps, on their way to the host.

    Args:
        rows: What each step left behind, on one device.
        waiting: Whether the host waits for them now.
    """

    def __init__(self, rows: Sequence[StepRow], waiting: bool) -> None:
        device = rows[0].norms_S.device
        self.waits = flags.host_waits_for(device) and not waiting
        self._calls = [(row.step, row.expected) for row in rows]
        norms = [row.norms_S for row in rows]
        kept = [row.kept if isinstance(row.kept, Tensor) else row.kept < 1 for row in rows]
        columns: list[tuple[list[Any], Callable[[Tensor], Tensor]]] = [
            (norms, partial(norms_of_all, order=rows[0].order)),
            ([row.threshold for row in rows], torch.flatten),
            (kept, _any_below_one),
            ([row.clamped for row in rows], torch.flatten),
            ([row.skipped for row in rows], torch.flatten),
        ]
        self._known = [_without_tensors(values) for values, _ in columns]
        numbers = torch.cat([_of_every_step(values, reduce, device) for values, reduce in columns])
        copied = copy_to_host(numbers) if self.waits else None
        self._numbers: Tensor | HostCopy = numbers if copied is None else copied

    def read(self) -> list[StepNumbers]:
        """Return the numbers; waits until they are there."""
        numbers = self._numbers
        found = iter(numbers.tolist() if isinstance(numbers, Tensor) else numbers.read())
        columns = [
            [next(found) if value is _ON_DEVICE else value for value in values]
            if _ON_DEVICE in values
            else values
            for values in self._known
        ]
        return [
            StepNumbers(
                step,
                norm,
                threshold,
                bool(less if clamped is None else clamped) and not skipped,
                bool(skipped),
                expected,
            )
            for (step, expected), norm, threshold, less, clamped, skipped in zip(
                self._calls, *columns, strict=True
            )
        ]


def _without_tensors(values: list[Any]) -> list[Any]:
    """Return what is known on the host; a mark stands for what is not."""
    if not any(isinstance(value, Tensor) for value in values):
        return values
    return [_ON_DEVICE if isinstance(value, Tensor) else value for value in values]


def _of_every_step(
    values: Sequence[Any], reduce: Callable[[Tensor], Tensor], device: torch.device
) -> Tensor:
    """Reduce what is on the device to a number for each step that has it there: float64 (n,)."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return torch.empty(0, dtype=torch.float64, device=device)
    if len({tensor.shape for tensor in tensors}) == 1:
        return reduce(torch.stack(tensors)).to(torch.float64)
    return torch.cat([reduce(tensor[None]) for tensor in tensors]).to(torch.float64)


def _any_below_one(kept_BS: Tensor) -> Tensor:
    return (kept_BS < 1).any(1)


def norms_of_all(norms_BS: Tensor, order: float) -> Tensor:
    """Return the p-norm of the norms of each step, (B,), without leaving float64's range."""
    if norms_BS.shape[1] <= 1:
        return norms_BS.sum(1)
    largest_B = norms_BS.amax(1)
    scale_B = torch.where((largest_B > 0) & largest_B.isfinite(), largest_B, 1.0)
    relative: Tensor = torch.linalg.vector_norm(norms_BS / scale_B[:, None], order, dim=1)
    return relative * scale_B


class StepLog:
    """All steps of one clipper: what they came to, and whoever else wants to know of each.

    Args:
        called: What clips, as its user knows it.
        owned: Whether it unscales by itself, and keeps the optimizer from a step.
        lasts: Whether it is for more than one step, and says at its end if most were not made.
    """

    def __init__(self, called: str, *, owned: bool, lasts: bool = True) -> None:
        self.counted = StepStats()
        """What the steps came to whose numbers were read; ``catch_up`` reads those of all."""
        self.is_captured = False
        """Whether a step went into a CUDA graph, which has its limits in it."""
        self._loop = LoopWatch(called, owned=owned)
        self._ring = StepRing(copy_rows, self.counted, self._loop)
        if lasts:
            finalize(self, _end, self._ring, self.counted, called, os.getpid())

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle after the numbers of all steps were read, by every reader."""
        self.catch_up()
        return self.__dict__

    def push(self, result: "ClipResult", step: int, expected: bool, unscaled: bool = True) -> None:
        """Note a step; nothing is computed or read now. One in a CUDA graph is not counted.

        Args:
            result: What was measured and done.
            step: Which call it was.
            expected: A loss scaler answers for an overflow.
            unscaled: Whether gradients are known to be unscaled.
        """
        if result.on_host is not None:
            limit = float(result.one_threshold)
            self._ring.push(ReportRow(step, expected, result.on_host, limit), 0)
        elif isinstance(result.coefficients, OneCoefficient):  # as all numbers; the step is made
            known, limit = result.coefficients, float(result.one_threshold)
            clipped = known.number < 1 or result.clamped is True
            numbers = StepNumbers(step, known.norm, limit, clipped, False, expected)
            self._ring.push(numbers, 0)
        elif is_capturing(result.measured_S.device):
            self.is_captured = True
            return
        else:
            row = StepRow.of(result, step, expected=expected)
            self._ring.push(row, 2 * row.norms_S.numel())
        self._loop.speak(unscaled=unscaled)

    def follow(self, reader: Reader[StepNumbers]) -> None:
        """Tell a reader of every step from now on, once its numbers are on the host.

        A copy of this log, and a pickled one, has a copy of the reader.
        """
        self.catch_up()
        self._ring.readers.append(reader)

    def require_uncaptured(self, policy: object) -> None:
        """Refuse to change a policy that a CUDA graph has in it.

        Raises:
            CaptureError: GC022.
        """
        if self.is_captured:
            raise CaptureError(
                f"policy={policy!r} would change nothing: a CUDA graph has captured clip() with "
                "the limits of then in it, and replays them. Change a limit before the capture, or "
                "make a new clipper and capture anew. Nothing was changed."
            )

    def catch_up(self) -> None:
        """Tell all readers of the last steps too; waits for the device."""
        self._ring.flush()

    def say_at_end(self, label: str) -> None:
        """Log a line if steps were not made; ``label`` is what its user calls this clipper."""
        self.catch_up()
        self.counted.say_at_end(label)

    @property
    def stats(self) -> Stats:
        """What all steps came to; waits for the device."""
        self.catch_up()
        return together([self.counted])


def _end(ring: StepRing[Any, StepNumbers], counted: StepStats, called: str, process: int) -> None:
    """Say that most steps were not made, where nobody has said so: clipping is over."""
    if os.getpid() == process and counted.steps + ring.waiting >= _TRY:
        ring.flush()
        counted.say_at_end(called, only_most=True)
