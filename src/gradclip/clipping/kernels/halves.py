"""Sums of squares of bfloat16 and float16 on the CPU: read once, and added up in float32.

torch has no sum of squares that reads such numbers at the speed of memory and adds them up in
float32: its norm rounds to their precision, and a conversion costs more than the sum. The gradient
of the weights of a group norm is such a sum: with mean 0 and deviation 1 it is the dot product of
two rows, in float32. Given the same tensor twice it is the sum of squares of each row. An infinity
comes back as NaN.
"""

from functools import cache

import torch
from torch import Tensor

__all__ = ["HALVES", "WIDTHS", "can_sum", "square_sum", "square_sums"]

WIDTHS = {torch.bfloat16: 1024, torch.float16: 512}
"""Elements that are added up in float32 before float64 takes over."""

HALVES = frozenset(WIDTHS)

_SUMMED = 1 << 27
"""Elements summed at a time: one sum of each row is kept."""


def square_sums(flat: Tensor, width: int) -> Tensor:
    """Sum the squares of every ``width`` elements: float32 (len / width,).

    Args:
        flat: Contiguous, 1-d, of a multiple of ``width`` elements.
        width: Elements of a row.
    """
    rows = flat.numel() // width
    matrix = flat.view(1, rows, width)
    mean, deviation = _constants()
    weight = torch.empty(rows, device="cpu")  # only its gradient is asked for
    _, sums, _ = torch.ops.aten.native_group_norm_backward.default(
        matrix, matrix, mean, deviation, weight, 1, rows, width, 1, [False, True, False]
    )
    return sums  # type: ignore[no-any-return]


def square_sum(flat: Tensor) -> float:
    """Sum the squares of all elements of a contiguous 1-d tensor; NaN where one is infinite."""
    width = WIDTHS[flat.dtype]
    rest = flat.numel() % width
    whole = flat[: flat.numel() - rest]
    total = sum(
        float(square_sums(piece, width).sum(dtype=torch.float64))
        for piece in whole.split(_SUMMED)
        if piece.numel()
    )
    return total + float(flat[-rest:].double().square_().sum()) if rest else total


@cache
def can_sum() -> bool:
    """Return whether this torch adds up as expected: to the last bit, for both kinds."""
    try:
        for dtype, width in WIDTHS.items():
            value = 1.0 + 2.0**-7
            row = torch.full((2 * width,), value, dtype=dtype, device="cpu")
            row[width:] = 3.0
            sums = square_sums(row, width)
            expected = [width * value**2, width * 9.0]
            if sums.dtype is not torch.float32 or sums.tolist() != expected:
                return False
    except Exception:  # noqa: BLE001 - an operation that nobody promised
        return False
    return True


@cache
def _constants() -> tuple[Tensor, Tensor]:
    """Return mean and deviation: kept, since to make them takes as long as a short sum."""
    return torch.zeros(1, 1, device="cpu"), torch.ones(1, 1, device="cpu")
