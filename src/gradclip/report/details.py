"""The sentences below the finding: shares by thirds, skipped steps, and doubts."""

from collections import Counter

from gradclip.diagnostics.arrays import np
from gradclip.diagnostics.norm_statistics import thirds
from gradclip.report.faults import Faults
from gradclip.report.finding import Case
from gradclip.report.limits import limit_of
from gradclip.report.words import begun, counted, joined, number, share, titled

__all__ = ["details"]

_ENOUGH = 30
"""Steps from which on thirds of a run are told."""
_REASONS = {
    "nonfinite": "a gradient was not finite",
    "overflow": "the loss scale was too large",
    "policy": "the policy said so",
    "rank": "another process could not make them",
}


def details(case: Case, faults: Faults) -> str:
    """Say in a few sentences what else there is."""
    said = (
        _spike(case),
        _acted(case),
        _layer(case),
        _skipped(case, faults),
        _nonfinite(case, faults),
        _spacing(case),
        _zeros(case),
        _unknown_limit(case),
    )
    return " ".join(each for each in said if each)


def _spike(case: Case) -> str:
    """Say what makes a spike, beside the number."""
    if case.steps.are_clipped or not case.steps.count:
        return ""
    return "A spike is a norm above three times what one in ten of the norms around it exceeds."


def _acted(case: Case) -> str:
    count = len(case.run)
    if not 0 < case.clipped < count or count < _ENOUGH:
        return ""
    parts = [share(part).removesuffix(" %") for part in thirds(case.run.clipped.astype(np.float64))]
    return (
        f"{begun(limit_of(case.run)[0])} acted in {share(case.clipped / count)} of the "
        f"{case.run.counted} ({joined(parts)} % of the first, second and last third)."
    )


def _layer(case: Case) -> str:
    """Name the layer with the most of the norm where the finding is of something else."""
    found = case.blame
    if found is None or found.steps or len(found.layers.names) == 1:
        return ""
    name, part = found.layers.names[found.layer], share(found.share[found.layer])
    return f"{titled(name)} has the most of the squared norm, {part} on average."


def _skipped(case: Case, faults: Faults) -> str:
    run = case.run
    if not case.skipped:
        return ""
    reasons = Counter(_REASONS.get(each, each) for each in run.reasons.values())
    if not reasons and run.nonfinite[run.skipped].all():
        reasons[_REASONS["nonfinite"]] = case.skipped
    were = "was" if case.skipped == 1 else "were"
    said = f"{counted(case.skipped)} {were} skipped"
    if len(reasons) == 1:
        return f"{said} because {next(iter(reasons))}{faults.where}."
    each = joined([f"{count:,} because {why}" for why, count in reasons.most_common()])
    return f"{said}, {each}." if reasons else f"{said}{faults.where}."


def _nonfinite(case: Case, faults: Faults) -> str:
    made = int((case.run.nonfinite & ~case.run.skipped).sum())
    if not made:
        return ""
    if case.run.log is not None:
        return f"{counted(made, 'norm')} of the log {'is' if made == 1 else 'are'} not finite."
    where = "" if case.skipped else faults.where
    what = "the step was" if made == 1 else "the steps were"
    return f"In {counted(made)} a gradient was not finite{where}, and {what} made all the same."


def _spacing(case: Case) -> str:
    spacing = case.run.spacing
    if spacing is None or spacing <= 1:
        return ""
    return f"There is one norm of every {number(spacing)} steps, so spikes may be missing."


def _zeros(case: Case) -> str:
    zeros = int((case.run.norm == 0).sum())
    if not zeros or not len(case.run.usable):
        return ""
    return (
        f"{counted(zeros, 'norm')} {'is' if zeros == 1 else 'are'} exactly 0, and left out of "
        "these numbers."
    )


def _unknown_limit(case: Case) -> str:
    if case.run.log is None or case.run.tells_clipping:
        return ""
    return "The log names no limit, so nothing is known of clipping."
