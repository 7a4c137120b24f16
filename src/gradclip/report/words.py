"""The sentences of the report: what was found, first in one sentence, then in a few more."""

import math
from collections.abc import Sequence

from gradclip.diagnostics.arrays import np
from gradclip.diagnostics.norm_statistics import thirds
from gradclip.diagnostics.summary import compact, summarise
from gradclip.diagnostics.runs import Run
from gradclip.report.blame import Blame, Outstanding
from gradclip.report.faults import Faults
from gradclip.report.known import Known

__all__ = ["counted", "finding", "joined", "more", "number", "share"]

_OFTEN = 0.1
"""Where more steps than this were clipped, one does not call them spikes."""
_BROAD = 2.5
"""Where the 90th percentile is more medians than this, norms vary much."""
_ENOUGH = 30
"""Steps from which on thirds of a run are told."""
_SEVERAL = ("limits", "the limits")
_REASONS = {
    "nonfinite": "a gradient was not finite",
    "overflow": "the loss scale was too large",
    "policy": "the policy said so",
    "rank": "another process could not make them",
}


def number(value: float) -> str:
    """Write a number in three digits, and a dash for none.

    >>> number(0.2034), number(1190.4), number(2.5e7), number(math.nan)
    ('0.203', '1,190', '2.5e7', '\N{EN DASH}')
    """
    if not math.isfinite(value):
        return "\N{EN DASH}"
    if 1000 <= abs(value) < 1e5:  # noqa: PLR2004
        return f"{float(f'{value:.3g}'):,.0f}"
    return compact(value)


def share(part: float) -> str:
    """Write a share in per cent, in two digits below 10 %.

    >>> share(0.0164), share(0.4142), share(0.9996), share(0.0), share(1.0)
    ('1.6 %', '41 %', '99.9 %', '0 %', '100 %')
    """
    number = 100 * part
    if 99 < number < 100:  # noqa: PLR2004 - not all of it
        return f"{min(number, 99.9):.1f} %"
    if number >= 9.95 or number in (0, 100):  # noqa: PLR2004
        return f"{number:.0f} %"
    return f"{number:.2g} %" if number >= 0.01 else "below 0.01 %"  # noqa: PLR2004


def counted(count: int, what: str = "step") -> str:
    """Write a number of things.

    >>> counted(1), counted(5000, "logged step")
    ('1 step', '5,000 logged steps')
    """
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def joined(names: Sequence[str]) -> str:
    """Write a list: ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def finding(run: Known, whole: Run, steps: Outstanding, found: Blame | None) -> str:
    """Say in one sentence what matters most."""
    one = run.counted.removesuffix("s")
    skipped, count = int(run.skipped.sum()), len(run)
    if not len(run.usable):
        return _without_norms(run, one)
    if skipped > count / 2:
        return f"{skipped:,} of {counted(count, one)} were not made."
    diverged = summarise(whole.steps).diverged_at
    if diverged is not None and not skipped:
        return f"The loss is not finite from step {diverged:,} on."
    clipped = int(run.clipped.sum())
    if count == 1:
        return f"One {one}, with a norm of {number(run.usable[0])}{', clipped' * clipped}."
    if clipped > count / 2 and count >= _ENOUGH:
        part = f"{share(clipped / count)} of the {one}s" if clipped < count else f"every {one}"
        limit = _limit(run) or "clipping"
        sets, it = ("set", "they") if limit.startswith(_SEVERAL) else ("sets", "it")
        return f"{_begun(limit)} {sets} the step size: {it} clipped {part}."
    if found is not None and found.steps:
        return _of_layer(found, steps, one)
    if clipped:
        limit = _limit(run)
        if limit is None:
            were = "was" if clipped == 1 else "were"
            return f"{clipped:,} of {counted(count, one)} {were} clipped."
        return f"{_begun(limit)} clipped {clipped:,} of {counted(count, one)}."
    return _unclipped(run, steps, one)


def more(run: Known, whole: Run, steps: Outstanding, found: Blame | None, faults: Faults) -> str:
    """Say in a few sentences what else there is: shares by thirds, skipped steps, doubts."""
    said = [_shares(run), _layer_beside(run, steps, found), _skipped(run, faults)]
    diverged = summarise(whole.steps).diverged_at
    if diverged is not None and run.skipped.any():
        said.append(f"The loss is not finite from step {diverged:,} on.")
    if run.spacing is not None and run.spacing > 1:
        said.append(
            f"There is a norm of every {_ordinal(run.spacing)} step only, so spikes may be missing."
        )
    if (zeros := int((run.norm == 0).sum())) and len(run.usable):
        are = "is" if zeros == 1 else "are"
        said.append(f"{counted(zeros, 'norm')} {are} exactly 0, and left out of these numbers.")
    if run.log is not None and not run.tells_clipping:
        said.append("The log names no limit, so nothing is known of clipping.")
    return " ".join(each for each in said if each)


def _begun(text: str) -> str:
    return text[:1].upper() + text[1:]


def _titled(layer: str) -> str:
    """Begin a sentence with a layer; names of modules stay as they are."""
    return _begun(layer) if layer.startswith("layer ") else layer


def _without_norms(run: Known, one: str) -> str:
    if run.skipped.all():
        return f"All {counted(len(run), one)} were skipped." if len(run) > 1 else "The one step was skipped."
    if run.nonfinite.any():
        return f"No gradient norm is finite, in {counted(len(run), one)}."
    if (run.norm == 0).any():
        return f"Every gradient norm is 0, in {counted(len(run), one)}."
    return f"No gradient norm is known, of {counted(len(run), one)}."


def _limit(run: Known) -> str | None:
    """Name the limit, ``the limit of 1`` or ``limits of 0.8 to 1``; None where none is known."""
    known = run.limit[np.isfinite(run.limit)]
    if len(run.groups) > 1:
        return "the limits by group"
    if not len(known):
        return None
    low, high = float(known.min()), float(known.max())
    return f"the limit of {number(low)}" if low == high else f"limits of {number(low)} to {number(high)}"


def _of_layer(found: Blame, steps: Outstanding, one: str) -> str:
    name = found.layers.names[found.layer]
    title = _titled(name)
    part, usual = share(found.share[found.layer]), share(found.usual[found.layer])
    where = _where(found, steps, one)
    if found.verdict == "makes":
        frequent = steps.are_clipped and steps.count > _OFTEN * len(steps.which)
        does = "drives the clipping" if frequent else "makes the spikes"
        return f"{title} {does}: {part} of the squared norm {where}."
    if found.verdict == "most":
        others = f", {usual} in the others" if found.others else ""
        return f"{title} has most of the norm: {part} of its square {where}{others}."
    if len(found.layers.names) == 1:
        did = "were clipped" if steps.are_clipped else f"exceed {number(steps.above)}"
        return f"{steps.count:,} of {counted(len(steps.which), one)} {did}."
    return f"No layer stands out {where}: the most is {part}, of {name}."


def _where(found: Blame, steps: Outstanding, one: str) -> str:
    """Say in which steps, and how many of them are known."""
    kind = f"clipped {one}" if steps.are_clipped else one
    tail = "" if steps.are_clipped else f" above {number(steps.above)}"
    if steps.count == 1:
        return f"in the one {kind}{tail}"
    if found.steps < steps.count:
        return f"in {found.steps:,} of the {counted(steps.count, kind)}{tail}"
    return f"in the {counted(steps.count, kind)}{tail}"


def _unclipped(run: Known, steps: Outstanding, one: str) -> str:
    low, middle, high = (number(float(np.quantile(run.usable, q))) for q in (0, 0.5, 1))
    limits = run.limit[np.isfinite(run.limit)]
    if len(limits):
        return f"{_begun(_limit(run) or 'clipping')} never acted: the largest norm is {high}."
    if steps.count:
        return (
            f"{counted(steps.count, 'spike')} in {counted(len(run), one)}: "
            f"{'norms' if steps.count > 1 else 'a norm'} above {number(steps.above)}, three times "
            "the usual 90th percentile."
        )
    if len(run.usable) == 1:
        return f"One norm is known: {high}."
    if len(run.usable) < _ENOUGH:
        return f"{counted(len(run.usable), one)} with norms from {low} to {high}."
    if steps.settled is not None:
        settled = number(steps.settled)
        return f"The norms start as high as {high} and settle at {settled}; no spikes follow."
    tenth = float(np.quantile(run.usable, 0.9))
    if tenth > _BROAD * float(np.median(run.usable)):
        return f"The norms vary much: the median is {middle}, the 90th percentile {number(tenth)}."
    return f"No spikes: the median norm is {middle}, the largest {high}."


def _shares(run: Known) -> str:
    clipped, count = int(run.clipped.sum()), len(run)
    if not 0 < clipped < count or count < _ENOUGH:
        return ""
    parts = [share(each).removesuffix(" %") for each in thirds(run.clipped.astype(np.float64))]
    return (
        f"{_begun(_limit(run) or 'clipping')} acted in {share(clipped / count)} of the "
        f"{run.counted} ({joined(parts)} % of the first, second and last third)."
    )


def _layer_beside(run: Known, steps: Outstanding, found: Blame | None) -> str:
    """Name the layer where the finding is of something else."""
    if found is None or found.steps or len(found.layers.names) == 1:
        return ""
    name, part = found.layers.names[found.layer], share(found.share[found.layer])
    return f"{_titled(name)} has the most of the squared norm, {part} on average."


def _ordinal(value: float) -> str:
    """Write 2 as ``2nd``, 100 as ``100th``."""
    whole = round(value)
    tail = "th" if whole % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(whole % 10, "th")
    return f"{whole:,}{tail}"


def _skipped(run: Known, faults: Faults) -> str:
    skipped = int(run.skipped.sum())
    unmade = int((run.nonfinite & ~run.skipped).sum())
    said = []
    if skipped:
        reasons = {_REASONS.get(each, each) for each in run.reasons.values()}
        if not reasons and run.nonfinite[run.skipped].all():
            reasons = {_REASONS["nonfinite"]}
        why = f" because {joined(sorted(reasons))}" if len(reasons) == 1 else ""
        were = "was" if skipped == 1 else "were"
        said.append(f"{counted(skipped)} {were} skipped{why}{faults.where}.")
    if unmade and run.log is not None:
        said.append(f"{counted(unmade, 'norm')} of the log {'is' if unmade == 1 else 'are'} not finite.")
    elif unmade:
        were = "was" if unmade == 1 else "were"
        said.append(
            f"In {counted(unmade)} a gradient was not finite{'' if skipped else faults.where}, and "
            f"the {'step' if unmade == 1 else 'steps'} {were} made all the same."
        )
    return " ".join(said)
