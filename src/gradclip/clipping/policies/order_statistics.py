"""Quantiles of the norms that a policy keeps, without a host read."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from gradclip.clipping import flags
from gradclip.clipping.kernels.tables import Table


def pushed(kept_SW: Tensor, counts_S: Tensor, norms_S: Tensor, found_S: Tensor) -> Tensor:
    """Return the last W norms of each scope with one more in the place of the oldest.

    Args:
        kept_SW: The last norms; infinite where there is none yet.
        counts_S: How many there were, with the new one: float64.
        norms_S: The new ones.
        found_S: Where there is one; elsewhere what is kept stays as it is.
    """
    places_S1 = ((counts_S - 1) % kept_SW.shape[1]).to(torch.int64)[:, None]
    norms_S1 = torch.where(found_S[:, None], norms_S[:, None], kept_SW.gather(1, places_S1))
    return kept_SW.scatter(1, places_S1, norms_S1)


def merged(kept_SW: Tensor, recent_SB: Tensor, counts_S: Tensor) -> Tensor:
    """Return the last W norms of each scope, of which the newest wait in blocks of B.

    Args:
        kept_SW: The last norms, without those that wait.
        recent_SB: The norms of the block that is being filled; B is at most W.
        counts_S: How many norms there were: float64.
    """
    width, block = kept_SW.shape[1], recent_SB.shape[1]
    last_S1 = counts_S.to(torch.int64)[:, None] - 1
    # The newest B norms, each at its place in the block: negative numbers are before the first.
    ages_SB = (last_S1 - _numbers(block).on(counts_S.device)) % block
    places_SB = (last_S1 - ages_SB) % width
    waits_SB = ages_SB <= last_S1 % block
    return kept_SW.scatter(
        1, places_SB, torch.where(waits_SB, recent_SB, kept_SW.gather(1, places_SB))
    )


def quantile(kept_SW: Tensor, counts_S: Tensor, q: float) -> Tensor:
    """Return a quantile of the norms that each scope has kept, linear between two of them: (S,).

    Args:
        kept_SW: The last norms; infinite where there is none yet.
        counts_S: How many norms there were: float64.
        q: Which quantile, 0 to 1.
    """
    width = kept_SW.shape[1]
    rows_S = counts_S.clamp(max=width).to(torch.int64)
    found_S3 = _places(width, q).on(kept_SW.device).index_select(0, rows_S)
    two_S2 = kept_SW.sort(1).values.gather(1, found_S3[:, :2].to(torch.int64))
    return torch.lerp(two_S2[:, 0], two_S2[:, 1], found_S3[:, 2])


@lru_cache(maxsize=64)
def _numbers(count: int) -> Table:
    return Table(torch.arange(count, device="cpu"))


@lru_cache(maxsize=64)
def _places(width: int, q: float) -> Table:
    """Return between which two of so many sorted norms a quantile is, and how far from the first.

    A row for each number of norms, from 0 to ``width``.
    """
    last = torch.arange(-1, width, dtype=torch.float64, device="cpu").clamp(min=0)
    places = last * q
    below = places.floor()
    return Table(torch.stack([below, torch.minimum(below + 1, last), places - below], 1))


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
    return old_S.index_copy(0, rows, of_rows(rows)) if len(rows) else old_S


def chosen(values_S: Tensor, rows: Tensor | None) -> Tensor:
    """Return the rows that ``renewed`` asks for."""
    return values_S if rows is None else values_S.index_select(0, rows)
