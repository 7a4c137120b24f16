"""Clip by quantile: a limit that a share of the last norms was below."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from gradclip.clipping.policies.adaptive import AdaptiveClip, History, Limits, Sight
from gradclip.clipping.policies.order_statistics import Push, chosen, quantile, renewed

_TURNS = 16
"""Norms of a tensor for which its quantile is found once: to sort many norms takes long."""
_MIXED = 0x9E3779B97F4A7C15 - 2**64
"""An odd number whose product with an int64 has bits of all digits in its upper half."""
_ALL_BUT_4 = 60
"""Bits that are shifted out, so that 16 numbers are left."""


class QuantileClip(AdaptiveClip):
    """Bound norms by the quantile ``q`` of the last ``window`` norms, that of this step among them.

    A norm is remembered as it is. With scope "tensor" the quantile of each tensor is found anew at
    every sixteenth of its norms, and tensors take turns; with scope "group" at each step.

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

    @property
    def follows(self) -> tuple[str, ...]:
        """The quantile of each tensor, and when its turn is to be found anew."""
        return () if self.scope == "group" else ("quantile", "turn")

    def initial_history(self, scopes: int, device: torch.device) -> History:
        """Return no norms."""
        norms = {"norms": torch.zeros(scopes, self.window, dtype=torch.float64, device=device)}
        if self.scope == "group":
            return norms
        none_S = torch.full((scopes,), torch.inf, dtype=torch.float64, device=device)
        return {**norms, "quantile": none_S, "turn": torch.zeros_like(none_S)}

    def limits(self, seen: Sight, history: History) -> Limits:
        """Bound norms by their quantile."""
        counts_S, kept_SW = seen.counts_S, history["norms"]
        push = Push.of(kept_SW, seen.before_S, seen.norms_S, seen.found_S)

        def found(rows: Tensor | None) -> Tensor:
            return quantile(push.onto(kept_SW, rows), chosen(counts_S, rows), self.q)

        if self.scope == "group":
            limits_S = seen.after_warm_up(found(None))
            return Limits(limits_S, limits_S, {}, {"norms": push})
        turns_S = renewed(
            history["turn"], counts_S == 1.0, lambda rows: _turns(chosen(seen.norms_S, rows))
        )
        is_due_S = (counts_S + turns_S) % float(_TURNS) == 0.0
        if self.warmup < _TURNS:  # there may be none when the first is asked for
            is_due_S |= counts_S == self.warmup + 1.0
        found_S = renewed(history["quantile"], is_due_S, found)
        limits_S = seen.after_warm_up(found_S.clone())
        followed = {"quantile": found_S, "turn": turns_S}
        return Limits(limits_S, limits_S, followed, {"norms": push})


def _turns(norms_S: Tensor) -> Tensor:
    """Return whose turn it is when, from the bits of first norms: these are alike on all ranks.

    The place of a scope would be another one on ranks that hold other tensors beside it.
    """
    return (norms_S.view(torch.int64) * _MIXED >> _ALL_BUT_4).to(torch.float64)
