"""Writes that are prepared: all that can fail was done, and nothing is written yet.

A call reads, decides and prepares everything first. It carries out all writes together at its end,
where they need no memory and no conversion: nothing but a device can make one fail then.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Write:
    """A write that is prepared.

    Args:
        run: Writes in place; it gets the columns.
        columns: Lists of one length: what is written, and what each needs.
    """

    run: Callable[..., Any]
    columns: tuple[list[Any], ...]


def carry_out(writes: Iterable[Write]) -> None:
    """Write. What is written in the same way is written by one call, in order.

    So one operation of torch scales tensors of all dtypes, and nothing comes in between. Ways are
    taken in the order in which they come first: where two change one tensor, either may be first.
    """
    together: dict[Callable[..., Any], tuple[list[Any], ...]] = {}
    for write in writes:
        known = together.setdefault(write.run, tuple([] for _ in write.columns))
        for column, more in zip(known, write.columns, strict=True):
            column.extend(more)
    for run, columns in together.items():
        run(*columns)


def run_each(launches: Iterable[Callable[[], None]]) -> None:
    """Make each launch."""
    for launch in launches:
        launch()


def clamp_each(tensors: list[Tensor], low: list[Any], high: list[Any]) -> None:
    """Clamp each tensor in place; without a line of Python between two, where Ctrl-C could come."""
    deque(map(Tensor.clamp_, tensors, low, high), maxlen=0)


def multiply_in_blocks(
    pieces: list[Tensor], factors: list[Tensor], zeros: list[Tensor | None], blocks: list[Tensor]
) -> None:
    """Multiply in the precision of blocks that are there already; 0 sets zeros.

    Args:
        pieces: What is written.
        factors: Of the blocks' dtype; they broadcast.
        zeros: Where a factor is 0; None where none is.
        blocks: Memory of each piece's shape, which pieces share.
    """
    for piece, factor, is_zero, block in zip(pieces, factors, zeros, blocks, strict=True):
        block.copy_(piece).mul_(factor)
        if is_zero is not None:
            block.masked_fill_(is_zero, 0.0)
        piece.copy_(block)
