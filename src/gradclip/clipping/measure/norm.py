"""From gradients to norms: one read of every gradient, sums by row and by scope, then a root.

Between the stages ranks may replace sums and maxima by those of all ranks. For p = 1, 2 and inf
gradients are read once. Every other p takes two reads: the maximum first, then the sum of
``|x / maximum|**p``, which is in range whatever x is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf, nan
from typing import TypeAlias

import torch
from torch import Tensor

from gradclip.clipping.kernels import Backends, Batch, Kernels, TensorSpecs
from gradclip.clipping.kernels.blocks import SCALE_EXPONENT, widened
from gradclip.clipping.kernels.tables import Table
from gradclip.clipping.measure.scopes import RowMap

_UP, _DOWN = 2.0**SCALE_EXPONENT, 2.0**-SCALE_EXPONENT
_EUCLIDEAN = 2.0
_LOST_ROOT = 2.0**-450
"""The norm of a vector with squares that float64 may have lost is below this."""

_LARGEST = torch.finfo(torch.float64).max


@dataclass(frozen=True, eq=False)
class Sums:
    """A norm on its way from gradients to a number.

    Args:
        order: p, > 0 or inf.
        rows_RA: What was found of each row that exists here: (R, A).
        sums_SA: Sums of powers of each scope, (S, A). For p = inf NaN where there is one, else 0.
        maxima_S: The largest modulus in each scope, (S,), where p asks for it.
    """

    order: float
    rows_RA: Tensor
    sums_SA: Tensor
    maxima_S: Tensor | None = None

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
        return _saturated(self.scale_S * sums_SA[:, 0].pow(1 / p), self.maxima_S)

    @property
    def scale_S(self) -> Tensor:
        """What elements are divided by before their powers are taken: positive and finite, (S,)."""
        assert self.maxima_S is not None
        return torch.where((self.maxima_S > 0) & self.maxima_S.isfinite(), self.maxima_S, 1.0)

    @property
    def row_sums_R(self) -> Tensor:
        """A number for each row: not finite just where the row is not, (R,)."""
        return self.rows_RA[:, self.rows_RA.shape[1] // 2]


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
) -> Sums:
    """Read tensors: their sums for p = 1, 2, else their maxima.

    Args:
        backends: The choice of backend.
        batch: Real tensors, of any devices, dtypes and shapes.
        device: That of the results.
        order: p.
        rows: Which scope each row has.
        sums_RA: What was summed already, for p = 1, 2.
    """
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
    return Sums(order, rows_RA, torch.where(maxima_S.isnan(), maxima_S, 0.0)[:, None], maxima_S)


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


def per_tensor(row_sums_R: Tensor, specs: TensorSpecs) -> Tensor:
    """Return a number for each tensor, (T,): not finite just where one of its rows is not."""
    if specs.one_row_each:
        return row_sums_R
    rows = row_sums_R.split(specs.rows)
    return torch.stack([of_one.amax() if len(of_one) else of_one.sum() for of_one in rows])


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


def _saturated(norms_S: Tensor, tensor_sums_S: Tensor) -> Tensor:
    """Keep a norm finite whose elements are, though it is beyond float64."""
    return torch.where(tensor_sums_S < inf, norms_S.clamp(max=_LARGEST), norms_S)


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
    together = in_order(found, batch, device, p)
    assert together is not None
    return together


def in_order(
    found: Sequence[Tensor | None], batch: Batch, device: torch.device, p: float = _EUCLIDEAN
) -> Tensor | None:
    """Bring what was found of each part to a device, rows in order: (R, A); None if one has none.

    Args:
        found: (R', A') of each part.
        batch: What has the parts.
        device: Where it is brought.
        p: Of the powers that were summed.
    """
    there = [some.to(device) for some in found if some is not None]
    if not there or len(there) < len(found):
        return None
    if len(there) == 1:
        return there[0]
    columns = max(some.shape[1] for some in there)
    table = torch.cat([some if some.shape[1] == columns else widened(some, p) for some in there])
    return table[batch.specs.row_order.on(device)]


def _bring(device: torch.device, rows: Table | None, values_R: Tensor) -> Tensor:
    mine = values_R if rows is None else values_R[rows.on(values_R.device)]
    return mine.to(device)
