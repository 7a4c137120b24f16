"""One packed collective for each dimension: everything that ranks add up travels together.

A pack is one vector of float64. First come the tables, one after the other: for each pattern, and
for each norm that is found of it, one row per scope and one column per sum (three where any rank
has float64 parameters). Behind them comes the tail: what a rank says of itself (``Status``), and
counts. The sizes follow from parameters and policies alone, so that all ranks have vectors of one
length, whatever gradients they have.

At the end there may be two numbers for each dimension, which compare copies. The first is the sum
over everything of which all ranks of the dimension should hold the same. Before the dimension is
reduced, the second becomes its square. Afterwards it becomes one where the sums differ, and zero
elsewhere. What the dimensions behind it add up is then in how many places copies differ: so every
rank hears of it.
"""

from collections.abc import Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from gradclip.clipping.kernels.tables import Table
from gradclip.clipping.ranks.dimension import Dimension, gathered
from gradclip.clipping.ranks.share import Share
from gradclip.errors import ArgumentValueError

ALIKE = 1e-2
"""The sum over the copies of one rank may be off by one in a hundred: mistakes do more.

Rounding does less, where each rank computes copies anew: a sum of many powers is off by
far less than each of them. What ranks have reduced is the same bit by bit.
"""


class Pack:
    """Tables of numbers by scope, (S, A) each, that are reduced in one vector.

    A scope that is whole on every rank of a dimension, and another one on each, takes no part
    there. What is in no table takes part everywhere.

    Args:
        dimensions: What to reduce over, in order.
        shares: Whose scopes each table has, and how many columns.
        tail: How many more numbers there are.
        compares: Whether copies are compared along each dimension.
    """

    def __init__(
        self,
        dimensions: Sequence[Dimension],
        shares: Sequence[tuple[Share, int]],
        tail: int = 0,
        *,
        compares: bool = False,
    ) -> None:
        self._dimensions = dimensions
        self.shapes = [(share.scopes, columns) for share, columns in shares]
        self.tail = tail
        self._compared = len(dimensions) if compares else 0
        self._sizes = [*(n * columns for n, columns in self.shapes), tail, 2 * self._compared]
        self.size = sum(self._sizes)
        self._chosen = [
            self._table(number, shares, tail + 2 * self._compared)
            for number, _ in enumerate(self._dimensions)
        ]

    @staticmethod
    def _table(number: int, shares: Sequence[tuple[Share, int]], rest: int) -> Table | None:
        local = [
            flag
            for share, columns in shares
            for flag in chain.from_iterable([each] * columns for each in share.is_local(number))
        ] + [False] * rest
        if not any(local):
            return None
        return Table.of([i for i, flag in enumerate(local) if not flag])

    def chosen(self, number: int) -> Table | None:
        """Return which numbers take part in a dimension; None for all."""
        return self._chosen[number]

    def length(self, number: int) -> int:
        """Return how many numbers take part in a dimension."""
        chosen = self.chosen(number)
        return self.size if chosen is None else len(chosen)

    def join(
        self,
        tables: Sequence[Tensor],
        device: torch.device,
        *tail: Tensor,
        copies: Tensor | None = None,
    ) -> Tensor:
        """Return everything as one vector of float64.

        Args:
            tables: In order.
            device: Where the vector is.
            tail: The rest, in pieces.
            copies: For each dimension the sum over what its ranks should hold alike; None for
                nothing.
        """
        flat = [table.reshape(-1) for table in tables]
        flags = torch.zeros(2 * self._compared, dtype=torch.float64, device=device)
        if copies is not None:
            flags[: self._compared] = copies
        return torch.cat([*flat, *tail, flags])

    def nothing(self, device: torch.device, *, but: Tensor | None = None) -> Tensor:
        """Return a vector of zeros, for a rank that has failed.

        Args:
            device: Where it is.
            but: What the tail begins with all the same.
        """
        vector = torch.zeros(self.size, dtype=torch.float64, device=device)
        if but is not None:
            start = sum(self._sizes[:-2])
            vector[start : start + len(but)] = but
        return vector

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return the tables of a vector, and behind them the tail."""
        *tables, tail, _ = vector.split(self._sizes)
        return [
            *(t.view(shape) for t, shape in zip(tables, self.shapes, strict=True)),
            tail,
        ]

    def differing(self, vector: Tensor) -> Tensor:
        """Return in how many places copies differ, of each dimension."""
        return vector[self.size - self._compared :]

    def before(self, number: int, vector: Tensor) -> None:
        """Square what is compared along a dimension, before that is reduced."""
        if self._compared:
            own, flag = self._pair(number, vector)
            torch.mul(own, own, out=flag)

    def after(self, number: int, vector: Tensor) -> None:
        """See whether what was compared along a dimension differs; NaN does not tell."""
        if self._compared:
            total, squares = self._pair(number, vector)
            size = self._dimensions[number].size
            # One of n sums that is off by d, relative to the others, makes a variance of this
            # much, relative to the mean squared. float64 adds less than n / 10^16 to it.
            variance = ALIKE**2 * (size - 1) / size**2
            squares.copy_(squares > total * total * ((1 + variance) / size))

    def _pair(self, number: int, vector: Tensor) -> tuple[Tensor, Tensor]:
        at = self.size - 2 * self._compared + number
        return vector[at], vector[at + self._compared]


def check_lengths(dimensions: Sequence[Dimension], packs: Sequence[Pack]) -> None:
    """Refuse packs that ranks cannot reduce together; torch ends the process at unequal lengths.

    Args:
        dimensions: Those of a grid.
        packs: What is reduced over them.

    Raises:
        ArgumentValueError: GC010, on every rank.
    """
    lengths = {d.ranks: [p.length(n) for p in packs] for n, d in enumerate(dimensions)}
    told = gathered(dimensions, {dist.get_rank(): lengths})
    for rank, theirs in told.items():
        for ranks, each in theirs.items():
            if told[ranks[0]].get(ranks) != each:
                raise ArgumentValueError(
                    f"ranks {ranks[0]} and {rank} hold parts of the same parameters, and not of "
                    "as many: their policies have a norm for each tensor or unit, and these norms "
                    "do not match. Give both the same parameters, or declare the group of both: "
                    "partitioned={pattern: process group}."
                )


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
            pack.before(number, vectors[index])
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
            wanted[index][0].after(number, vectors[index])
    return vectors[0], vectors[1]
