"""Float64 arithmetic in torch: sums over blocks, exact in range, with no large temporary."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gradclip.clipping.kernels.device import result_device_of

BLOCK = 1 << 18
"""Elements converted at a time: 2 MiB of float64, which stays in a core's cache."""

SCALE_EXPONENT = 600
"""x * 2^-600 and x * 2^600 have squares in float64's range where those of x have not."""

_DOWN, _UP = 2.0**-SCALE_EXPONENT, 2.0**SCALE_EXPONENT


def double_blocks(row: Tensor) -> Iterator[Tensor]:
    """Yield a 1-d tensor as float64 blocks that may be changed in place."""
    device = result_device_of((row.device,))
    for piece in row.split(BLOCK):
        yield piece.to(device=device).to(torch.float64, copy=True)


def _total(sums: list[Tensor], row: Tensor) -> Tensor:
    if not sums:
        return torch.zeros((), dtype=torch.float64, device=result_device_of((row.device,)))
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def power_sum(row: Tensor, p: float, exponent: int = 0) -> Tensor:
    """Return the sum of ``|x * 2**exponent|**p`` for p = 1, 2: 0-d float64.

    Args:
        row: 1-d, real, any floating dtype.
        p: 1 or 2.
        exponent: Of the power of two that each element is multiplied by first.
    """
    sums = []
    for values in double_blocks(row):
        scaled = values.mul_(2.0**exponent) if exponent else values
        sums.append((scaled.abs_() if p == 1 else scaled.square_()).sum())
    return _total(sums, row)


def widened(sums_R1: Tensor, p: float) -> Tensor:
    """Return sums of ``|x|**p`` as those of x, x * 2^-600 and x * 2^600, for p = 1, 2: (R, 3)."""
    down_R1, up_R1 = sums_R1 * _DOWN, sums_R1 * _UP
    if p == 2:  # noqa: PLR2004 - 2^1200 is no float64
        down_R1, up_R1 = down_R1 * _DOWN, up_R1 * _UP
    return torch.cat([sums_R1, down_R1, up_R1], dim=1)


def scaled_power_sum(row: Tensor, p: float, scale: Tensor) -> Tensor:
    """Return the sum of ``|x / scale|**p``: 0-d float64; 0 for an empty row.

    Args:
        row: 1-d, real, any floating dtype.
        p: Any p > 0.
        scale: 0-d float64, > 0.
    """
    return _total([v.abs_().div_(scale).pow_(p).sum() for v in double_blocks(row)], row)


def abs_max(row: Tensor) -> Tensor:
    """Return the largest modulus of a 1-d tensor: 0-d float64; 0 if empty, NaN if there is one."""
    if row.numel() == 0:
        return _total([], row)
    low, high = torch.aminmax(row.to(result_device_of((row.device,))))
    return torch.maximum(low.double().abs(), high.double().abs())


def coefficients(
    norms_S: Tensor,
    thresholds: float | Tensor,
    targets: float | Tensor,
    committed: Tensor,
    guard: float,
    skipped_coefficient: float,
) -> Tensor:
    """Return what each scope is multiplied by, float64 (S,); see ``Kernels.coefficients``."""
    shrunk_S = targets / norms_S * (1 - guard)
    is_above_S = norms_S > thresholds
    if targets is not thresholds:
        is_above_S = is_above_S & (norms_S > targets)
    counted_S = torch.where(is_above_S, shrunk_S, 1.0)
    return torch.where(committed, counted_S, skipped_coefficient)


def representable(limit: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """Return a limit as a dtype has it: 0.3 is 0.3008 in bfloat16."""
    if isinstance(limit, Tensor):  # an infinite one changes nothing, infinities neither
        return torch.where(limit.isinf(), limit, limit.clamp(max=torch.finfo(dtype).max)).to(dtype)
    top = min(limit, torch.finfo(dtype).max)
    return top if dtype is torch.float64 else float(torch.tensor(top, dtype=dtype))


def rows_of(tensor: Tensor, rows: int) -> Tensor:
    """Return a tensor as a matrix of ``(rows, -1)``: a view wherever its memory allows one.

    One row takes the elements in the order of memory, so that a transposed or channels-last
    tensor needs no copy.
    """
    if rows == 1 and not tensor.is_contiguous():
        tensor = _in_memory_order(tensor)
    if tensor.numel() == 0:
        return tensor.reshape(rows, 0)
    return tensor.reshape(rows, -1)


def _in_memory_order(tensor: Tensor) -> Tensor:
    strides = tensor.stride()
    return tensor.permute(sorted(range(tensor.dim()), key=lambda d: -strides[d]))
