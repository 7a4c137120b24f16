"""Policies as papers have them, to compare with: each function returns a policy.

The defaults of the policies themselves are others: they are meant to be used.
"""

from gradclip.clipping.policies import EMAClip, QuantileClip, ZScoreClip

__all__ = ["adagc_paper", "autoclip", "zclip_paper"]


def autoclip(q: float = 0.1, window: int = 1000) -> QuantileClip:
    """Return AutoClip: the 10th percentile of the norms so far, that of this step among them.

    It clips about nine of ten steps. The paper keeps all norms, this one the last ``window``.

    References:
        Seetharaman et al. 2020, arXiv:2007.14469.

    >>> autoclip().warmup
    0
    """
    return QuantileClip(q=q, window=window, warmup=0)


def zclip_paper() -> ZScoreClip:
    """Return ZClip: 25 steps that are not clipped, then spikes are remembered as they were clipped.

    It never follows a level that has risen for good. The fixed limit that the published code has
    besides is left out: ``cap`` is one.

    References:
        Kumar et al. 2025, arXiv:2504.02507.

    >>> zclip_paper().feedback
    'clipped'
    """
    return ZScoreClip(z=2.5, decay=0.97, warmup=25, target="reciprocal", feedback="clipped")


def adagc_paper() -> EMAClip:
    """Return AdaGC: 1.05 times the average norm of each tensor, after 100 steps with a total of 1.

    References:
        Wang et al. 2025, arXiv:2502.11034.

    >>> adagc_paper().ratio
    1.05
    """
    return EMAClip(ratio=1.05, decay=0.98, warmup=100, warmup_max_norm=1.0, start="smallest")
