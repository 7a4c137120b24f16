"""The limit of a run in words."""

from gradclip.diagnostics.arrays import np
from gradclip.diagnostics.known import Known
from gradclip.report.words import number

__all__ = ["limit_of"]


def limit_of(run: Known) -> tuple[str, bool]:
    """Name the limit, and say whether it is several: ``the limit of 1``, ``limits of 0.8 to 1``."""
    known = run.limit[np.isfinite(run.limit)]
    if len(run.groups) > 1:
        return "the limits by group", True
    if not len(known):
        return "clipping", False
    low, high = float(known.min()), float(known.max())
    if low == high:
        return f"the limit of {number(low)}", False
    return f"limits of {number(low)} to {number(high)}", True
