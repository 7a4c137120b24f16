"""The steps of one clipper on their way to a record: what each leaves, and how many are copied.

Nothing is computed or read at a step itself. The rows of 64 steps are brought together where they
are, become a few numbers for each pattern and log10 of each parameter's norm, and are copied to the
host, which does not wait for them.
"""

import struct
from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gradclip.clipping import flags
from gradclip.clipping.apply.coefficients import OneCoefficient
from gradclip.clipping.flags import Flag
from gradclip.clipping.kernels import fused
from gradclip.clipping.kernels.device import HostCopy, copy_to_host
from gradclip.clipping.kernels.fused import Report
from gradclip.clipping.measure.norm import TensorSums
from gradclip.clipping.step.rows import norms_of_all

if TYPE_CHECKING:
    from gradclip.clipping.result import ClipResult

_CPU = torch.device("cpu")
_ZERO = b"\x00\xfc"
"""log10 of 0 as a float16: minus infinity."""


class Noted(NamedTuple):
    """What is known of a step beside what clipping found.

    Attributes:
        step: Which call it was.
        expected: A loss scaler answers for an overflow.
        elapsed_ms: Time since the last step.
        losses: Of its window: numbers, or tensors that are still on a device.
        lr: The learning rate: a number or a tensor.
        scale: What its gradients were still multiplied by.
    """

    step: int
    expected: bool
    elapsed_ms: float
    losses: Sequence[float | Tensor]
    lr: float | Tensor | None
    scale: float | Tensor | None


class Numbers(NamedTuple):
    """What a step came to, for all gradients or for those of a pattern, on the host."""

    norm_pre: float
    norm_post: float
    threshold: float
    coefficient: float
    clipped: float
    skipped: float
    nonfinite: float
    by_policy: float


class _Part(NamedTuple):
    """What a step left behind of one pattern, or of all: tensors that exist anyway.

    Attributes:
        norms_S: Norm of each scope before clipping, (S,).
        order: p of the norm of all.
        kept: What scopes were multiplied by, (S,), or one number for all.
        thresholds: Norm above which scopes were clipped: (S,), or one number for all.
        left_S: Where it does not follow from ``kept``, the norms afterwards.
        clamped: Whether any element was changed, where elements are clamped.
        withheld: Whether the step should not be made.
        by_policy: Whether a policy asked for that.
        nonfinite: How many tensors were not finite on all ranks; None on one process.
        sums_T: A number for each tensor, not finite just where the tensor is not.
    """

    norms_S: Tensor
    order: float
    kept: Tensor | float
    thresholds: Tensor | float
    left_S: Tensor | None
    clamped: Flag | None
    withheld: Flag
    by_policy: Flag
    nonfinite: Tensor | None
    sums_T: Tensor | None

    @classmethod
    def of(cls, result: "ClipResult") -> "_Part":
        known = result.coefficients
        number = None if isinstance(known, Tensor) else known.number
        return cls(
            result.measured_S,
            result.norm_type,
            result.coefficients_S if number is None else number,
            result.thresholds,
            result.left_S,
            result.clamped,
            result.withheld,
            result.by_policy,
            result.nonfinite_on_ranks,
            result.tensor_sums_T,
        )


class RecordRow(NamedTuple):
    """What one step left behind.

    Attributes:
        noted: What is known beside it.
        names: Of its patterns; empty where there is one result for all.
        ranked: Whether other ranks hold parameters too.
        new_policy: What bounds gradients from this step on, where that was changed.
        parts: Of all, and of each pattern; none where there is a report.
        report: What a clip in few launches came to.
        numbers: What it came to, where the host knows that: of a small model.
        tensors: What was summed of each tensor, by pattern.
        kind: What rows have to have alike to be copied together.
    """

    noted: Noted
    names: tuple[str, ...]
    ranked: bool
    new_policy: str | None
    parts: tuple[_Part, ...]
    report: Report | None
    numbers: Numbers | None
    tensors: tuple[TensorSums, ...]
    kind: tuple[Any, ...]

    @classmethod
    def of(cls, result: "ClipResult", noted: Noted) -> "RecordRow":
        """Take from a result what counts, without computing anything."""
        told = tuple(_alike(each, waits=False) for each in (noted.lr, *noted.losses))
        known = result.coefficients if result.report is None else None
        if isinstance(known, OneCoefficient) and result.tensors is not None:
            numbers, sums = _of_small(result, known), result.tensors
            kind = (_CPU, sums.sums_RA.shape, sums.present, told)
            return cls(noted, (), False, result.new_policy, (), None, numbers, (sums,), kind)
        report, groups = result.report, result.groups
        parts: tuple[_Part, ...] = ()
        if report is None:
            parts = tuple(map(_Part.of, (result, *groups.values())))
        each = (result, *groups.values())
        tensors = tuple(one.tensors for one in each if one.tensors is not None)
        device = result.device
        waits = flags.host_waits_for(device)
        values = tuple(_alike(value, waits=waits) for part in parts for value in part)
        kinds = tuple((sums.order, sums.sums_RA.shape, sums.present) for sums in tensors)
        shape = None if report is None else report.values.shape
        return cls(
            noted,
            tuple(groups),
            result.nonfinite_on_ranks is not None,
            result.new_policy,
            parts,
            report,
            None,
            tensors,
            (device, values, shape, kinds, _alike(noted.scale, waits=True), told),
        )

    @property
    def size(self) -> int:
        """How many numbers it keeps on the device."""
        norms = sum(part.norms_S.numel() for part in self.parts)
        return sum(each.sums_RA.numel() for each in self.tensors) + 4 * norms


class RecordedStep(NamedTuple):
    """What one step came to, on the host.

    Attributes:
        row: What it left behind, of which only what the host knew is looked at.
        losses: Of its window.
        lr: The learning rate.
        numbers: For all, and for each pattern.
        norms: log10 of the norm of each parameter, float16.
    """

    row: RecordRow
    losses: list[float]
    lr: float | None
    numbers: list[Numbers]
    norms: bytes


def copy_recorded(rows: Sequence[RecordRow], waiting: bool) -> list["CopiedRecords"]:
    """Begin to bring rows to the host: together, as far as they are alike.

    Args:
        rows: What each step left behind.
        waiting: Whether the host waits for them now.
    """
    with torch.no_grad():
        alike = [list(some) for _, some in groupby(rows, attrgetter("kind"))]
        return [CopiedRecords(some, waiting) for some in alike]


class CopiedRecords:
    """Some steps that are alike, on their way to the host.

    Args:
        rows: What each left behind.
        waiting: Whether the host waits for them now.
    """

    def __init__(self, rows: Sequence[RecordRow], waiting: bool) -> None:
        self._rows = rows
        first = rows[0]
        device = first.kind[0]
        self.waits = flags.host_waits_for(device) and not waiting
        reports = [row.report for row in rows if row.report is not None]
        columns = [torch.stack([report.values for report in reports], 1)] if reports else []
        of_parts = zip(*(row.parts for row in rows), strict=True)
        columns += [_columns(parts, device) for parts in of_parts]
        noted = list(zip(*((row.noted.lr, *row.noted.losses) for row in rows), strict=True))
        self._known = [None if isinstance(values[0], Tensor) else values for values in noted]
        columns += [_column(each, device)[None] for each in noted if isinstance(each[0], Tensor)]
        norms = _norms(rows) if first.tensors else None
        self._numbers = self._there(torch.cat(columns)) if columns else None
        self._norms = None if norms is None else self._there(norms)

    def _there(self, values: Tensor) -> Tensor | HostCopy:
        copied = copy_to_host(values) if self.waits else None
        return values.cpu() if copied is None else copied

    def read(self) -> list[RecordedStep]:
        """Return what the steps came to; waits until it is there."""
        read, count = _read(self._numbers), len(self._rows)
        columns = [read[at : at + count] for at in range(0, len(read), count)]
        first = len(columns) - self._known.count(None)
        late = iter(columns[first:])
        noted = [next(late) if known is None else known for known in self._known]
        found = zip(*columns[:first], strict=True) if first else [()] * count
        return [
            RecordedStep(row, losses, lr, _of_row(row, numbers), norms)
            for row, (lr, *losses), numbers, norms in zip(
                self._rows, zip(*noted, strict=True), found, self._norms_of_each(), strict=True
            )
        ]

    def _norms_of_each(self) -> list[bytes]:
        """Return the norms of each step, with a zero for each parameter without a gradient."""
        count, norms = len(self._rows), self._norms
        if norms is None:
            return [b""] * count
        values = _read(norms)
        data = struct.pack(f"<{len(values)}h", *map(int, values))
        size = len(data) // count
        rows = [data[size * number : size * (number + 1)] for number in range(count)]
        tensors = self._rows[0].tensors
        if all(each.present is None for each in tensors):
            return rows
        there = [has for each in tensors for has in each.present or [True] * each.count]
        places = [2 * place for place, has in enumerate(there) if has]
        filled = []
        for row in rows:
            whole = bytearray(_ZERO * len(there))
            for number, place in enumerate(places):
                whole[place : place + 2] = row[2 * number : 2 * number + 2]
            filled.append(bytes(whole))
        return filled


def _alike(value: Any, *, waits: bool) -> Any:
    """Return what values have to have alike to be handled as one.

    Args:
        value: A tensor, a number or a flag.
        waits: Whether numbers cannot be brought to where tensors are without waiting.
    """
    if isinstance(value, Tensor):
        return value.shape
    return value if waits or value is None else type(value)


def _column(values: Sequence[Any], device: torch.device) -> Tensor:
    """Return a number of each step: float64 (B,)."""
    if isinstance(values[0], Tensor):
        there = [each.detach().reshape(()).to(device, non_blocking=True) for each in values]
        return torch.stack(there).to(torch.float64)
    if flags.host_waits_for(device):  # they are alike
        return torch.full((len(values),), float(values[0]), dtype=torch.float64, device=device)
    return torch.tensor(values, dtype=torch.float64, device=device)


def _columns(parts: Sequence[_Part], device: torch.device) -> Tensor:
    """Return ``Numbers`` of a pattern at some steps: float64 (8, B)."""
    first, shape = parts[0], (len(parts), max(parts[0].norms_S.numel(), 1))
    norms_BS = _of_scopes([part.norms_S for part in parts], shape, device, 0.0)
    kept_BS = _of_scopes([part.kept for part in parts], shape, device, 1.0)
    thresholds_BS = _of_scopes([part.thresholds for part in parts], shape, device, torch.inf)
    left_BS = norms_BS * kept_BS
    if first.left_S is not None:
        left_BS = _of_scopes([part.left_S for part in parts], shape, device, 0.0)
    left_BS = torch.where(kept_BS == 0, 0.0, left_BS)
    withheld = _column([part.withheld for part in parts], device)
    if first.clamped is None:
        less = (kept_BS < 1).any(1)
    else:
        less = _column([part.clamped for part in parts], device) > 0
    if first.nonfinite is not None:
        nonfinite = _column([part.nonfinite for part in parts], device)
    elif first.sums_T is not None:
        nonfinite = (~torch.stack([part.sums_T for part in parts]).isfinite()).sum(1)  # type: ignore[misc]
    else:
        nonfinite = torch.zeros_like(withheld)
    coefficient, smallest = kept_BS.min(1)
    columns = (  # as in ``Numbers``
        norms_of_all(norms_BS, first.order),
        norms_of_all(left_BS, first.order),
        thresholds_BS.gather(1, smallest[:, None])[:, 0],
        coefficient,
        less & (withheld == 0),
        withheld,
        nonfinite,
        _column([part.by_policy for part in parts], device),
    )
    return torch.stack([each.to(torch.float64) for each in columns])


def _of_scopes(
    values: Sequence[Any], shape: tuple[int, int], device: torch.device, of_none: float
) -> Tensor:
    """Return a number of each scope at each step: float64 (B, S)."""
    if not isinstance(values[0], Tensor):
        return _column(values, device)[:, None].expand(shape)
    if not values[0].numel():
        return torch.full(shape, of_none, dtype=torch.float64, device=device)
    stacked: Tensor = torch.stack(list(values)).to(torch.float64)
    return stacked.reshape(shape[0], -1).expand(shape)


def _norms(rows: Sequence[RecordRow]) -> Tensor:
    """Return log10 of the norm of each tensor at some steps, the bits of float16: int16 (B, T)."""
    found = [
        of_pattern[0].norms(torch.stack([each.sums_RA for each in of_pattern]))
        for of_pattern in zip(*(row.tensors for row in rows), strict=True)
    ]
    norms_BT = torch.cat(found, 1)
    scales = [row.noted.scale for row in rows]
    if isinstance(scales[0], Tensor):
        norms_BT = norms_BT / _column(scales, norms_BT.device)[:, None]
    elif scales[0] is not None:  # all alike
        norms_BT = norms_BT / scales[0]
    return norms_BT.log10().to(torch.float16).view(torch.int16)


def _read(values: Tensor | HostCopy | None) -> list[float]:
    """Return numbers that were copied; waits until they are there."""
    if values is None:
        return []
    return values.flatten().tolist() if isinstance(values, Tensor) else values.read()


def _of_small(result: "ClipResult", known: OneCoefficient) -> Numbers:
    """Return what a step of a small model came to, all of which the host knows."""
    norm, number, left = known.norm, known.number, result.left_norm
    clipped = number < 1 if result.clamped is None else result.clamped is True
    left = norm * number if left is None else left
    threshold = float(result.thresholds)
    return Numbers(norm, left, threshold, number, float(clipped), 0.0, 0.0, 0.0)


def _of_row(row: RecordRow, found: Sequence[float]) -> list[Numbers]:
    """Return what a step came to: for all gradients, and for each pattern."""
    if row.numbers is not None:
        return [row.numbers]
    if row.report is not None:
        return _of_report(row, found)
    width = len(Numbers._fields)
    return [Numbers(*found[at : at + width]) for at in range(0, len(found), width)]


def _of_report(row: RecordRow, found: Sequence[float]) -> list[Numbers]:
    """Return what a report says of all patterns, and of each: see ``kernels.fused``."""
    patterns = len(found) // fused.COLUMNS - 1
    return [
        Numbers(
            *(_single(found[column * (patterns + 1) + at]) for column in _SINGLES),
            *(_integer(found[column * (patterns + 1) + at]) for column in _INTEGERS),
        )
        for at in ([patterns, *range(patterns)] if row.names else [patterns])
    ]


_SINGLES = (fused.NORM_PRE, fused.NORM_POST, fused.THRESHOLD, fused.SMALLEST)
_INTEGERS = (fused.CLIPPED, fused.SKIPPED, fused.NONFINITE, fused.BY_POLICY)


def _single(value: float) -> float:
    """Return the float32 in the first half of a float64."""
    number: float = struct.unpack("<f", struct.pack("<d", value)[:4])[0]
    return number


def _integer(value: float) -> float:
    """Return the integer that the bits of a float64 are."""
    return float(struct.unpack("<q", struct.pack("<d", value))[0])
