"""The oracle: every operation in float64, one row at a time, in the plainest way."""

import torch
from torch import Tensor

from gradclip.clipping.kernels import Batch, Clamped, blocks

coefficients = blocks.coefficients


def _rows(batch: Batch) -> list[Tensor]:
    pairs = zip(batch.tensors, batch.specs.rows, strict=True)
    return [row for tensor, n in pairs for row in blocks.rows_of(tensor, n)]


def power_sums(batch: Batch, p: float) -> Tensor:
    """Sum ``|x|**p`` over each row, three times over for float64's range: (R, 3)."""
    if not batch.specs.row_sizes:
        return torch.zeros(0, 3, dtype=torch.float64)
    exponents = (0, -blocks.SCALE_EXPONENT, blocks.SCALE_EXPONENT)
    return torch.stack(
        [torch.stack([blocks.power_sum(row, p, e) for e in exponents]) for row in _rows(batch)]
    )


def abs_max(batch: Batch) -> Tensor:
    """Find the largest modulus of each row: (R, 1)."""
    if not batch.specs.row_sizes:
        return torch.zeros(0, 1, dtype=torch.float64)
    return torch.stack([blocks.abs_max(row) for row in _rows(batch)]).unsqueeze(1)


def scaled_power_sums(batch: Batch, p: float, scale_R: Tensor) -> Tensor:
    """Sum ``|x / scale|**p`` over each row: (R, 1)."""
    if not batch.specs.row_sizes:
        return torch.zeros(0, 1, dtype=torch.float64)
    pairs = zip(_rows(batch), scale_R, strict=True)
    return torch.stack([blocks.scaled_power_sum(row, p, scale) for row, scale in pairs])[:, None]


def scale_(batch: Batch, coefficients: float | Tensor) -> None:
    """Multiply each row in float64 and round once to its dtype."""
    rows = batch.specs.rows
    given = torch.as_tensor(coefficients, dtype=torch.float64)
    per_row = given.expand(sum(rows)).split(rows)
    for tensor, factors in zip(batch.tensors, per_row, strict=True):
        if bool((factors == 1).all()):
            continue
        factor = factors.reshape(-1, *(1,) * (tensor.dim() - 1)) if tensor.dim() else factors[0]
        tensor.copy_(torch.where(factor == 0, 0.0, tensor.double() * factor))


def clamp_(batch: Batch, limit: float | Tensor, before: bool = True) -> Clamped:
    """Clamp each element to [-limit, limit]."""
    before_RA = power_sums(batch, 2.0) if before else None
    changed = 0
    for tensor in batch.tensors:
        top = float(blocks.representable(float(limit), tensor.dtype))
        changed += int((tensor.abs() > top).sum())
        tensor.clamp_(-top, top)
    return Clamped(before_RA, power_sums(batch, 2.0), torch.tensor(changed))
