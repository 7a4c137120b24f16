"""From sums per row to norms per scope: the only numbers that a policy sees."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import TypeAlias

import torch
from torch import Tensor

from gradclip.clipping.kernels import Backends, Batch, Clamped, Kernels
from gradclip.clipping.kernels.blocks import SCALE_EXPONENT, widened
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


def measure(
    backends: Backends, batch: Batch, norm_type: float, *, per_row: bool, home: torch.device
) -> Measured:
    """Measure tensors, wherever they are, in one read (two for p other than 1, 2, inf).

    Args:
        backends: The choice of backend.
        batch: Real tensors, of any devices, dtypes and shapes.
        norm_type: p, > 0 or inf.
        per_row: Whether each row is a scope of its own; otherwise all rows together are one.
        home: Device of the results.
    """
    if not batch.tensors:
        zeros = torch.zeros(0 if per_row else 1, dtype=torch.float64, device=home)
        return Measured(zeros, norm_type, zeros[:0])
    if norm_type in {1.0, 2.0}:
        sums_RA = _everywhere(
            lambda kernels, part, _: kernels.power_sums(part, norm_type),
            backends,
            batch,
            home,
            norm_type,
        )
        return from_sums(sums_RA, batch, norm_type, per_row=per_row)
    maxima_RA = _everywhere(
        lambda kernels, part, _: kernels.abs_max(part), backends, batch, home, norm_type
    )
    norms_S = (maxima_RA if per_row else maxima_RA.amax(0, keepdim=True)).squeeze(1)
    witness_R = maxima_RA[:, 0]
    if norm_type != inf:
        norms_S = _scaled_norms(backends, batch, norm_type, norms_S, per_row=per_row)
        norms_S = _saturated(norms_S, witness_R if per_row else witness_R.amax(0))
    return Measured(norms_S, norm_type, _per_tensor(witness_R, batch))


def from_sums(sums_RA: Tensor, batch: Batch, norm_type: float, *, per_row: bool) -> Measured:
    """Return what sums of powers, for p = 1, 2, say of the tensors that they were taken of."""
    norms_S = _root(sums_RA if per_row else sums_RA.sum(0, keepdim=True), norm_type)
    witness_R = sums_RA[:, sums_RA.shape[1] // 2]
    if norm_type != _EUCLIDEAN or sums_RA.shape[1] > 1:
        norms_S = _saturated(norms_S, witness_R if per_row else witness_R.amax(0))
    return Measured(norms_S, norm_type, _per_tensor(witness_R, batch))


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


def _per_tensor(witness_R: Tensor, batch: Batch) -> Tensor:
    if batch.layout.one_row_each:
        return witness_R
    rows = witness_R.split(batch.layout.rows)
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


def _scaled_norms(
    backends: Backends, batch: Batch, p: float, maxima_S: Tensor, *, per_row: bool
) -> Tensor:
    """Return ``max * sum(|x / max|**p)**(1/p)`` of each scope: in range for every p."""
    scale_S = torch.where((maxima_S > 0) & maxima_S.isfinite(), maxima_S, 1.0)
    scale_R = scale_S if per_row else scale_S.expand(len(batch.layout.row_sizes))
    sums_R = _everywhere(
        lambda kernels, part, there: kernels.scaled_power_sums(part, p, there(scale_R)),
        backends,
        batch,
        maxima_S.device,
        p,
    )[:, 0]
    sums_S = sums_R if per_row else sums_R.sum(0, keepdim=True)
    return scale_S * sums_S.pow(1 / p)


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
    if len(there) < len(found):
        return None
    if len(there) == 1:
        return there[0]
    columns = max(some.shape[1] for some in there)
    table = torch.cat([some if some.shape[1] == columns else widened(some, p) for some in there])
    return table[batch.layout.row_order.on(home)]


def _bring(device: torch.device, rows: Table | None, values_R: Tensor) -> Tensor:
    mine = values_R if rows is None else values_R[rows.on(values_R.device)]
    return mine.to(device)
