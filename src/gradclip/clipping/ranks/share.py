"""What part of a pattern's norms this rank answers for, whatever gradients it has.

A parameter of which several ranks hold copies is counted by each of them in part: with the weight
one over the number of copies. So every column of a pack takes part in every sum, and all ranks
get identical bits.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import compress, repeat
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from gradclip.clipping.collect.parameters import ParameterGroup
from gradclip.clipping.kernels.tables import Table
from gradclip.clipping.ranks.holding import Holding

_Value = TypeVar("_Value")

Copies: TypeAlias = dict[tuple[str, tuple[int, ...]], float]
"""What is in copies, by name and position among the ranks that hold parts: a sum of powers."""


class Share:
    """How this rank holds the parameters of a pattern.

    Args:
        holdings: How each parameter is held.
        rows: How many rows the local part of each has.
        unit_dims: Which dimension of each has its units; None for one that is a single unit.
        scope: What a scope is.
    """

    def __init__(
        self,
        holdings: Sequence[Holding],
        rows: Sequence[int],
        unit_dims: Sequence[int | None],
        scope: Literal["group", "tensor", "unit"],
    ) -> None:
        self.holdings = holdings
        self.rows = rows
        self.unit_dims = unit_dims
        self.scope = scope
        self._known: dict[bytes, Presence] = {}

    @property
    def is_apart(self) -> bool:
        """Whether other ranks have scopes of their own, of which this one sees nothing."""
        return self.scope != "group"

    @property
    def scopes(self) -> int:
        """How many scopes there are: S, the same at every step."""
        return 1 if self.scope == "group" else sum(self.rows)

    @property
    def weights(self) -> list[float]:
        """How much of each parameter is counted here, (parameters,)."""
        return [1.0 / holding.copies for holding in self.holdings]

    def as_group(self) -> "Share":
        """Return the same parameters as one scope."""
        return Share(self.holdings, self.rows, self.unit_dims, "group")

    def presence(self, present: Sequence[bool] | None) -> "Presence":
        """Return what follows from which parameters have a gradient; None for all."""
        key = b"" if present is None else bytes(present)
        if key not in self._known:
            if len(self._known) >= _KEPT:
                self._known.clear()
            self._known[key] = Presence(self, present)
        return self._known[key]

    def is_local(self, dimension: int) -> list[bool]:
        """Return for each scope whether it takes no part in a dimension.

        All parameters together take part everywhere. A tensor or a unit does so only where it is
        split: elsewhere its copies are whole, or it is another one.
        """
        if self.scope == "group":
            return [False]
        local = []
        for holding, n, unit_dim in zip(self.holdings, self.rows, self.unit_dims, strict=True):
            whole = holding.declared
            if self.scope == "unit" and unit_dim is not None:
                whole |= holding.split_along(unit_dim)
            local += [dimension not in holding.split - whole] * n
        return local


_KEPT = 8


class Presence:
    """What follows from which gradients there are.

    Args:
        share: How the parameters are held.
        present: Whether each has a gradient; None for all.
    """

    def __init__(self, share: Share, present: Sequence[bool] | None) -> None:
        self._share = share
        self._chosen = [True] * len(share.rows) if present is None else list(present)

    @cached_property
    def whole(self) -> bytes:
        """Whether there is a gradient of each parameter that every rank should have whole."""
        return bytes(self._compared(split=False))

    @cached_property
    def split(self) -> bytes:
        """The same of each parameter that ranks hold parts of."""
        return bytes(self._compared(split=True))

    def missing_of(self, group: ParameterGroup) -> list[str]:
        """Return the names of parameters without a gradient, of which another rank may have one."""
        if all(self._chosen):
            return []
        held = zip(group.names, self._chosen, self._share.holdings, strict=True)
        return [name for name, there, holding in held if holding.compared and not there]

    def count(self, flags_T: Tensor) -> Tensor:
        """Count the tensors with a flag, each in parts as large as the copies are many: 0-d."""
        flags_T = flags_T.to(torch.float64)
        weights = self._weights_T
        return (flags_T if weights is None else flags_T * weights.on(flags_T.device)).sum()

    def sums_of_copies(self, values_R: Tensor) -> Tensor | None:
        """Add up, for each dimension, the rows of which all its ranks have copies.

        Args:
            values_R: A number for each row.

        Returns:
            A sum for each of the first dimensions; for those behind them there is nothing. None
            where nothing is copied. A NaN may spread to all of them.
        """
        flags_RD = self._copied_rows
        return None if flags_RD is None else values_R @ flags_RD.on(values_R.device)

    def copies(self, names: Sequence[str], values_R: Sequence[float]) -> Copies:
        """Return the sum over the rows of each parameter of which other ranks have copies."""
        # Where nothing here is copied, values may be of several rows together.
        rows = repeat(0.0) if self._copied_rows is None else iter(values_R)
        held = zip(names, self._chosen, self._share.holdings, self._share.rows, strict=True)
        sums = [
            (name, holding, sum(next(rows) for _ in range(n if there else 0)))
            for name, there, holding, n in held
        ]
        return {(name, h.position): value for name, h, value in sums if h.copied}

    def _compared(self, *, split: bool) -> list[bool]:
        held = zip(self._chosen, self._share.holdings, strict=True)
        return [there for there, h in held if h.compared and bool(h.split) is split]

    @cached_property
    def _weights_T(self) -> Table | None:
        weights = self._chosen_of(self._share.weights)
        if all(weight == 1 for weight in weights):
            return None
        return Table.of(weights, torch.float64)

    @cached_property
    def _copied_rows(self) -> Table | None:
        """Whether the ranks of each dimension have copies of each row, (R, D)."""
        held = self._chosen_of(list(zip(self._share.holdings, self._share.rows, strict=True)))
        count = max((n + 1 for holding, _ in held for n in holding.copied), default=0)
        if not count:
            return None
        flags_RD = [
            [n in holding.copied for n in range(count)]
            for holding, rows in held
            for _ in range(rows)
        ]
        return Table.of(flags_RD, torch.float64)

    def _chosen_of(self, values: Sequence[_Value]) -> list[_Value]:
        return list(compress(values, self._chosen))
