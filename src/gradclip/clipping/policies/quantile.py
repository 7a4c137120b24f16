"""Clip by quantile: a limit that a share of the last norms was below."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from gradclip.clipping.policies.adaptive import AdaptiveClip, History, Limits, Sight
from gradclip.clipping.policies.order_statistics import merged, pushed, quantile, renewed

_TURNS = 16
"""Steps in which the quantile of each scope is found once: to sort many norms takes long."""
_MIXED = 0x9E3779B97F4A7C15 - 2**64
"""An odd number whose product with an int64 has bits of all digits in its upper half."""


class QuantileClip(AdaptiveClip):
    """Bound norms by the quantile ``q`` of the last ``window`` norms, that of this step among them.

    A norm is remembered as it is. With scope "tensor" the quantile of each tensor is found anew at
    every sixteenth step, in turn; that of a single scope at each step.

    References:
        Seetharaman et al. 2020, AutoClip, arXiv:2007.14469.

    >>> QuantileClip(q=0.95).window
    1000
    """

    clip_mode: Literal["quantile"] = "quantile"
    q: float = Field(default=0.9, ge=0, le=1)
    """The share of norms below the limit, so that about 1 - q of the steps are clipped."""
    window: int = Field(default=1000, ge=1)
    """How many norms are remembered."""
    warmup: int = Field(default=100, ge=0)
    """Norms of a scope before its limit counts; until then there is only ``cap``."""

    def initial_history(self, scopes: int, device: torch.device) -> History:
        """Return no norms."""
        none_SW = torch.full((scopes, self.window), torch.inf, dtype=torch.float64, device=device)
        if self.scope == "group":
            return {"norms": none_SW}
        turns_S = torch.zeros(scopes, dtype=torch.int64, device=device)
        recent_SB = none_SW[:, :_TURNS]
        return {
            "norms": none_SW,
            "recent": recent_SB,
            "quantile": none_SW[:, 0],
            "turn": turns_S,
        }

    def limits(self, seen: Sight, history: History) -> Limits:
        """Bound norms by their quantile."""
        counts_S, kept_SW = seen.counts_S, history["norms"]
        if self.scope == "group":
            kept_SW = pushed(kept_SW, counts_S, seen.norms_S)
            limits_S = torch.where(seen.early_S, torch.inf, quantile(kept_SW, counts_S, self.q))
            return Limits(limits_S, limits_S, {}, {"norms": kept_SW})
        turns_S = torch.where(counts_S == 1, _turns(seen.norms_S), history["turn"])
        recent_SB = pushed(history["recent"], counts_S, seen.norms_S)

        def last(rows: Tensor | slice) -> Tensor:
            return merged(kept_SW[rows], recent_SB[rows], counts_S[rows])

        is_due_S = counts_S > 0
        if len(counts_S) > 1:
            is_due_S &= turns_S == seen.step % _TURNS
        found_S = renewed(
            history["quantile"],
            is_due_S,
            lambda rows: quantile(last(rows), counts_S[rows], self.q),
        )
        # All norms of many tensors are copied only where a block is full.
        is_full_S = (counts_S % recent_SB.shape[1] == 0) & (seen.norms_S > 0)
        norms_SW = renewed(kept_SW, is_full_S, last)
        kept = {"norms": norms_SW, "recent": recent_SB, "quantile": found_S}
        limits_S = torch.where(seen.early_S, torch.inf, found_S)
        return Limits(limits_S, limits_S, {"turn": turns_S}, kept)


def _turns(norms_S: Tensor) -> Tensor:
    """Return whose turn it is when, from the bits of first norms: these are alike on all ranks.

    The place of a scope would be another one on ranks that hold other tensors beside it.
    """
    return (norms_S.view(torch.int64) * _MIXED >> 48) & (_TURNS - 1)
