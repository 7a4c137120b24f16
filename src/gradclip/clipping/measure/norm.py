"""From gradients to norms: one read of every gradient, sums by row and by scope, then a root.

Between the stages ranks may replace sums and maxima by those of all ranks. For p = 1, 2 and inf
gradients are read once. Every other p takes two reads: the maximum first, then the sum of
``|x / maximum|**p``, which is in range whatever x is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf, isfinite, nan
from typing import TypeAlias

import torch
from torch import Tensor

from gradclip.clipping import flags
from gradclip.clipping.kernels import Backends, Batch, Kernels, TensorSpecs
from gradclip.clipping.kernels.blocks import LARGEST, SCALE_EXPONENT, widened
from gradclip.clipping.kernels.tables import Table
from gradclip.clipping.measure.scopes import RowMap

_UP, _DOWN = 2.0**SCALE_EXPONENT, 2.0**-SCALE_EXPONENT
_EUCLIDEAN = 2.0
_LOST_ROOT = 2.0**-450
"""The norm of a vector with squares that float64 may have lost is below this."""

REDUCED = 1100
"""A norm times 2^-1100 is in range, however large gradients are and however small a scale is."""

_HALF_DOWN, _HALF_UP = 2.0 ** -(REDUCED // 2), 2.0 ** (REDUCED // 2)
_STEEP = 0.25
"""For a smaller p a norm may be beyond float64 though every element is a float32."""


@dataclass(frozen=True, eq=False)
class Sums:
    """A norm on its way from gradients to a number.

    Args:
        order: p, > 0 or inf.
        rows_RA: What was found of each row that exists here, (R, A); of several rows together, in
            any order, where only their total was asked for.
        sums_SA: Sums of powers of each scope, (S, A). For p = inf NaN where there is one, else 0.
        maxima_S: The largest modulus in each scope, (S,), where p asks for it.
        down_S: The same times 2^-600, where moduli may be beyond float64, of this process alone.
    """

    order: float
    rows_RA: Tensor
    sums_SA: Tensor
    maxima_S: Tensor | None = None
    down_S: Tensor | None = None

    def norms(self, scale: float | Tensor | None = None, *, wide: bool = False) -> Tensor:
        """Return the norm of each scope, float64 (S,), from sums and maxima.

        The largest float64 stands for the norm of finite elements that is beyond it.

        Args:
            scale: What the norms are divided by.
            wide: Whether a norm may be beyond float64, which sums of float64 gradients show too.
        """
        norms_S = self._norms() if scale is None else self._norms() / scale
        # A maximum is in range by itself.
        wide = wide and not (scale is None and self.order == inf)
        if not (wide or self.sums_SA.shape[1] > 1 or self.order < _STEEP):
            return norms_S
        if not flags.host_waits_for(norms_S.device) and bool((norms_S < inf).all()):
            return norms_S
        reduced_S = self.reduced(scale)
        limited_S = (reduced_S * _HALF_UP * _HALF_UP).clamp(max=LARGEST)
        return torch.where(norms_S.isinf() & (reduced_S < inf), limited_S, norms_S)

    def reduced(self, scale: float | Tensor | None = None) -> Tensor:
        """Return the norms divided by a scale, times 2^-1100: none is beyond float64, (S,).

        Only norms that are large have all their digits.
        """
        if scale is None:
            return self._halfway() * _HALF_DOWN
        root: float | Tensor = scale**0.5 * _HALF_UP**0.5
        return self._halfway() / root / root  # each of the two divisions stays in range

    def _norms(self) -> Tensor:
        """Return norms that are infinite where they are beyond float64, (S,)."""
        if self.maxima_S is None:
            return _root(self.sums_SA, self.order)
        if self.order == inf:
            return torch.where(self.sums_SA[:, 0].isnan(), nan, self.maxima_S)
        return self.scale_S * self.sums_SA[:, 0].pow(1 / self.order)

    def _halfway(self) -> Tensor:
        """Return the norms times 2^-550, (S,)."""
        if self.maxima_S is None:
            roots_SA = self.sums_SA.sqrt() if self.order == _EUCLIDEAN else self.sums_SA
            if roots_SA.shape[1] == 1:
                return roots_SA[:, 0] * _HALF_DOWN
            middle_S, down_S, _ = roots_SA.unbind(1)
            return torch.where(middle_S.isinf(), down_S * (_UP * _HALF_DOWN), middle_S * _HALF_DOWN)
        if self.order == inf and self.down_S is not None:
            return self.down_S * (_UP * _HALF_DOWN)
        if self.order == inf:
            # Of a modulus beyond float64 other ranks know only that it is at most this.
            beyond_S = self.maxima_S == LARGEST
            halfway_S = self.maxima_S * _HALF_DOWN
            return torch.where(beyond_S, halfway_S * 2**0.5, halfway_S)
        half_root_S = self.sums_SA[:, 0].pow(0.5 / self.order)
        product_S = self.scale_S.sqrt() * (half_root_S * _HALF_DOWN**0.5)
        limited_S = product_S.square().clamp(max=LARGEST)
        return torch.where(self.maxima_S < inf, limited_S, self.maxima_S)

    @property
    def scale_S(self) -> Tensor:
        """What elements are divided by before their powers are taken: positive and finite, (S,)."""
        assert self.maxima_S is not None
        return torch.where((self.maxima_S > 0) & self.maxima_S.isfinite(), self.maxima_S, 1.0)

    @property
    def row_sums_R(self) -> Tensor:
        """A number for each row: not finite just where the row is not, (R,)."""
        return self.rows_RA[:, self.rows_RA.shape[1] // 2]

    @property
    def are_finite(self) -> bool:
        """Whether everything that was read is finite; the host waits for it."""
        found = (
            self.sums_SA[:, self.sums_SA.shape[1] // 2] if self.maxima_S is None else self.maxima_S
        )
        return all(map(isfinite, found.tolist()))


def reads_twice(order: float) -> bool:
    """Return whether the largest modulus has to be known before powers are summed."""
    return order not in {1.0, 2.0, inf}


def read(
    backends: Backends,
    batch: Batch,
    device: torch.device,
    order: float,
    rows: RowMap,
    sums_RA: Tensor | None = None,
    *,
    together: bool = False,
) -> Sums:
    """Read tensors: their sums for p = 1, 2, else their maxima.

    Args:
        backends: The choice of backend.
        batch: Real tensors, of any devices, dtypes and shapes.
        device: That of the results.
        order: p.
        rows: Which scope each row has.
        sums_RA: What was summed already, for p = 1, 2.
        together: Whether only what all rows come to is asked for.
    """
    if together:
        batch = batch.joined()
    if not batch.tensors:
        rows_RA = torch.zeros(0, 1, dtype=torch.float64, device=device)
    elif sums_RA is not None:
        rows_RA = sums_RA
    elif order in {1.0, 2.0}:
        rows_RA = everywhere(
            lambda kernels, part, _: kernels.power_sums(part, order), backends, batch, device, order
        )
    else:
        rows_RA = everywhere(
            lambda kernels, part, _: kernels.abs_max(part), backends, batch, device, order
        )
    return by_scope(order, rows_RA, rows)


def by_scope(order: float, rows_RA: Tensor, rows: RowMap) -> Sums:
    """Bring what was found of rows in the first read together by scope."""
    if order in {1.0, 2.0}:
        return Sums(order, rows_RA, rows.sums(rows_RA))
    maxima_S = rows.maxima(rows_RA[:, 0])
    down_S = rows.maxima(rows_RA[:, 1]) if rows_RA.shape[1] > 1 else None
    nans_S = torch.where(maxima_S.isnan(), maxima_S, 0.0)
    return Sums(order, rows_RA, nans_S[:, None], maxima_S, down_S)


def read_again(
    backends: Backends, batch: Batch, found: Sums, rows: RowMap
) -> tuple[Sums, Tensor | None]:
    """Sum ``|x / maximum|**p``, where p asks for it, with the maxima that ``found`` has by now.

    Returns:
        The sums, and those of each row: (R, 1); None where nothing was read again.
    """
    if not reads_twice(found.order):
        return found, None
    assert found.maxima_S is not None
    if not batch.tensors:
        powers_RA = found.rows_RA
    else:
        scale_R = spread_over(found.scale_S, rows, len(batch.specs.row_sizes))
        powers_RA = everywhere(
            lambda kernels, part, there: kernels.scaled_power_sums(
                part, found.order, there(scale_R)
            ),
            backends,
            batch,
            found.maxima_S.device,
            found.order,
        )
    return replace(found, sums_SA=rows.sums(powers_RA)), powers_RA


def spread_over(values_S: Tensor, rows: RowMap, count: int) -> Tensor:
    """Give each of ``count`` rows what its scope has: (R,)."""
    values_R = rows.spread(values_S)
    return values_R if len(values_R) == count else values_R.expand(count)


@dataclass(frozen=True, eq=False)
class TensorSums:
    """What was found of each tensor of a pattern, for a record.

    Args:
        order: p of its norms, > 0 or inf.
        sums_RA: Of each row that has a gradient here: sums of powers for p = 1, 2, else maxima.
        rows: How many rows each tensor has; None for one.
        present: Which parameters have a gradient; None for all.
        count: How many parameters there are.
    """

    order: float
    sums_RA: Tensor
    rows: Sequence[int] | None
    present: Sequence[bool] | None
    count: int

    @classmethod
    def of(cls, order: float, sums_RA: Tensor, found: Sequence[Tensor | None]) -> "TensorSums":
        """Return what was found of tensors of one row each.

        Args:
            order: p of the norms.
            sums_RA: Of each that exists.
            found: Each parameter's, if it has one.
        """
        whole = len(sums_RA) == len(found)
        present = None if whole else [each is not None for each in found]
        return cls(order, sums_RA, None, present, len(found))

    def norms(self, sums_BRA: Tensor) -> Tensor:
        """Return the norm of each tensor from the sums of several steps: float64 (B, T)."""
        if self.order in {1.0, _EUCLIDEAN}:
            norms_BR = _root(sums_BRA.flatten(0, 1), self.order).view(sums_BRA.shape[:2])
        else:
            norms_BR = sums_BRA[:, :, 0]
        if self.rows is None:
            return norms_BR
        of_tensors = norms_BR.split(list(self.rows), 1)
        order = shown_order(self.order)
        norms = [
            torch.linalg.vector_norm(of_one, order, dim=1) if of_one.shape[1] else of_one.sum(1)
            for of_one in of_tensors
        ]
        return torch.stack(norms, 1)


def shown_order(order: float) -> float:
    """Return p of the norms of single tensors: where p is read twice, that of the maximum."""
    return inf if reads_twice(order) else order


def per_tensor(row_sums_R: Tensor, specs: TensorSpecs) -> Tensor:
    """Return a number for each tensor, (T,): not finite just where one of its rows is not."""
    if specs.one_row_each:
        return row_sums_R
    rows = row_sums_R.split(specs.rows)
    return torch.stack([of_one.amax() if len(of_one) else of_one.sum() for of_one in rows])


def combine(norms_S: Tensor, norm_type: float) -> Tensor:
    """Return the p-norm of norms, 0-d float64; the largest float64 stands for one beyond it."""
    if len(norms_S) == 1:
        return norms_S[0]
    if len(norms_S) == 0:
        return norms_S.sum()
    largest = norms_S.amax()
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    relative: Tensor = torch.linalg.vector_norm(norms_S / scale, norm_type)
    # Finite norms have a finite one, though it may be beyond float64.
    return torch.minimum(relative * scale, largest.clamp(min=LARGEST))


def _root(sums_SA: Tensor, p: float) -> Tensor:
    """Return norms (S,) from sums of powers for p = 1, 2: (S, 1), or (S, 3) with range.

    float64 gradients have three sums: of x, of x * 2^-600 and of x * 2^600. Squares above 2^1024
    overflow in the first and are right in the second; squares below 2^-1022 vanish in the first
    and are right in the third. In between the first is right.
    """
    roots_SA = sums_SA.sqrt() if p == _EUCLIDEAN else sums_SA
    if sums_SA.shape[1] == 1:
        return roots_SA[:, 0]
    middle_S, down_S, up_S = roots_SA.unbind(1)
    in_range_S = torch.where(middle_S < _LOST_ROOT, up_S * _DOWN, middle_S)
    return torch.where(middle_S.isinf(), down_S * _UP, in_range_S)


def reduced(norms_S: Tensor) -> Tensor:
    """Return norms times 2^-1100, which no float64 is."""
    return norms_S * _HALF_DOWN * _HALF_DOWN


_There: TypeAlias = Callable[[Tensor], Tensor]
"""Brings what belongs to all rows, (R,), to a part: what belongs to the rows that are there."""


def everywhere(
    operation: Callable[[Kernels, Batch, _There], Tensor],
    backends: Backends,
    batch: Batch,
    device: torch.device,
    p: float,
) -> Tensor:
    """Run an operation on each part of a batch, and bring the rows to a device in order: (R, A)."""
    found: list[Tensor] = []
    for part, rows in batch.parts:
        bring = partial(_bring, part.device, rows)
        found.append(operation(backends.on(part.device), part, bring))
    return in_order(found, batch, device, p)


def in_order(
    found: Sequence[Tensor], batch: Batch, device: torch.device, p: float = _EUCLIDEAN
) -> Tensor:
    """Bring what was found of each part to a device: (R, A), rows in order if each was asked for.

    Args:
        found: (R', A') of each part.
        batch: What has the parts.
        device: Where it is brought.
        p: Of the powers that were summed.
    """
    there = [some.to(device) for some in found]
    if len(there) == 1:
        return there[0]
    columns = max(some.shape[1] for some in there)
    table = torch.cat([some if some.shape[1] == columns else widened(some, p) for some in there])
    return table if batch.together else table[batch.specs.row_order.on(device)]


def _bring(device: torch.device, rows: Table | None, values_R: Tensor) -> Tensor:
    mine = values_R if rows is None else values_R[rows.on(values_R.device)]
    return mine.to(device)
