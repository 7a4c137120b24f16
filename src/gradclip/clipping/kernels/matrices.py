"""Rows of tensors on the CPU, each tensor read as a matrix: a view of each row takes longer."""

from math import inf

import torch
from torch import Tensor

from gradclip.clipping.kernels import Batch, blocks, halves, total

_EUCLIDEAN = 2.0


def reduced(batch: Batch, p: float) -> Tensor:
    """Reduce each row to its sum of ``|x|**p`` for p = 1, 2, or its maximum: float64 (R,).

    Args:
        batch: Real tensors, each without gaps.
        p: 1, 2 or inf.
    """
    top = batch.top if p != inf else None
    found = [torch.zeros(0, dtype=torch.float64, device="cpu")]
    for tensor, rows in zip(batch.tensors, batch.specs.rows, strict=True):
        if tensor.numel():
            # One row may lie in any order of memory.
            matrix = blocks.flat(tensor)[None] if rows == 1 else tensor.view(rows, -1)
            found.append(_of_matrix(matrix, p, top))
        else:
            found.append(torch.zeros(rows, dtype=torch.float64, device="cpu"))
    return torch.cat(found)


def _of_matrix(matrix: Tensor, p: float, top: float | Tensor | None) -> Tensor:
    rows, width = matrix.shape
    if p == _EUCLIDEAN and top is None and width % total.LANES == 0:
        if matrix.dtype is torch.float32:
            in_lanes = torch.linalg.vector_norm(matrix.view(rows, -1, total.LANES), dim=2)
            sums_R = torch.linalg.vector_norm(in_lanes, dim=1, dtype=torch.float64).square_()
            return _recounted(matrix, sums_R)
        if matrix.dtype in halves.HALVES and halves.can_sum():
            parts = [
                halves.square_sums(part.view(-1), total.LANES).view(len(part), -1)
                for part in matrix.split(max(1, _HALVES // width))
            ]
            sums_R = torch.cat(parts).sum(1, dtype=torch.float64)
            return _recounted(matrix, sums_R)
    return _by_blocks(matrix, p, top)


_HALVES = 1 << 20
"""Elements of half precision that are summed at a time."""


def _recounted(matrix: Tensor, sums_R: Tensor) -> Tensor:
    """Sum those rows anew in float64 whose squares may have left the range of float32."""
    low = matrix.shape[1] * total.LOST_FLOAT32_SQUARE
    least, largest = torch.aminmax(sums_R)
    if float(least) >= low and float(largest) < inf:
        return sums_R
    lost = (~((sums_R >= low) & (sums_R < inf))).nonzero()[:, 0]
    for some in lost.split(max(1, total.GATHERED // matrix.shape[1])):
        rows = matrix[some]
        if bool(rows.any()):  # most rows of an embedding have no gradient
            sums_R[some] = _by_blocks(rows, _EUCLIDEAN, None)
    return sums_R


def _by_blocks(matrix: Tensor, p: float, top: float | Tensor | None) -> Tensor:
    """Reduce rows in float64, a block at a time: (R,)."""
    width = matrix.shape[1]
    if width > total.GATHERED:
        return torch.stack([_of_row(row, p, top) for row in matrix.unbind()])
    found = []
    for block in matrix.split(total.GATHERED // width):
        if p == inf:
            low, high = torch.aminmax(block, dim=1)
            found.append(torch.maximum(low.abs(), high.abs()).to(torch.float64))
            continue
        wide = block.to(torch.float64, copy=True)
        if top is not None:
            blocks.clamp_to_(wide, top)
        found.append((wide.square_() if p == _EUCLIDEAN else wide.abs_()).sum(1))
    return torch.cat(found)


def _of_row(row: Tensor, p: float, top: float | Tensor | None) -> Tensor:
    return blocks.abs_max(row) if p == inf else blocks.power_sum(row, p, 0, top)
