"""From sums per row to norms per scope: the only numbers that a policy sees."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import TypeAlias

import torch
from torch import Tensor

from gradclip.clipping.kernels import Kernels, by_device
from gradclip.clipping.kernels.blocks import SCALE_EXPONENT, widened

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
    kernels: Kernels,
    tensors: Sequence[Tensor],
    rows: Sequence[int],
    norm_type: float,
    *,
    per_row: bool,
    home: torch.device,
) -> Measured:
    """Measure tensors, wherever they are, in one read (two for p other than 1, 2, inf).

    Args:
        kernels: The backend.
        tensors: Real, of any devices, dtypes and shapes.
        rows: The rows of each tensor: 1, or its leading dimension.
        norm_type: p, > 0 or inf.
        per_row: Whether each row is a scope of its own; otherwise all rows together are one.
        home: Device of the results.
    """
    if not tensors:
        zeros = torch.zeros(0 if per_row else 1, dtype=torch.float64, device=home)
        return Measured(zeros, norm_type, zeros[:0])
    if norm_type in {1.0, 2.0}:
        witness_RA = _everywhere(
            lambda some, n, _: kernels.power_sums(some, n, norm_type),
            tensors,
            rows,
            home,
            norm_type,
        )
        norms_S = _root(witness_RA if per_row else witness_RA.sum(0, keepdim=True), norm_type)
    else:
        witness_RA = _everywhere(
            lambda some, n, _: kernels.abs_max(some, n), tensors, rows, home, norm_type
        )
        norms_S = (witness_RA if per_row else witness_RA.amax(0, keepdim=True)).squeeze(1)
        if norm_type != inf:
            norms_S = _scaled_norms(kernels, tensors, rows, norm_type, norms_S, per_row=per_row)
    witness_R = witness_RA[:, witness_RA.shape[1] // 2]
    if norm_type != inf and (norm_type != _EUCLIDEAN or witness_RA.shape[1] > 1):
        norms_S = _saturated(norms_S, witness_R if per_row else witness_R.amax(0))
    if len(rows) != witness_R.shape[0]:
        witness_R = torch.stack([of_tensor.amax() for of_tensor in witness_R.split(list(rows))])
    return Measured(norms_S, norm_type, witness_R)


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
    kernels: Kernels,
    tensors: Sequence[Tensor],
    rows: Sequence[int],
    p: float,
    maxima_S: Tensor,
    *,
    per_row: bool,
) -> Tensor:
    """Return ``max * sum(|x / max|**p)**(1/p)`` of each scope: in range for every p."""
    scale_S = torch.where((maxima_S > 0) & maxima_S.isfinite(), maxima_S, 1.0)
    scale_R = scale_S if per_row else scale_S.expand(sum(rows))
    sums_R = _everywhere(
        lambda some, n, there: kernels.scaled_power_sums(some, n, p, there(scale_R)),
        tensors,
        rows,
        maxima_S.device,
        p,
    )[:, 0]
    sums_S = sums_R if per_row else sums_R.sum(0, keepdim=True)
    return scale_S * sums_S.pow(1 / p)


_There: TypeAlias = Callable[[Tensor], Tensor]
"""Brings what belongs to all rows, (R,), to a device: the part of the rows that are there."""


def _everywhere(
    operation: Callable[[Sequence[Tensor], Sequence[int], _There], Tensor],
    tensors: Sequence[Tensor],
    rows: Sequence[int],
    home: torch.device,
    p: float,
) -> Tensor:
    """Run an operation once on each device, and bring its rows home in order: (R, A)."""
    places = by_device(tensors, rows)
    if len(places) == 1:
        (device,) = places
        return operation(tensors, rows, lambda values_R: values_R.to(device)).to(home)
    parts: list[Tensor] = []
    order: list[int] = []
    for device, (indices, row_indices) in places.items():
        part = operation(
            [tensors[i] for i in indices],
            [rows[i] for i in indices],
            lambda values_R, d=device, r=row_indices: values_R[r].to(d),  # type: ignore[misc]
        )
        parts.append(part.to(home))
        order += row_indices
    columns = max(part.shape[1] for part in parts)
    table = torch.cat([part if part.shape[1] == columns else widened(part, p) for part in parts])
    return table[torch.tensor(order).argsort().to(home)]
