"""Quantiles of the norms that a policy keeps, without a host read."""

from collections.abc import Callable

import torch
from torch import Tensor

from gradclip.clipping import flags


def pushed(kept_SW: Tensor, counts_S: Tensor, norms_S: Tensor) -> Tensor:
    """Return the last W norms of each scope with one more in the place of the oldest.

    Args:
        kept_SW: The last norms; infinite where there is none yet.
        counts_S: How many there were, with the new one.
        norms_S: The new ones; 0 is none, and leaves what is kept as it is.
    """
    places_S1 = ((counts_S - 1) % kept_SW.shape[1])[:, None]
    norms_S1 = norms_S[:, None]
    norms_S1 = torch.where(norms_S1 > 0, norms_S1, kept_SW.gather(1, places_S1))
    return kept_SW.scatter(1, places_S1, norms_S1)


def merged(kept_SW: Tensor, recent_SB: Tensor, counts_S: Tensor) -> Tensor:
    """Return the last W norms of each scope, of which the newest wait in blocks of B.

    Args:
        kept_SW: The last norms, without those that wait.
        recent_SB: The norms of the block that is being filled; B is at most W.
        counts_S: How many norms there were.
    """
    width, block = kept_SW.shape[1], recent_SB.shape[1]
    waiting_S1 = ((counts_S - 1) % block + 1)[:, None]
    numbers_B = torch.arange(block, device=counts_S.device)
    places_SB = (counts_S[:, None] - waiting_S1 + numbers_B) % width
    waits_SB = numbers_B < waiting_S1
    values_SB = torch.where(waits_SB, recent_SB, kept_SW.gather(1, places_SB))
    return kept_SW.scatter(1, places_SB, values_SB)


def quantile(kept_SW: Tensor, counts_S: Tensor, q: float) -> Tensor:
    """Return a quantile of the norms that each scope has kept, linear between two of them: (S,).

    Args:
        kept_SW: The last norms; infinite where there is none yet.
        counts_S: How many norms there were.
        q: Which quantile, 0 to 1.
    """
    sorted_SW = kept_SW.sort(1).values
    last_S = counts_S.clamp(1, kept_SW.shape[1]) - 1
    places_S = last_S.to(torch.float64) * q
    below_S = places_S.to(torch.int64)
    above_S = torch.minimum(below_S + 1, last_S)
    two_S2 = sorted_SW.gather(1, torch.stack([below_S, above_S], 1))
    return torch.lerp(two_S2[:, 0], two_S2[:, 1], places_S - below_S)


def renewed(old_S: Tensor, due_S: Tensor, of_rows: Callable[[Tensor | slice], Tensor]) -> Tensor:
    """Return numbers of which those that are due are computed anew.

    Args:
        old_S: The numbers before, or rows of them: returned itself where none is due on the CPU.
        due_S: Which are due.
        of_rows: Computes those of some scopes. On the CPU it is told which are due; a device,
            where to ask that would make the host wait, computes all.
    """
    if flags.host_waits_for(old_S.device):
        due = due_S.view(-1, *[1] * (old_S.dim() - 1))
        return torch.where(due, of_rows(slice(None)), old_S)
    rows = due_S.nonzero()[:, 0]
    return old_S.index_copy(0, rows, of_rows(rows)) if len(rows) else old_S
