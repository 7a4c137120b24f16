"""Clip by z-score: a limit some standard deviations above the usual norm."""

from collections.abc import Sequence
from functools import lru_cache
from math import inf, sqrt
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from gradclip.clipping.kernels.tables import Table
from gradclip.clipping.policies.adaptive import AdaptiveClip, History, Limits, Sight

_EPSILON = 1e-6
"""Added to the standard deviation, as the paper has it."""
_LEAST = 1e-3
"""The least standard deviation, as a share of the mean: norms without any scatter, such as those
of a constant gradient, would allow no other norm ever again."""
_EARLY = 5.0
"""What a norm of warm-up is remembered as at most, in means of those before it: a single spike
there would leave the limit beyond reach for hundreds of steps."""


class ZScoreClip(AdaptiveClip):
    """Bound norms whose z-score is above ``z``, by an exponential mean and variance of the norms.

    ``score = (norm - mean) / (sigma + 1e-6)`` with the standard deviation ``sigma``. A norm with a
    score above ``z`` is brought to ``mean + z * sigma / (score / z)``. Then ``mean = decay * mean
    + (1 - decay) * fed`` and ``variance = decay * variance + (1 - decay) * (fed - mean)^2``, where
    ``fed`` is the norm, but for one above the limit what ``feedback`` says. They begin as mean and
    population variance of the norms of warm-up.

    References:
        Kumar et al. 2025, ZClip, arXiv:2504.02507.

    >>> ZScoreClip(z=3.0).z
    3.0
    """

    clip_mode: Literal["zscore"] = "zscore"
    z: float = Field(default=2.5, gt=0)
    """Standard deviations above the mean that a norm may have."""
    decay: float = Field(default=0.97, ge=0, lt=1)
    """How much of the mean and of the variance stays at each step."""
    target: Literal["reciprocal", "threshold", "mean"] = "reciprocal"
    """What a spike gets: a norm nearer to the mean the higher it was, or the limit, or the mean."""
    feedback: Literal["bounded", "clipped", "raw"] = "bounded"
    """What is remembered of a spike: the limit, or the norm it got, or its own norm. The second
    never follows a level that has risen for good, the third lets spikes raise the limit. A spike
    that ``max_spikes`` lets pass is remembered as the limit in any case. With the first a norm of
    warm-up is remembered as at most 5 times the mean of those before it."""

    @property
    def follows(self) -> tuple[str, ...]:
        """Mean and standard deviation."""
        return ("mean", "deviation")

    def initial_history(self, scopes: int, device: torch.device) -> History:
        """Return no mean and no deviation yet."""
        zeros_S = torch.zeros(scopes, dtype=torch.float64, device=device)
        return {"mean": zeros_S, "deviation": zeros_S}

    def limits(self, seen: Sight, history: History) -> Limits:
        """Bound the z-score."""
        mean_S, deviation_S = history["mean"], history["deviation"]
        sigma_S = torch.maximum(deviation_S, mean_S * _LEAST)
        width_S = sigma_S + _EPSILON
        thresholds_S = seen.after_warm_up(torch.add(mean_S, width_S, alpha=self.z))
        targets_S = thresholds_S
        if seen.may_be_above(thresholds_S):
            targets_S = self._targets(seen.norms_S, mean_S, sigma_S, width_S, thresholds_S)
        weights, shares, rests, most = self._weights(seen)
        fed_S = self._fed(seen, thresholds_S, targets_S, mean_S, most)
        away_S = fed_S - mean_S
        # hypot: squares may be beyond float64.
        later_S = torch.hypot(deviation_S, shares * away_S) * rests
        followed = {"mean": torch.lerp(mean_S, fed_S, weights), "deviation": later_S}
        return Limits(thresholds_S, targets_S, followed)

    def _targets(
        self, norms_S: Tensor, mean_S: Tensor, sigma_S: Tensor, width_S: Tensor, limits_S: Tensor
    ) -> Tensor:
        if self.target == "threshold":
            return limits_S
        if self.target == "mean":
            return mean_S
        scores_S = (norms_S - mean_S) / width_S
        return torch.addcdiv(mean_S, sigma_S, scores_S, value=self.z * self.z)

    def _fed(
        self,
        seen: Sight,
        thresholds_S: Tensor,
        targets_S: Tensor,
        mean_S: Tensor,
        most: float | Tensor,
    ) -> Tensor:
        norms_S = seen.norms_S
        if self.feedback == "bounded" or self.on_spike == "skip":
            fed_S = torch.minimum(norms_S, thresholds_S)
            # The first norm has no mean before it: infinity times 0 is no number, and no bound.
            return torch.fmin(fed_S, mean_S * most) if seen.is_early else fed_S
        if self.feedback == "clipped":
            return torch.where(norms_S > thresholds_S, targets_S, norms_S)
        return norms_S

    def _weights(self, seen: Sight) -> Sequence[float | Tensor]:
        """Return what norms are weighted with: of warm-up each the same, then exponentially."""
        weights = _weights(self.warmup, self.decay)
        if not seen.is_early:
            return weights.of_later
        places_S = seen.counts_S.clamp(max=self.warmup + 1).to(torch.int64)
        return weights.table.on(places_S.device).index_select(0, places_S).unbind(1)


class _Weights(NamedTuple):
    """What a norm counts, by its number.

    Weights of the norm, of its distance, and of the deviation before; and how many means it is
    remembered as at most.

    Args:
        table: Of each norm of warm-up, from number 0, and in the last row those of all later ones.
        of_later: That row.
    """

    table: Table
    of_later: list[float]


@lru_cache(maxsize=64)
def _weights(warmup: int, decay: float) -> _Weights:
    rows = [
        _row(1 / max(number, 1), 1.0, _EARLY if number > 1 else inf) for number in range(warmup + 1)
    ]
    # After warm-up the distance is that from the new mean.
    rows.append(_row(1 - decay, 1 - (1 - decay), inf))
    return _Weights(Table.of(rows, torch.float64), rows[-1])


def _row(weight: float, share: float, most: float) -> list[float]:
    """Return what a norm counts; of the first n the last adds away^2 (n - 1) / n^2."""
    return [weight, sqrt(weight * share), sqrt(1 - weight), most]
