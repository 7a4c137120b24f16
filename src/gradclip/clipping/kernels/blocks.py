"""Float64 arithmetic in torch: sums over blocks, exact in range, with no large temporary."""

from collections.abc import Iterator, Sequence
from math import inf

import torch
from torch import Tensor

from gradclip.clipping.kernels.device import result_device_of

BLOCK = 1 << 18
"""Elements converted at a time: 2 MiB of float64, which stays in a core's cache."""

SCALE_EXPONENT = 600
"""x * 2^-600 and x * 2^600 have squares in float64's range where those of x have not."""

LARGEST = torch.finfo(torch.float64).max

_DOWN, _UP = 2.0**-SCALE_EXPONENT, 2.0**SCALE_EXPONENT


def rows_of(tensor: Tensor, rows: int) -> Sequence[Tensor]:
    """Return the rows of a tensor as views: 1-d wherever a row has no gaps.

    One row takes the elements in the order of memory, so that a transposed or channels-last
    tensor has none.
    """
    if tensor.numel() == 0:
        return tensor.reshape(rows, 0).unbind()
    if rows == 1:
        return (flat(tensor),)
    if tensor.is_contiguous():
        return tensor.view(rows, -1).unbind()
    return [flat(row) for row in tensor.unbind()]


def flat(row: Tensor) -> Tensor:
    """Return a view of a row in the order of memory: 1-d where there are no gaps."""
    if not row.is_contiguous():
        strides = row.stride()
        row = row.permute(sorted(range(row.dim()), key=lambda d: -strides[d]))
    return row.view(-1) if row.is_contiguous() else row


def pieces(row: Tensor, size: int) -> Iterator[Tensor]:
    """Yield views of at most ``size`` elements that together are a row, in order."""
    if row.numel() <= size:
        yield row
    elif row.dim() == 1:
        yield from row.split(size)
    elif whole := size // (row.numel() // row.shape[0]):
        yield from row.split(whole)
    else:
        for part in row.unbind():
            yield from pieces(part, size)


def double_blocks(row: Tensor, limit: float | Tensor | None = None) -> Iterator[Tensor]:
    """Yield a row as float64 blocks that may be changed in place.

    Args:
        row: Any floating dtype; complex numbers become pairs, (..., 2).
        limit: What elements are clamped to first, as the row's dtype has it.
    """
    device = result_device_of((row.device,))
    for piece in pieces(row, BLOCK):
        values = torch.view_as_real(piece) if piece.is_complex() else piece
        wide = values.to(device=device).to(torch.float64, copy=True)
        yield wide if limit is None else clamp_to_(wide, limit)


def clamp_to_(values: Tensor, limit: float | Tensor) -> Tensor:
    """Clamp in place to [-limit, limit]; a NaN stays."""
    return values.clamp_(-limit, limit)  # type: ignore[arg-type]


def _moduli(values: Tensor, row: Tensor) -> Tensor:
    """Return the moduli of a block: its memory, or that of a new one for pairs."""
    return torch.hypot(*values.unbind(-1)) if row.is_complex() else values.abs_()


def _total(sums: list[Tensor], row: Tensor) -> Tensor:
    if not sums:
        return torch.zeros((), dtype=torch.float64, device=result_device_of((row.device,)))
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def power_sum(
    row: Tensor, p: float, exponent: int = 0, limit: float | Tensor | None = None
) -> Tensor:
    """Return the sum of ``|x * 2**exponent|**p`` for p = 1, 2: 0-d float64.

    Args:
        row: Any shape and floating dtype; complex numbers count by modulus.
        p: 1 or 2.
        exponent: Of the power of two that each element is multiplied by first.
        limit: What elements are clamped to first.
    """
    sums = []
    for values in double_blocks(row, limit):
        scaled = values.mul_(2.0**exponent) if exponent else values
        sums.append((_moduli(scaled, row) if p == 1 else scaled.square_()).sum())
    return _total(sums, row)


def widened(found_R1: Tensor, p: float) -> Tensor:
    """Return what was found of x as that of x and its multiples in float64's range.

    For sums of ``|x|**p``, p = 1 or 2, those are x, x * 2^-600 and x * 2^600: (R, 3). For the
    largest modulus they are x and x * 2^-600: (R, 2).
    """
    down_R1, up_R1 = found_R1 * _DOWN, found_R1 * _UP
    if p not in {1.0, 2.0}:
        return torch.cat([found_R1, down_R1], dim=1)
    if p == 2:  # noqa: PLR2004 - 2^1200 is no float64
        down_R1, up_R1 = down_R1 * _DOWN, up_R1 * _UP
    return torch.cat([found_R1, down_R1, up_R1], dim=1)


def scaled_power_sum(
    row: Tensor, p: float, scale: Tensor, limit: float | Tensor | None = None
) -> Tensor:
    """Return the sum of ``|x / scale|**p``: 0-d float64; 0 for an empty row.

    Args:
        row: Any shape and floating dtype; complex numbers count by modulus.
        p: Any p > 0.
        scale: 0-d float64, > 0.
        limit: What elements are clamped to first.
    """
    blocks = double_blocks(row, limit)
    return _total([_moduli(v.div_(scale), row).pow_(p).sum() for v in blocks], row)


def abs_max(row: Tensor) -> Tensor:
    """Return the largest modulus of a real row: 0-d float64; 0 if empty, NaN if there is one."""
    if row.numel() == 0:
        return _total([], row)
    device = result_device_of((row.device,))
    # torch copies what it finds the extremes of, unless it has no gaps.
    size = row.numel() if row.is_contiguous() else BLOCK
    found = []
    for piece in pieces(row, size):
        low, high = torch.aminmax(piece)
        found.append(torch.maximum(low.abs(), high.abs()).to(device).double())
    return found[0] if len(found) == 1 else torch.stack(found).amax()


def modulus_max(row: Tensor) -> Tensor:
    """Return the largest modulus of a complex row, float64 (A,); NaN if there is one.

    A is 1, or for complex128 2: the modulus may be beyond float64 where both parts are not. The
    first number is then the largest float64, and the second is the modulus times 2^-600.
    """
    halves = [_moduli(values.mul_(0.5), row).amax() for values in double_blocks(row) if len(values)]
    half = torch.stack(halves).amax() if halves else _total([], row)
    whole = torch.where(half < inf, (half * 2).clamp(max=LARGEST), half)
    return torch.stack([whole, half * (2 * _DOWN)][: 2 if row.dtype is torch.complex128 else 1])


def count_beyond(row: Tensor, limit: float | Tensor) -> Tensor:
    """Return how many elements of a row have a modulus above a limit: 0-d int64."""
    counts = [(piece.abs() > limit).sum() for piece in pieces(row, BLOCK)]
    return counts[0] if len(counts) == 1 else torch.stack(counts).sum()


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
    return top if dtype is torch.float64 else float(torch.tensor(top, dtype=dtype, device="cpu"))
