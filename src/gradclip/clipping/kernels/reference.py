"""The oracle: every operation in float64, one row at a time, in the plainest way."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradclip.clipping.kernels import blocks


def _rows(tensors: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    return [
        row for tensor, n in zip(tensors, rows, strict=True) for row in blocks.rows_of(tensor, n)
    ]


def power_sums(tensors: Sequence[Tensor], rows: Sequence[int], p: float) -> Tensor:
    """Sum ``|x|**p`` over each row, three times over for float64's range: (R, 3)."""
    exponents = (0, -blocks.SCALE_EXPONENT, blocks.SCALE_EXPONENT)
    return torch.stack(
        [
            torch.stack([blocks.power_sum(row, p, e) for e in exponents])
            for row in _rows(tensors, rows)
        ]
    )


def abs_max(tensors: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """Find the largest modulus of each row: (R, 1)."""
    return torch.stack([blocks.abs_max(row) for row in _rows(tensors, rows)]).unsqueeze(1)


def scaled_power_sums(
    tensors: Sequence[Tensor], rows: Sequence[int], p: float, scale_R: Tensor
) -> Tensor:
    """Sum ``|x / scale|**p`` over each row: (R, 1)."""
    pairs = zip(_rows(tensors, rows), scale_R, strict=True)
    return torch.stack([blocks.scaled_power_sum(row, p, scale) for row, scale in pairs])[:, None]


def scale_(tensors: Sequence[Tensor], rows: Sequence[int], coefficients: float | Tensor) -> None:
    """Multiply each row in float64 and round once to its dtype."""
    given = torch.as_tensor(coefficients, dtype=torch.float64)
    per_row = given.expand(sum(rows)).split(list(rows))
    for tensor, factors in zip(tensors, per_row, strict=True):
        if bool((factors == 1).all()):
            continue
        factor = factors.reshape(-1, *(1,) * (tensor.dim() - 1)) if tensor.dim() else factors[0]
        tensor.copy_(torch.where(factor == 0, 0.0, tensor.double() * factor))


def clamp_(tensors: Sequence[Tensor], limit: float | Tensor) -> Tensor:
    """Clamp each element to [-limit, limit]."""
    changed = torch.zeros((), dtype=torch.bool)
    for tensor in tensors:
        top = float(torch.tensor(min(float(limit), torch.finfo(tensor.dtype).max)).to(tensor.dtype))
        changed |= bool((tensor.abs() > top).any())
        tensor.clamp_(-top, top)
    return changed


def zero_(tensors: Sequence[Tensor], where: Tensor) -> None:
    """Set all elements to zero if asked to."""
    if where:
        for tensor in tensors:
            tensor.zero_()
