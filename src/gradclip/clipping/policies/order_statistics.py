"""Quantiles of the norms that a policy keeps, without a host read."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from gradclip.clipping import flags
from gradclip.clipping.kernels.tables import Table


class Push(NamedTuple):
    """One more norm of each scope, in the place of the oldest of those that are kept.

    Args:
        places_S1: The places.
        norms_S1: What is written there: where there is no norm, what was there.
    """

    places_S1: Tensor
    norms_S1: Tensor

    @classmethod
    def of(cls, kept_SW: Tensor, before_S: Tensor, norms_S: Tensor, found_S: Tensor) -> "Push":
        """Push the norms of a step.

        Args:
            kept_SW: The last norms.
            before_S: How many there were, without the new one: float64.
            norms_S: The new ones.
            found_S: Where there is one.
        """
        places_S1 = (before_S % float(kept_SW.shape[1])).to(torch.int64)[:, None]
        oldest_S1 = kept_SW.gather(1, places_S1)
        return cls(places_S1, torch.where(found_S[:, None], norms_S[:, None], oldest_S1))

    def onto(self, kept_SW: Tensor, rows: Tensor | None) -> Tensor:
        """Return the norms of some scopes with the new one."""
        of_rows = [chosen(each, rows) for each in (kept_SW, self.places_S1, self.norms_S1)]
        return of_rows[0].scatter(1, *of_rows[1:])


def quantile(kept_SW: Tensor, counts_S: Tensor, q: float) -> Tensor:
    """Return a quantile of the norms that each scope has kept, linear between two of them: (S,).

    Args:
        kept_SW: The last norms; 0 where there is none yet.
        counts_S: How many norms there were: float64.
        q: Which quantile, 0 to 1.
    """
    places = _places(kept_SW.shape[1], q)
    rows_S = counts_S.clamp(max=kept_SW.shape[1]).to(torch.int64)
    found_S3 = places.table.on(kept_SW.device).index_select(0, rows_S)
    # Few norms are above most quantiles, so these take less than to sort all.
    beyond_SK = kept_SW.topk(places.enough, 1).values
    two_S2 = beyond_SK.gather(1, found_S3[:, :2].to(torch.int64))
    return torch.lerp(two_S2[:, 0], two_S2[:, 1], found_S3[:, 2])


class _Places(NamedTuple):
    """Between which two norms a quantile is, counted from the largest.

    Args:
        table: For each number of norms, from 0: the places, and how far it is from the first.
        enough: How many of the largest norms are needed.
    """

    table: Table
    enough: int


@lru_cache(maxsize=64)
def _places(width: int, q: float) -> _Places:
    rows = []
    for count in range(width + 1):
        last = max(count - 1, 0)
        below, apart = divmod(last * q, 1.0)
        above = min(below + 1.0, last)
        rows.append([last - below, last - above, apart])
    most = max(max(row[:2]) for row in rows)
    return _Places(Table.of(rows, torch.float64), int(most) + 1)


def renewed(old_S: Tensor, due_S: Tensor, of_rows: Callable[[Tensor | None], Tensor]) -> Tensor:
    """Return numbers of which those that are due are computed anew.

    Args:
        old_S: The numbers before, or rows of them: returned itself where none is due on the CPU.
        due_S: Which are due.
        of_rows: Computes those of some scopes. On the CPU it is told which are due; on a device,
            where to ask that would make the host wait, None, and computes all.
    """
    if flags.host_waits_for(old_S.device):
        due = due_S.view(-1, *[1] * (old_S.dim() - 1))
        return torch.where(due, of_rows(None), old_S)
    rows = due_S.nonzero()[:, 0]
    if len(rows) == len(old_S):
        return of_rows(None)
    return old_S.index_copy(0, rows, of_rows(rows)) if len(rows) else old_S


def chosen(values_S: Tensor, rows: Tensor | None) -> Tensor:
    """Return the rows that ``renewed`` asks for."""
    return values_S if rows is None else values_S.index_select(0, rows)
