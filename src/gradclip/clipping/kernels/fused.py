"""What a clip in few launches is told, and what it reports: numbers that stay on the device.

A report is one small piece of memory, a column for each kind of number: one number for each
pattern, and behind them one for all patterns together. Results are views of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import inf
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradclip.clipping import flags
from gradclip.clipping.kernels.device import HostCopy, copy_to_host
from gradclip.clipping.kernels.tables import Table
from gradclip.clipping.kernels.tensor_specs import TensorSpecs

_Plan = TypeVar("_Plan")

NORM, COEFFICIENT, REMAINING = 0, 1, 2
"""Columns of float64: norms before and after, and what gradients are multiplied by."""

NORM_PRE, NORM_POST, SMALLEST, THRESHOLD = 3, 4, 5, 6
"""Columns of float32, as they are reported: in every second place."""

CLIPPED, SKIPPED, BY_POLICY, BOUNDED, NONFINITE = 7, 8, 9, 10, 11
"""Columns of int64: flags, and how many tensors are not finite."""

COLUMNS = 12
LIMITS = 8
"""Numbers that bound a pattern."""


@dataclass(frozen=True)
class Limit:
    """What bounds a pattern, as numbers.

    Args:
        threshold: Norm above which it is scaled.
        target: Norm that it gets.
        skip_above: Norm above which the step is not made.
        guard: Relative margin that keeps rounding from exceeding the target.
        otherwise: The coefficient where a NaN or an infinity forbids the step: 0, or 1.
        writes: Whether its gradients may be changed.
        element_limit: Largest modulus of an element; None where elements are not limited.
    """

    threshold: float
    target: float
    skip_above: float
    guard: float
    otherwise: float
    writes: bool
    element_limit: float | None

    @property
    def clamps(self) -> bool:
        """Whether elements may be changed."""
        return self.writes and self.element_limit is not None

    @property
    def scales(self) -> bool:
        """Whether the coefficient can be another one than 1."""
        bounds = self.threshold < inf or self.skip_above < inf
        return self.writes and (bounds or self.otherwise == 0)

    @property
    def shown(self) -> float:
        """The limit that is reported."""
        return self.threshold if self.element_limit is None else self.element_limit

    @property
    def numbers(self) -> list[float]:
        """Those that the device is told: ``LIMITS``."""
        limited = self.element_limit is not None
        return [
            self.threshold,
            self.target,
            self.skip_above,
            1 - self.guard,
            self.otherwise,
            float(self.writes),
            float(limited),
            self.shown,
        ]


class Layout:
    """The gradients of all patterns as one list: the same from step to step.

    Args:
        parts: Of each pattern; all on one device.
        limits: What bounds each pattern.
        power: p of all norms: 1, 2 or inf.
        skips: Whether a NaN makes the step one that should not be made.
    """

    def __init__(
        self,
        parts: Sequence[TensorSpecs],
        limits: Sequence[Limit],
        power: float,
        *,
        skips: bool,
    ) -> None:
        self.specs = parts[0] if len(parts) == 1 else TensorSpecs.joined(parts)
        self.device = self.specs.devices[0]
        self.limits, self.power, self.skips = limits, power, skips
        self.patterns = len(limits)
        """P."""
        self.starts = [0, *accumulate(map(len, parts))]
        """The first tensor of each pattern, and how many there are: P + 1."""
        self.starts_table = Table.of(self.starts)
        self.limits_table = Table.of([limit.numbers for limit in limits], torch.float64)
        self._plans: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without what was worked out: compiled programs, and memory."""
        return {**vars(self), "_plans": {}}

    @property
    def shown_thresholds(self) -> Tensor:
        """The limits that are reported, float64 (P,), on the device."""
        return self.limits_table.on(self.device)[:, LIMITS - 1]

    @cached_property
    def clamps(self) -> bool:
        """Whether elements of any pattern may be clamped."""
        return any(limit.clamps for limit in self.limits)

    @cached_property
    def may_skip(self) -> bool:
        """Whether a policy may ask to skip the step."""
        return any(limit.writes and limit.skip_above < inf for limit in self.limits)

    @cached_property
    def scales(self) -> bool:
        """Whether any gradient may be multiplied by another number than 1."""
        return any(limit.scales for limit in self.limits)

    def plan(self, kind: Callable[["Layout"], _Plan]) -> _Plan:
        """Return what ``kind`` makes of this layout: made once, and kept with it."""
        if kind not in self._plans:
            self._plans[kind] = kind(self)
        plan: _Plan = self._plans[kind]
        return plan


@dataclass(frozen=True, eq=False)
class FusedStep:
    """One clip in few launches.

    Args:
        layout: What the gradients are like.
        tensors: The gradients.
        addresses: Where each begins.
        grad_scale: What they are still multiplied by: a number, or a tensor on their device.
        scales: Whether to multiply them; otherwise the caller does.
        allows: Asked behind the first launch, before anything is written: whether to go on.
        accepts: Asked with the report, before anything is multiplied: whether to go on.
    """

    layout: Layout
    tensors: Sequence[Tensor]
    addresses: list[int]
    grad_scale: float | Tensor | None
    scales: bool
    allows: Callable[[], bool]
    accepts: "Callable[[Report], bool]"


class Report:
    """What a clip in few launches came to, on the device.

    Args:
        values: The columns, one behind the other: float64 (COLUMNS * (P + 1),).
        sums_T: A number for each tensor, not finite just where the tensor is not: float64, at
            least (T,).
        patterns: P.
    """

    __slots__ = ("_width", "sums_T", "values")

    def __init__(self, values: Tensor, sums_T: Tensor, patterns: int) -> None:
        self.values, self.sums_T, self._width = values, sums_T, patterns + 1

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the memory of other calls."""
        return Report, (self.values.clone(), self.sums_T.clone(), self.patterns)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.values.device

    @property
    def patterns(self) -> int:
        """P."""
        return self._width - 1

    def wide(self, column: int, first: int, last: int) -> Tensor:
        """Return numbers of some patterns in float64, (last - first,)."""
        start = column * self._width
        return self.values[start + first : start + last]

    def single(self, column: int, first: int, last: int) -> Tensor:
        """Return numbers of some patterns in float32, (last - first,)."""
        start = 2 * column * self._width
        return self.values.view(torch.float32)[start + 2 * first : start + 2 * last : 2]

    def flag(self, column: int, at: int) -> Tensor:
        """Return a flag of a pattern, or of all for ``at`` = P: 0-d bool."""
        return self.values.view(torch.bool)[8 * (column * self._width + at)]

    def count(self, column: int, at: int) -> Tensor:
        """Return a count of a pattern, or of all for ``at`` = P: 0-d int64."""
        return self.values.view(torch.int64)[column * self._width + at]

    @property
    def norm(self) -> Tensor:
        """The norm of all patterns together: 0-d float64."""
        return self.wide(NORM, self._width - 1, self._width)[0]

    @property
    def is_bounded(self) -> bool:
        """Whether there is no norm that a policy cannot bound; waits for the device."""
        return bool(self.flag(BOUNDED, self.patterns))

    def to_host(self) -> "HostReport | None":
        """Begin to copy the report to the host; None inside a CUDA graph."""
        if not flags.host_waits_for(self.device):
            return HostReport(self.values, self._width)
        copy = copy_to_host(self.values)
        return None if copy is None else HostReport(copy, self._width)


class HostReport:
    """A report on its way to the host.

    Args:
        values: Its columns, their copy, or their numbers.
        width: P + 1.
    """

    __slots__ = ("_at", "_values")

    def __init__(self, values: Tensor | HostCopy | list[float], width: int) -> None:
        self._values = values
        self._at = width

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle what it says; waits until that is there."""
        return HostReport, (self.numbers(), self._at)

    @property
    def waits(self) -> bool:
        """Whether to read it now would make the host wait."""
        return isinstance(self._values, HostCopy)

    def numbers(self) -> list[float]:
        """Return all columns; waits until they are there.

        Flags and counts are integers: their bits as a float64 are 0 just where they are.
        """
        values = self._values
        if not isinstance(values, list):
            self._values = values = values.tolist() if isinstance(values, Tensor) else values.read()
        return values

    def of_all(self, column: int) -> float:
        """Return what a column says of all patterns together."""
        return self.numbers()[(column + 1) * self._at - 1]

    def read(self) -> list[float]:
        """Return whether the step was skipped, and whether a policy asked for that."""
        return [self.of_all(SKIPPED), self.of_all(BY_POLICY)]


@dataclass(frozen=True, eq=False)
class FusedClip:
    """What a clip in few launches came to.

    Args:
        report: Its numbers on the device.
        on_host: The same on their way to the host; None inside a CUDA graph.
        layout: What the gradients were like.
        deferred: Whether the gradients were left as they are, for the optimizer to scale.
    """

    report: Report
    on_host: HostReport | None
    layout: Layout
    deferred: bool
