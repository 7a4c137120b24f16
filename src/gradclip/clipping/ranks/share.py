"""What part of a group's norms this rank answers for: from its rows to the scopes of all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, compress
from typing import Literal, TypeVar

import torch
from torch import Tensor

from gradclip.clipping.collect.parameters import ParameterGroup
from gradclip.clipping.kernels.tables import Table
from gradclip.clipping.ranks.topology import Holding


@dataclass(eq=False)
class Share:
    """How the rows of a group's parameters become scopes, whatever gradients there are.

    Args:
        holdings: How each parameter is held.
        rows: How many rows the local part of each has.
        by_unit: Whether each has a row for each index of its leading dimension.
        scope: What a scope is.
    """

    holdings: Sequence[Holding]
    rows: Sequence[int]
    by_unit: Sequence[bool]
    scope: Literal["group", "tensor", "unit"]

    def __post_init__(self) -> None:
        self._present: list[bool] | None = None
        self._seen: dict[bytes, _Present] = {}

    @property
    def is_apart(self) -> bool:
        """Whether other ranks have scopes of their own, of which this one sees nothing."""
        return self.scope != "group"

    @property
    def scopes(self) -> int:
        """How many scopes there are: S, the same at every step."""
        return 1 if self.scope == "group" else sum(self.rows)

    def expect(self, present: list[bool] | None) -> None:
        """Say which parameters have a gradient at this step; None for all."""
        self._present = present

    def sums(self, values_RA: Tensor) -> Tensor:
        """Add up rows by scope, each in parts as large as the copies are many: (S, 3)."""
        weights = self._here.weights
        if weights is not None:
            values_RA = values_RA * weights.on(values_RA.device)[:, None]
        if self.scope == "group":
            return values_RA.sum(0, keepdim=True)
        return self._placed(values_RA)

    def maxima(self, values_R: Tensor) -> Tensor:
        """Return the largest row of each scope, (S,); NaN where there is one."""
        if self.scope != "group":
            return self._placed(values_R)
        return values_R.amax(0, keepdim=True) if len(values_R) else values_R.new_zeros(1)

    def spread(self, values_S: Tensor) -> Tensor:
        """Give each row that is there what its scope has, (R,); (1,) where all have the same."""
        places = self._here.places
        if self.scope == "group" or places is None:
            return values_S
        return values_S[places.on(values_S.device)]

    @property
    def has_alike(self) -> bool:
        """Whether there are gradients that every rank holds whole."""
        return self._here.alike is not None

    @property
    def presence(self) -> "_Present":
        """Which gradients there are."""
        return self._here

    def everywhere_alike(self, values_R: Tensor) -> Tensor:
        """Add up the rows of parameters that every rank holds whole: 0-d."""
        alike = self._here.alike
        assert alike is not None
        return values_R[alike.on(values_R.device)].sum()

    def count(self, found_T: Tensor) -> Tensor:
        """Count the tensors with a flag, each in parts as large as the copies are many: 0-d."""
        weights = self._here.weights_T
        found_T = found_T.to(torch.float64)
        return (found_T if weights is None else found_T * weights.on(found_T.device)).sum()

    def is_local(self, dimension: int) -> list[bool]:
        """Return for each scope whether it takes no part in a dimension.

        All parameters together take part everywhere. A tensor or a row does so only where it is
        split: elsewhere its copies are whole, or it is another one.
        """
        if self.scope == "group":
            return [False]
        local = []
        for holding, n, by_unit in zip(self.holdings, self.rows, self.by_unit, strict=True):
            apart = holding.declared | holding.by_row if by_unit else holding.declared
            local += [dimension not in holding.split - apart] * n
        return local

    @property
    def _here(self) -> "_Present":
        present = self._present
        key = b"" if present is None else bytes(present)
        if key not in self._seen:
            if len(self._seen) >= _KEPT:
                self._seen.clear()
            self._seen[key] = _Present(self, present)
        return self._seen[key]

    def _placed(self, values: Tensor) -> Tensor:
        """Put the rows that are there among all of them; the others are 0."""
        places = self._here.places
        if places is None:
            return values
        whole = values.new_zeros(self.scopes, *values.shape[1:])
        return whole.index_copy_(0, places.on(values.device), values)


_KEPT = 8
_Value = TypeVar("_Value")


class _Present:
    """What follows from which gradients there are."""

    def __init__(self, share: Share, present: list[bool] | None) -> None:
        self._share = share
        self._chosen = [True] * len(share.rows) if present is None else present
        self._all = all(self._chosen)

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
        if self._all:
            return []
        held = zip(group.names, self._chosen, self._share.holdings, strict=True)
        return [name for name, there, holding in held if holding.compared and not there]

    def _compared(self, *, split: bool) -> list[bool]:
        held = zip(self._chosen, self._share.holdings, strict=True)
        return [there for there, h in held if h.compared and bool(h.split) is split]

    @cached_property
    def weights(self) -> Table | None:
        """The part of each row that is counted here, (R,); None for all of it."""
        if self._share.scope != "group":
            return None
        return _table_of(self._by_row([1.0 / each.copies for each in self._share.holdings]))

    @cached_property
    def weights_T(self) -> Table | None:
        """The part of each tensor that is counted here, (T,); None for all of it."""
        return _table_of([1.0 / each.copies for each in self._chosen_of(self._share.holdings)])

    @cached_property
    def alike(self) -> Table | None:
        """Which rows are of parameters that every rank holds whole; None for none."""
        flags = self._by_row([h.compared and not h.split for h in self._share.holdings])
        places = [row for row, flag in enumerate(flags) if flag]
        return Table(torch.tensor(places, dtype=torch.int64)) if places else None

    @cached_property
    def places(self) -> Table | None:
        """Where each row is among those of all parameters, (R,); None where all are there."""
        if self._all:
            return None
        ends = accumulate(self._share.rows)
        spans = self._chosen_of(list(zip(ends, self._share.rows, strict=True)))
        places = [row for end, n in spans for row in range(end - n, end)]
        return Table(torch.tensor(places, dtype=torch.int64))

    def _by_row(self, values: Sequence[float]) -> list[float]:
        pairs = self._chosen_of(list(zip(values, self._share.rows, strict=True)))
        return [value for value, n in pairs for _ in range(n)]

    def _chosen_of(self, values: Sequence[_Value]) -> list[_Value]:
        return list(compress(values, self._chosen))


def _table_of(weights: list[float]) -> Table | None:
    if all(weight == 1 for weight in weights):
        return None
    return Table(torch.tensor(weights, dtype=torch.float64))
