"""Clip by the average norm: a limit some times the exponential average of each scope."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from gradclip.clipping.policies.adaptive import AdaptiveClip, History, Limits, Sight, finite
from gradclip.clipping.policies.order_statistics import Push, renewed

_MOST_KEPT = 100
"""Norms of warm-up of which the median is taken."""


class EMAClip(AdaptiveClip):
    """Bound norms by ``ratio`` times the exponential average of the norms of the same scope.

    After each step ``average = decay * average + (1 - decay) * min(norm, ratio * average)``. It
    begins as the median of the norms of warm-up, of at most 100 of them.

    References:
        Wang et al. 2025, AdaGC, arXiv:2502.11034.

    >>> EMAClip(ratio=3.0).scope
    'tensor'
    """

    clip_mode: Literal["ema"] = "ema"
    scope: Literal["group", "tensor"] = "tensor"  # type: ignore[misc]  # a field here
    """What has a limit of its own: all gradients of a pattern together, or each tensor."""
    ratio: float = Field(default=2.0, gt=1)
    """How many times the average a norm may be."""
    decay: float = Field(default=0.98, ge=0, lt=1)
    """How much of the average stays at each step."""
    warmup_max_norm: float | None = Field(default=None, gt=0)
    """During warm-up, a limit of the norm of all parameters of the pattern together."""
    start: Literal["median", "smallest"] = "median"
    """What the average begins as: the median of the norms of warm-up, after ``warmup_max_norm``, or
    the smallest of them, as AdaGC has it."""

    @property
    def follows(self) -> tuple[str, ...]:
        """The average."""
        return ("average",)

    def initial_history(self, scopes: int, device: torch.device) -> History:
        """Return no average, and no norms of warm-up."""
        averages_S = torch.zeros(scopes, dtype=torch.float64, device=device)
        if self.start == "smallest":
            return {"average": averages_S + torch.inf}
        kept = min(self.warmup, _MOST_KEPT)
        none_SK = torch.full((scopes, kept), torch.inf, dtype=torch.float64, device=device)
        return {"average": averages_S, "first": none_SK}

    def limits(self, seen: Sight, history: History) -> Limits:
        """Bound norms by their average."""
        norms_S, average_S = seen.norms_S, history["average"]
        thresholds_S = seen.after_warm_up(self.ratio * average_S)
        later_S = torch.lerp(torch.minimum(norms_S, thresholds_S), average_S, self.decay)
        if not seen.is_early:
            return Limits(thresholds_S, thresholds_S, {"average": later_S})
        early_S, early_norms_S = self._early(seen)
        begun_S, pushed = self._started(seen, early_norms_S, history)
        followed = {"average": torch.where(seen.early_S, begun_S, later_S)}
        return Limits(thresholds_S, thresholds_S, followed, pushed, early_S)

    def _early(self, seen: Sight) -> tuple[Tensor | None, Tensor]:
        """Return what norms may be during warm-up, and what they are then."""
        if self.warmup_max_norm is None:
            return None, seen.norms_S
        total_norm = finite(seen.measured.total_norm)
        shrunk_S = seen.norms_S * (self.warmup_max_norm / total_norm)
        is_above = total_norm > self.warmup_max_norm
        early_S = torch.where(is_above, shrunk_S, torch.inf)
        return early_S, torch.minimum(seen.norms_S, early_S)

    def _started(
        self, seen: Sight, norms_S: Tensor, history: History
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Return the average of warm-up, once it is known, and what is pushed to find it."""
        average_S = history["average"]
        if self.start == "smallest":
            return torch.minimum(average_S, norms_S), {}
        kept_SK = history["first"]
        push = Push.of(kept_SK, seen.before_S, norms_S, seen.early_S & seen.found_S)
        is_last_S = seen.counts_S == float(self.warmup)
        average_S = renewed(average_S, is_last_S, lambda rows: _medians(push.onto(kept_SK, rows)))
        return average_S, {"first": push}


def _medians(norms_SK: Tensor) -> Tensor:
    sorted_SK, count = norms_SK.sort(1).values, norms_SK.shape[1]
    return torch.lerp(sorted_SK[:, (count - 1) // 2], sorted_SK[:, count // 2], 0.5)
