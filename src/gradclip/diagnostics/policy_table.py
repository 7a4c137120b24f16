"""What each policy would have done in a run that is over."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradclip.diagnostics.arrays import Numbers, np
from gradclip.diagnostics.norm_statistics import thirds

if TYPE_CHECKING:
    from gradclip.clipping.policies import Policy

__all__ = ["Replayed", "replayed", "table"]

_MOST = 2000
"""Norms that are given to a policy with a history, one after the other."""
_ROUGH = 10
_CUSTOMARY = 1.0


@dataclass(frozen=True)
class Replayed:
    """A policy, and what it would have done.

    Args:
        policy: The policy.
        clip_fraction: The share of steps that it clips.
        by_third: The same in each third of the run.
        lr_factor: The mean of what steps are multiplied by.
        is_rough: Whether its history was given so few of the norms that this is only an estimate.
        settled: The share of steps that it clips after the beginning of the run.
    """

    policy: "Policy"
    clip_fraction: float
    by_third: tuple[float, float, float]
    lr_factor: float
    is_rough: bool = False
    settled: float = 0.0


def table(
    norms: Numbers, *, cap: float, tenth: float, spacing: float, limit: float | None
) -> list[Replayed]:
    """Replay every policy that norms are enough for.

    Args:
        norms: Finite, above 0.
        cap: The limit that guards.
        tenth: The limit that a tenth of the steps exceed.
        spacing: Steps between two norms.
        limit: The limit that the run had, if any is known.
    """
    from gradclip.clipping import EMAClip, NormClip, QuantileClip, ZScoreClip  # noqa: PLC0415

    fixed = {cap, tenth, _CUSTOMARY, limit or _CUSTOMARY}
    policies: list[Policy] = [NormClip(max_norm=each) for each in sorted(fixed, reverse=True)]
    policies += [
        EMAClip(ratio=2.0, scope="group", cap=cap),
        ZScoreClip(z=2.5, feedback="bounded", cap=cap),
        QuantileClip(q=0.9, cap=cap),
    ]
    return [replayed(norms, policy, spacing) for policy in policies]


def replayed(norms: Numbers, policy: "Policy", spacing: float, cut: int = 0) -> Replayed:
    """Replay a policy; ``cut`` is how many norms are the beginning of the run.

    Where norms were logged now and then, or there are very many, a history gets some of them, and
    forgets as much from one to the next as it would have in between.
    """
    limit = policy.fixed()
    if limit is not None:  # what `replay` says of each norm, for all at once
        return _told(policy, np.minimum(1, limit.threshold / norms), cut)
    from gradclip.diagnostics.replay import replay  # noqa: PLC0415 - it imports torch

    every = math.ceil(len(norms) / _MOST)
    gap = spacing * every
    run = replay(norms[::every], _slowed(policy, gap))
    return _told(policy, run.coefficients.numpy(), cut // every, is_rough=gap > _ROUGH)


def _told(policy: "Policy", coefficients: Numbers, cut: int, *, is_rough: bool = False) -> Replayed:
    is_clipped = (coefficients < 1 - 1e-6).astype(np.float64)
    share, settled = float(is_clipped.mean()), float(is_clipped[cut:].mean())
    factor = float(coefficients.mean())
    return Replayed(policy, share, thirds(is_clipped), factor, is_rough, settled)


def _slowed(policy: "Policy", gap: float) -> "Policy":
    """Return the policy for norms that are so many steps apart."""
    from gradclip.clipping import QuantileClip  # noqa: PLC0415

    if gap <= 1:
        return policy
    if isinstance(policy, QuantileClip):
        window, warmup = (max(20, round(each / gap)) for each in (policy.window, policy.warmup))
        return policy.replace(window=window, warmup=warmup)
    decay: float = policy.decay  # type: ignore[attr-defined]  # both others have one
    return policy.replace(decay=max(0.5, decay**gap))
