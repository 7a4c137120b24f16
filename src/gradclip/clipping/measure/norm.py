"""From sums per row to norms per scope: the only numbers that a policy sees."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, nan
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from gradclip.clipping.kernels import Backends, Batch, Clamped, Kernels, Layout
from gradclip.clipping.kernels.blocks import SCALE_EXPONENT, representable, rows_of, widened
from gradclip.clipping.kernels.tables import Table

_UP, _DOWN = 2.0**SCALE_EXPONENT, 2.0**-SCALE_EXPONENT
_EUCLIDEAN = 2.0
_LOST_ROOT = 2.0**-450
"""The norm of a vector with squares that float64 may have lost is below this."""

_LARGEST = torch.finfo(torch.float64).max


@dataclass(eq=False)
class Measured:
    """What was measured of one group of gradients.

    Args:
        norms_S: p-norm of each scope, float64: infinite or NaN only where a gradient is.
        norm_type: p.
        witness_T: A number for each tensor: not finite just where the tensor is not, and NaN just
            where it holds a NaN.
    """

    norms_S: Tensor
    norm_type: float
    witness_T: Tensor


class Scopes(Protocol):
    """Which scope each row of a batch belongs to, and for how much of it this rank answers."""

    def sums(self, values_RA: Tensor) -> Tensor:
        """Add up rows by scope: (S, A)."""
        ...

    def maxima(self, values_R: Tensor) -> Tensor:
        """Return the largest row of each scope, (S,); NaN where there is one."""
        ...

    def spread(self, values_S: Tensor) -> Tensor:
        """Give each row that is there what its scope has, (R,); (1,) where all have the same."""
        ...


class Together:
    """All rows are one scope."""

    def sums(self, values_RA: Tensor) -> Tensor:
        """Add up all rows: (1, A)."""
        return values_RA.sum(0, keepdim=True)

    def maxima(self, values_R: Tensor) -> Tensor:
        """Return the largest of all rows: (1,)."""
        return values_R.amax(0, keepdim=True) if len(values_R) else values_R.new_zeros(1)

    def spread(self, values_S: Tensor) -> Tensor:
        """Give every row the same number."""
        return values_S


class Apart:
    """Each row is a scope of its own."""

    def sums(self, values_RA: Tensor) -> Tensor:
        """Return the rows."""
        return values_RA

    def maxima(self, values_R: Tensor) -> Tensor:
        """Return the rows."""
        return values_R

    def spread(self, values_S: Tensor) -> Tensor:
        """Return the scopes."""
        return values_S


class Norm:
    """A norm on its way from gradients to a number: between the stages, ranks may add theirs.

    Args:
        order: p, > 0 or inf.
        scopes: How rows become scopes.
    """

    def __init__(self, order: float, scopes: Scopes) -> None:
        self.order = order
        self.scopes = scopes
        self.rows_RA: Tensor
        """What was found of each row in the first read."""
        self.sums_SA: Tensor
        """Sums of powers of each scope, (S, A); for p = inf its NaN, if it has any, and else 0."""
        self.maxima_S: Tensor | None = None
        """The largest modulus in each scope, (S,), where p asks for it."""

    @property
    def reads_twice(self) -> bool:
        """Whether the largest modulus has to be known before powers are summed."""
        return self.order not in {1.0, 2.0, inf}

    def read(
        self, backends: Backends, batch: Batch, home: torch.device, sums_RA: Tensor | None = None
    ) -> None:
        """Read the tensors: their sums for p = 1, 2, else their maxima.

        Args:
            backends: The choice of backend.
            batch: Real tensors, of any devices, dtypes and shapes.
            home: Device of the results.
            sums_RA: What was summed already, for p = 1, 2.
        """
        p = self.order
        if not batch.tensors:
            self.rows_RA = torch.zeros(0, 1, dtype=torch.float64, device=home)
        elif sums_RA is not None:
            self.rows_RA = sums_RA
        elif p in {1.0, 2.0}:
            self.rows_RA = _everywhere(
                lambda kernels, part, _: kernels.power_sums(part, p), backends, batch, home, p
            )
        else:
            self.rows_RA = _everywhere(
                lambda kernels, part, _: kernels.abs_max(part), backends, batch, home, p
            )
        if p in {1.0, 2.0}:
            self.sums_SA = self.scopes.sums(self.rows_RA)
            return
        self.maxima_S = self.scopes.maxima(self.rows_RA[:, 0])
        self.sums_SA = torch.where(self.maxima_S.isnan(), self.maxima_S, 0.0)[:, None]

    def read_again(self, backends: Backends, batch: Batch) -> None:
        """Sum ``|x / max|**p``, which is in range for every p, where p asks for it."""
        if not self.reads_twice:
            return
        assert self.maxima_S is not None
        home = self.maxima_S.device
        if not batch.tensors:
            sums_RA = self.rows_RA
        else:
            scale_R = self.scopes.spread(self._scale_S)
            if len(scale_R) != len(batch.layout.row_sizes):
                scale_R = scale_R.expand(len(batch.layout.row_sizes))
            sums_RA = _everywhere(
                lambda kernels, part, there: kernels.scaled_power_sums(
                    part, self.order, there(scale_R)
                ),
                backends,
                batch,
                home,
                self.order,
            )
        self.sums_SA = self.scopes.sums(sums_RA)

    @property
    def _scale_S(self) -> Tensor:
        assert self.maxima_S is not None
        return torch.where((self.maxima_S > 0) & self.maxima_S.isfinite(), self.maxima_S, 1.0)

    def norms(self) -> Tensor:
        """Return the norm of each scope, float64 (S,), from sums and maxima."""
        p, sums_SA = self.order, self.sums_SA
        if self.maxima_S is None:
            norms_S = _root(sums_SA, p)
            if p == _EUCLIDEAN and sums_SA.shape[1] == 1:
                return norms_S
            return _saturated(norms_S, sums_SA[:, sums_SA.shape[1] // 2])
        if p == inf:
            return torch.where(sums_SA[:, 0].isnan(), nan, self.maxima_S)
        return _saturated(self._scale_S * sums_SA[:, 0].pow(1 / p), self.maxima_S)

    @property
    def witness_R(self) -> Tensor:
        """A number for each row: not finite just where the row is not, (R,)."""
        return self.rows_RA[:, self.rows_RA.shape[1] // 2]


def clamp_everywhere(
    backends: Backends, batch: Batch, limit: float | Tensor, home: torch.device, *, before: bool
) -> Clamped:
    """Clamp every element to [-limit, limit], wherever it is.

    Args:
        backends: The choice of backend.
        batch: Real tensors, of any devices, dtypes and shapes.
        limit: A number, or 0-d float64.
        home: Device of the results.
        before: Whether the squares of what was there are summed on the way.
    """
    found: list[Clamped] = []
    for part, _ in batch.parts:
        there = limit.to(part.device) if isinstance(limit, Tensor) else limit
        found.append(backends.on(part.device).clamp_(part, there, before))
    changed = [clamped.changed.to(home) for clamped in found]
    return Clamped(
        _together([clamped.before_RA for clamped in found], batch, home),
        _together([clamped.after_RA for clamped in found], batch, home),
        changed[0] if len(changed) == 1 else torch.stack(changed).sum(),
    )


def sums_if_clamped(
    backends: Backends, batch: Batch, limit: float | Tensor, p: float, home: torch.device
) -> tuple[Tensor, Tensor]:
    """Return what clamping would leave, and how many elements it would change; writes nothing.

    Args:
        backends: The choice of backend.
        batch: Real tensors, of any devices, dtypes and shapes.
        limit: A number, or 0-d float64.
        p: 1 or 2.
        home: Device of the results.

    Returns:
        The sums of powers of each row, (R, A), and a count: 0-d float64. Copies are made of at most
        2^21 elements at a time, or of one row.
    """
    found: list[Tensor] = []
    changed = torch.zeros((), dtype=torch.float64, device=home)
    for part, _ in batch.parts:
        top = representable(limit, part.dtype)
        if isinstance(top, Tensor):
            top = top.to(part.device)
        rows = [
            row
            for tensor, n in zip(part.tensors, part.layout.rows, strict=True)
            for row in rows_of(tensor, n)
        ]
        sums: list[Tensor] = []
        for some in _in_turns(rows):
            clamped = [row.clamp(-top, top) for row in some]  # type: ignore[arg-type]
            differ = [(row.abs() > top).sum() for row in some]
            changed = changed + torch.stack(differ).sum().to(home)
            sums.append(backends.on(part.device).power_sums(Batch.of(clamped), p))
        found.append(torch.cat(sums))
    together = _together(found, batch, home, p)
    assert together is not None or not batch.tensors
    return torch.zeros(
        0, 1, dtype=torch.float64, device=home
    ) if together is None else together, changed


def _in_turns(rows: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    turn: list[Tensor] = []
    size = 0
    for row in rows:
        if turn and size + row.numel() > _COPIED:
            yield turn
            turn, size = [], 0
        turn.append(row)
        size += row.numel()
    if turn:
        yield turn


_COPIED = 1 << 21


def per_tensor(witness_R: Tensor, layout: Layout) -> Tensor:
    """Return a number for each tensor, (T,): not finite just where one of its rows is not."""
    if layout.one_row_each:
        return witness_R
    rows = witness_R.split(layout.rows)
    return torch.stack([of_one.amax() if len(of_one) else of_one.sum() for of_one in rows])


def _saturated(norms_S: Tensor, witness_S: Tensor) -> Tensor:
    """Keep a norm finite whose elements are, though it is beyond float64."""
    return torch.where(witness_S < inf, norms_S.clamp(max=_LARGEST), norms_S)


def combine(norms_S: Tensor, norm_type: float) -> Tensor:
    """Return the p-norm of norms, 0-d float64, without leaving float64's range."""
    if len(norms_S) == 1:
        return norms_S[0]
    if len(norms_S) == 0:
        return norms_S.sum()
    largest = norms_S.amax()
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    relative: Tensor = torch.linalg.vector_norm(norms_S / scale, norm_type)
    return relative * scale


def _root(sums_SA: Tensor, p: float) -> Tensor:
    """Return norms (S,) from sums of powers for p = 1, 2: (S, 1), or (S, 3) with range."""
    roots_SA = sums_SA.sqrt() if p == _EUCLIDEAN else sums_SA
    if sums_SA.shape[1] == 1:
        return roots_SA[:, 0]
    middle_S, down_S, up_S = roots_SA.unbind(1)
    in_range_S = torch.where(middle_S < _LOST_ROOT, up_S * _DOWN, middle_S)
    return torch.where(middle_S.isinf(), down_S * _UP, in_range_S)


_There: TypeAlias = Callable[[Tensor], Tensor]
"""Brings what belongs to all rows, (R,), to a part: what belongs to the rows that are there."""


def _everywhere(
    operation: Callable[[Kernels, Batch, _There], Tensor],
    backends: Backends,
    batch: Batch,
    home: torch.device,
    p: float,
) -> Tensor:
    """Run an operation on each part of a batch, and bring its rows home in order: (R, A)."""
    found: list[Tensor] = []
    for part, rows in batch.parts:
        bring = partial(_bring, part.device, rows)
        found.append(operation(backends.on(part.device), part, bring))
    together = _together(found, batch, home, p)
    assert together is not None
    return together


def _together(
    found: Sequence[Tensor | None], batch: Batch, home: torch.device, p: float = _EUCLIDEAN
) -> Tensor | None:
    """Bring what was found of each part home, its rows in order: (R, A); None if one has none."""
    there = [some.to(home) for some in found if some is not None]
    if not there or len(there) < len(found):
        return None
    if len(there) == 1:
        return there[0]
    columns = max(some.shape[1] for some in there)
    table = torch.cat([some if some.shape[1] == columns else widened(some, p) for some in there])
    return table[batch.layout.row_order.on(home)]


def _bring(device: torch.device, rows: Table | None, values_R: Tensor) -> Tensor:
    mine = values_R if rows is None else values_R[rows.on(values_R.device)]
    return mine.to(device)
