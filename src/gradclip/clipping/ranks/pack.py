"""One packed collective for each dimension: everything that ranks add up travels together.

A pack is one vector of float64. First come the tables, one after the other: for each pattern, and
for each norm that is found of it, one row per scope and one column per sum (three where any rank
has float64 parameters). Behind them comes the tail: what a rank says of itself (``Status``), the
sum over copies and its square, and counts. The sizes follow from parameters and policies alone,
so that all ranks have vectors of one length, whatever gradients they have.
"""

from collections.abc import Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from gradclip.clipping.kernels.tables import Table
from gradclip.clipping.ranks.dimension import Dimension
from gradclip.clipping.ranks.share import Share


class Pack:
    """Tables of numbers by scope, (S, A) each, that are reduced in one vector.

    A scope that is whole on every rank of a dimension, and another one on each, takes no part
    there. What is in no table (the tail) takes part everywhere.

    Args:
        dimensions: What to reduce over, in order.
        shares: Whose scopes each table has, and how many columns.
        tail: How many more numbers there are.
    """

    def __init__(
        self, dimensions: Sequence[Dimension], shares: Sequence[tuple[Share, int]], tail: int = 0
    ) -> None:
        self._dimensions = dimensions
        self.shapes = [(share.scopes, columns) for share, columns in shares]
        self.tail = tail
        self.size = sum(n * columns for n, columns in self.shapes)
        self._sizes = [*(n * columns for n, columns in self.shapes), tail]
        self._chosen = [
            self._table(number, shares, tail) for number, _ in enumerate(self._dimensions)
        ]

    @staticmethod
    def _table(number: int, shares: Sequence[tuple[Share, int]], tail: int) -> Table | None:
        local = [
            flag
            for share, columns in shares
            for flag in chain.from_iterable([each] * columns for each in share.is_local(number))
        ] + [False] * tail
        if not any(local):
            return None
        return Table.of([i for i, flag in enumerate(local) if not flag])

    def chosen(self, number: int) -> Table | None:
        """Return which numbers take part in a dimension; None for all."""
        return self._chosen[number]

    def join(self, tables: Sequence[Tensor] | None, device: torch.device, *tail: Tensor) -> Tensor:
        """Return everything as one vector of float64; None stands for zeros."""
        nothing = torch.zeros(
            self.size if tables is None else 0, dtype=torch.float64, device=device
        )
        return torch.cat([nothing, *(table.reshape(-1) for table in tables or ()), *tail])

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return the tables of a vector, and behind them the tail."""
        *tables, tail = vector.split(self._sizes)
        return [
            *(t.view(shape) for t, shape in zip(tables, self.shapes, strict=True)),
            tail,
        ]


def reduce_packs(
    dimensions: Sequence[Dimension],
    added: tuple[Pack, Tensor] | None,
    largest: tuple[Pack, Tensor],
) -> tuple[Tensor, Tensor]:
    """Reduce vectors over every dimension, one after the other; both at once where there are two.

    Args:
        dimensions: In order.
        added: A pack, and its vector, to be summed; None for none.
        largest: Another one, of which the largest is taken; empty for none. It has no NaN, which
            would be lost.

    Returns:
        The sums, or an empty vector, and the maxima.
    """
    nothing = largest[1][:0]
    wanted = [
        (Pack((), ()), nothing, dist.ReduceOp.SUM)
        if added is None
        else (*added, dist.ReduceOp.SUM),
        (*largest, dist.ReduceOp.MAX),
    ]
    vectors = [vector for _, vector, _ in wanted]
    for number, dimension in enumerate(dimensions):
        if dimension.size == 1:
            continue
        under_way = []
        for index, (pack, _, operation) in enumerate(wanted):
            if not len(vectors[index]):
                continue
            chosen = pack.chosen(number)
            # A rank with nothing to add skips this as well: its vector is empty, or all is local.
            if chosen is not None and not len(chosen):
                continue
            mine = vectors[index] if chosen is None else vectors[index][chosen.on(nothing.device)]
            there = mine.to(dimension.device(nothing.device))
            under_way.append((index, chosen, there, dimension.all_reduce(there, operation)))
        for index, chosen, there, work in under_way:
            dimension.wait(work)
            back = there.to(nothing.device)
            if chosen is None:
                vectors[index] = back
            else:
                vectors[index][chosen.on(nothing.device)] = back
    return vectors[0], vectors[1]
