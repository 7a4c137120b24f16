"""The oracle: every operation in float64, one row at a time, in the plainest way."""

import torch
from torch import Tensor

from gradclip.clipping.kernels import Batch, Clamped, Write, blocks, carry_out
from gradclip.clipping.kernels.device import result_device_of
from gradclip.clipping.kernels.rows import in_blocks
from gradclip.clipping.kernels.writes import clamp_each

coefficients = blocks.coefficients
fused = None


def _rows(batch: Batch) -> list[Tensor]:
    pairs = zip(batch.tensors, batch.specs.rows, strict=True)
    return [row for tensor, n in pairs for row in blocks.rows_of(tensor, n)]


def _zeros(batch: Batch, columns: int) -> Tensor:
    device = result_device_of((batch.device,))
    return torch.zeros(0, columns, dtype=torch.float64, device=device)


def power_sums(batch: Batch, p: float) -> Tensor:
    """Sum ``|x|**p`` over each row, three times over for float64's range: (R, 3)."""
    if not batch.specs.row_sizes:
        return _zeros(batch, 3)
    exponents = (0, -blocks.SCALE_EXPONENT, blocks.SCALE_EXPONENT)
    return torch.stack(
        [
            torch.stack([blocks.power_sum(row, p, e, batch.top) for e in exponents])
            for row in _rows(batch)
        ]
    )


def abs_max(batch: Batch) -> Tensor:
    """Find the largest modulus of each row: (R, A)."""
    if not batch.specs.row_sizes:
        return _zeros(batch, 1)
    if batch.dtype.is_complex:
        return torch.stack(list(map(blocks.modulus_max, _rows(batch))))
    maxima_R = torch.stack(list(map(blocks.abs_max, _rows(batch))))
    return (maxima_R if batch.top is None else maxima_R.clamp(max=batch.top)).unsqueeze(1)


def scaled_power_sums(batch: Batch, p: float, scale_R: Tensor) -> Tensor:
    """Sum ``|x / scale|**p`` over each row: (R, 1)."""
    if not batch.specs.row_sizes:
        return _zeros(batch, 1)
    pairs = zip(_rows(batch), scale_R, strict=True)
    sums = [blocks.scaled_power_sum(row, p, scale, batch.top) for row, scale in pairs]
    return torch.stack(sums)[:, None]


def scaling(
    batch: Batch,
    coefficients: float | Tensor,
    *,
    zeroes: bool = True,  # noqa: ARG001
) -> list[Write]:
    """Multiply each row in float64 and round once to its dtype."""
    rows = batch.specs.rows
    given = torch.as_tensor(coefficients, dtype=torch.float64, device=batch.device)
    per_tensor = given.expand(sum(rows)).split(rows)
    chosen = [
        (tensor, factors)
        for tensor, factors in zip(batch.tensors, per_tensor, strict=True)
        if not bool((factors == 1).all())
    ]
    return in_blocks(chosen, torch.float64)


def clamping(batch: Batch, limit: float | Tensor) -> list[Write]:
    """Clamp the tensors that have an element beyond [-limit, limit]."""
    top = float(blocks.representable(float(limit), batch.dtype))
    wide = [t for t in batch.tensors if int(blocks.count_beyond(blocks.flat(t), top))]
    return [Write(clamp_each, (wide, [-top] * len(wide), [top] * len(wide)))] if wide else []


def clamp_(batch: Batch, limit: float | Tensor, write: bool) -> Clamped:
    """Clamp each element to [-limit, limit], or find out what that would do."""
    writes = clamping(batch, limit)
    before_RA, after_RA = power_sums(batch, 2.0), power_sums(batch.limited(limit), 2.0)
    if write:
        carry_out(writes)
    return Clamped(before_RA, after_RA, torch.tensor(len(writes), device=before_RA.device))
