"""Small tensors that are gathered before they are summed: in pieces that stay in a cache."""

from collections.abc import Callable, Sequence
from operator import itemgetter

from torch import Tensor

GATHERED = 1 << 15
"""Elements gathered at a time: they stay in a cache, and start no threads."""

ALIKE = 4
"""Tensors of one shape that are worth a gathering of their own, which is cheaper for each."""


def taker(indices: list[int]) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
    """Return what takes the elements of a sequence at some indices."""
    if len(indices) == 1:
        return lambda rows: (rows[indices[0]],)
    return itemgetter(*indices)


def cut(indices: list[int], sizes: list[int], limit: int) -> list[list[int]]:
    """Cut indices so that no piece holds more elements than are gathered at a time."""
    pieces: list[list[int]] = []
    total = 0
    for index in indices:
        total += sizes[index]
        if not pieces or total > limit:
            pieces.append([])
            total = sizes[index]
        pieces[-1].append(index)
    return pieces
