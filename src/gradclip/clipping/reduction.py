"""From sums per row to norms per scope: the only numbers that a policy sees."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor

from gradclip.clipping.kernels import Kernels, by_device
from gradclip.clipping.kernels.blocks import SCALE_EXPONENT, widened

_P = ParamSpec("_P")

_UP, _DOWN = 2.0**SCALE_EXPONENT, 2.0**-SCALE_EXPONENT
_EUCLIDEAN = 2.0
_LOST_SQUARES = 2.0**-900
_LARGEST = torch.finfo(torch.float64).max


@dataclass(frozen=True)
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
        witness_RA = _everywhere(kernels.power_sums, tensors, rows, home, norm_type)
        sums_SA = witness_RA if per_row else witness_RA.sum(0, keepdim=True)
        norms_S = _root(sums_SA) if norm_type == _EUCLIDEAN else sums_SA[:, 0]
    else:
        witness_RA = _everywhere(kernels.abs_max, tensors, rows, home)
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
    return torch.linalg.vector_norm(norms_S / scale, norm_type) * scale


def _root(sums_SA: Tensor) -> Tensor:
    """Return norms (S,) from sums of squares (S, 1), or from the three of them (S, 3)."""
    if sums_SA.shape[1] == 1:
        return sums_SA[:, 0].sqrt()
    middle_S, down_S, up_S = sums_SA.unbind(1)
    small = middle_S < _LOST_SQUARES
    return torch.where(
        middle_S.isinf(),
        down_S.sqrt() * _UP,
        torch.where(small, up_S.sqrt() * _DOWN, middle_S.sqrt()),
    )


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
    places = by_device(tensors, rows)
    sums_R = torch.empty(sum(rows), dtype=torch.float64, device=maxima_S.device)
    for device, (indices, row_indices) in places.items():
        part = kernels.scaled_power_sums(
            [tensors[i] for i in indices],
            [rows[i] for i in indices],
            p,
            scale_R[row_indices].to(device),
        )
        sums_R[row_indices] = part[:, 0].to(sums_R.device)
    sums_S = sums_R if per_row else sums_R.sum(0, keepdim=True)
    return scale_S * sums_S.pow(1 / p)


def _everywhere(
    operation: Callable[Concatenate[Sequence[Tensor], Sequence[int], _P], Tensor],
    tensors: Sequence[Tensor],
    rows: Sequence[int],
    home: torch.device,
    *args: _P.args,
    **kwargs: _P.kwargs,
) -> Tensor:
    """Run an operation once on each device, and bring its rows home in order: (R, A)."""
    places = by_device(tensors, rows)
    if len(places) == 1:
        return operation(tensors, rows, *args, **kwargs).to(home)
    parts = []
    order: list[int] = []
    for indices, row_indices in places.values():
        part = operation([tensors[i] for i in indices], [rows[i] for i in indices], *args, **kwargs)
        parts.append(part.to(home))
        order += row_indices
    if any(part.shape[1] > 1 for part in parts):
        parts = [part if part.shape[1] > 1 else widened(part) for part in parts]
    table = torch.cat(parts)
    return table[torch.tensor(order).argsort().to(home)]
