"""Which scope each row of the gradients belongs to: the same scopes at every step."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, compress
from typing import Protocol, overload

import torch
from torch import Tensor

from gradclip.clipping.kernels.tables import Table
from gradclip.clipping.policies import Scope


class RowMap(Protocol):
    """From the rows of the gradients that exist, R, to the scopes of all parameters, S."""

    @property
    def is_one(self) -> bool:
        """Whether all rows are one scope, and each of them counts in full."""
        ...

    def sums(self, values_RA: Tensor) -> Tensor:
        """Add up rows by scope: (S, A); 0 where a scope has no row."""
        ...

    def maxima(self, values_R: Tensor) -> Tensor:
        """Return the largest row of each scope, (S,); NaN where there is one."""
        ...

    def spread(self, values_S: Tensor) -> Tensor:
        """Give each row that exists what its scope has, (R,); (1,) where all have the same."""
        ...


class OneScope:
    """All rows are one scope.

    Args:
        weights_R: How much of each row is counted here; None for all of it.
    """

    def __init__(self, weights_R: Table | None = None) -> None:
        self._weights_R = weights_R
        self.is_one = weights_R is None

    def sums(self, values_RA: Tensor) -> Tensor:
        """Add up all rows: (1, A)."""
        if self._weights_R is not None:
            values_RA = values_RA * self._weights_R.on(values_RA.device)[:, None]
        return values_RA.sum(0, keepdim=True)

    def maxima(self, values_R: Tensor) -> Tensor:
        """Return the largest of all rows: (1,)."""
        return values_R.amax(0, keepdim=True) if len(values_R) else values_R.new_zeros(1)

    def spread(self, values_S: Tensor) -> Tensor:
        """Give every row the same number."""
        return values_S


class OneScopeEach:
    """Each row is a scope of its own.

    Args:
        count: How many scopes there are.
        positions_R: Which scope each row is; None where all rows exist, in order.
    """

    is_one = False

    def __init__(self, count: int, positions_R: Table | None) -> None:
        self._count = count
        self._positions_R = positions_R

    def sums(self, values_RA: Tensor) -> Tensor:
        """Return the rows, each at the position of its scope."""
        return self._placed(values_RA)

    def maxima(self, values_R: Tensor) -> Tensor:
        """Return the rows, each at the position of its scope."""
        return self._placed(values_R)

    def spread(self, values_S: Tensor) -> Tensor:
        """Return the scopes that have a row."""
        if self._positions_R is None:
            return values_S
        return values_S[self._positions_R.on(values_S.device)]

    def _placed(self, values: Tensor) -> Tensor:
        if self._positions_R is None:
            return values
        every = values.new_zeros(self._count, *values.shape[1:])
        return every.index_copy_(0, self._positions_R.on(values.device), values)


class PatternScopes:
    """The scopes of all parameters of a pattern, whether they have a gradient or not.

    Args:
        scope: What a scope is.
        rows: Rows of the local part of each parameter.
        weights: How much of each parameter is counted here, less than 1 where other ranks hold
            copies; None where this process has all of them alone.
    """

    def __init__(
        self, scope: Scope, rows: Sequence[int], weights: Sequence[float] | None = None
    ) -> None:
        self.scope = scope
        self.rows = rows
        self._weights = weights
        self._known: dict[bytes, RowMap] = {}
        self.count = 1 if scope == "group" else sum(rows)
        """How many scopes there are: S."""

    def row_map(self, present: Sequence[bool] | None) -> RowMap:
        """Return where the rows of the parameters that have a gradient go.

        Args:
            present: Whether each parameter has one; None for all.
        """
        if self._weights is None and self.scope == "group":
            return _TOGETHER
        key = b"" if present is None else bytes(present)
        if key not in self._known:
            if len(self._known) >= _KEPT:
                self._known.clear()
            self._known[key] = self._row_map(present)
        return self._known[key]

    def _row_map(self, present: Sequence[bool] | None) -> RowMap:
        chosen = [True] * len(self.rows) if present is None else present
        if self.scope == "group":
            weights = zip(self._weights or (), self.rows, strict=True)
            of_rows = [weight for weight, n in compress(weights, chosen) for _ in range(n)]
            if all(weight == 1 for weight in of_rows):
                return _TOGETHER
            return OneScope(Table.of(of_rows, torch.float64))
        if all(chosen):
            return OneScopeEach(self.count, None)
        spans = compress(zip(accumulate(self.rows), self.rows, strict=True), chosen)
        positions = [row for end, n in spans for row in range(end - n, end)]
        return OneScopeEach(self.count, Table.of(positions))


_TOGETHER = OneScope()
_KEPT = 8


class ScopeNames(Sequence[str]):
    """What scopes are called, made when a name is read: a large model has very many units.

    Args:
        scope: What a scope is.
        pattern: The name of scope "group".
        parameters: The names of the parameters.
        rows: Rows of each.
        starts: The number of the first row of each that is here; 0 where all are.
    """

    def __init__(
        self,
        scope: Scope,
        pattern: str,
        parameters: Sequence[str],
        rows: Sequence[int],
        starts: Sequence[int] | None = None,
    ) -> None:
        self._by_unit = scope == "unit"
        self.scope = scope
        self.parts = [(pattern, 0, 1)]
        """Each parameter: its name, the number of its first scope here, and how many are here."""
        if scope != "group":
            firsts = starts if starts and self._by_unit else [0] * len(rows)
            self.parts = list(zip(parameters, firsts, rows, strict=True))

    def __len__(self) -> int:
        return sum(n for _, _, n in self.parts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        return tuple(self)[index]

    def __iter__(self) -> Iterator[str]:
        for name, start, rows in self.parts:
            if self._by_unit:
                yield from (f"{name}[{row}]" for row in range(start, start + rows))
            else:
                yield name
