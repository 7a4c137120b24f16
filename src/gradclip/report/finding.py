"""The findings: the sentence that matters most, which is the title, and what became of the loss."""

from dataclasses import dataclass

from gradclip.diagnostics.arrays import np
from gradclip.diagnostics.blame import Blame, Outstanding
from gradclip.diagnostics.known import Known
from gradclip.report.limits import limit_of
from gradclip.report.words import begun, counted, number, share, titled

__all__ = ["Case", "findings"]

_ENOUGH = 30
"""Norms from which on something is said of their level."""
_BROAD = 2.5
"""Where the 90th percentile is more medians than this, norms vary much."""


@dataclass(frozen=True, eq=False)
class Case:
    """What the sentences are of.

    Attributes:
        run: The run.
        steps: Those that stand out.
        blame: Which layer has how much of their norms.
        diverged_at: The step from which on the loss is not finite.
    """

    run: Known
    steps: Outstanding
    blame: Blame | None
    diverged_at: int | None

    @property
    def one(self) -> str:
        """What a step is called: a log has some of them."""
        return self.run.counted.removesuffix("s")

    @property
    def clipped(self) -> int:
        """How many steps were clipped."""
        return int(self.run.clipped.sum())

    @property
    def skipped(self) -> int:
        """How many steps were not made."""
        return int(self.run.skipped.sum())


def findings(case: Case) -> list[str]:
    """Say in one sentence what matters most; where the loss was lost, say that too."""
    first = next(said for say in _BY_WEIGHT if (said := say(case)) is not None)
    lost = _lost(case)
    return [first] if lost in (None, first) else [first, lost]


def _no_norm(case: Case) -> str | None:
    run, steps = case.run, counted(len(case.run), case.one)
    if len(run.usable):
        return None
    if run.skipped.all():
        return f"All {steps} were skipped." if len(run) > 1 else "The only step was skipped."
    if run.nonfinite.any():
        return f"No gradient norm is finite, in {steps}."
    if (run.norm == 0).any():
        return f"Every gradient norm is 0, in {steps}."
    return f"No gradient norm is known, of {steps}."


def _not_made(case: Case) -> str | None:
    if case.skipped <= len(case.run) / 2:
        return None
    return f"{case.skipped:,} of {counted(len(case.run), case.one)} were not made."


def _layer_before_the_end(case: Case) -> str | None:
    """Name the layer that makes the spikes of a run that was lost: what comes next hides it."""
    is_whole = case.diverged_at is None and case.skipped <= len(case.run) / 2
    if is_whole or case.blame is None or case.blame.verdict != "makes":
        return None
    return _layer(case)


def _lost(case: Case) -> str | None:
    if case.diverged_at is None:
        return None
    return f"The loss is not finite from step {case.diverged_at:,} on."


def _diverged(case: Case) -> str | None:
    return None if case.skipped else _lost(case)


def _single(case: Case) -> str | None:
    if len(case.run) > 1:
        return None
    was_clipped = ", clipped" if case.clipped else ""
    return f"One {case.one}, with a norm of {number(case.run.usable[0])}{was_clipped}."


def _limit_sets_the_step(case: Case) -> str | None:
    count = len(case.run)
    if case.clipped <= count / 2 or count < _ENOUGH:
        return None
    is_all = case.clipped == count
    part = f"every {case.one}" if is_all else f"{share(case.clipped / count)} of the {case.one}s"
    limit, are_several = limit_of(case.run)
    sets, it = ("set", "they") if are_several else ("sets", "it")
    return f"{begun(limit)} {sets} the step size: {it} clipped {part}."


def _layer(case: Case) -> str | None:
    found, steps = case.blame, case.steps
    if found is None or not found.steps or len(found.layers.names) == 1:
        return None
    name = found.layers.names[found.layer]
    part, usual = share(found.share[found.layer]), share(found.usual[found.layer])
    where = _where(case, found)
    if found.verdict == "makes":
        return f"{titled(name)} {steps.made}: {part} of the squared norm {where}."
    if found.verdict == "most":
        others = f", {usual} in the others" if found.others else ""
        return f"{titled(name)} has most of the norm: {part} of its square {where}{others}."
    return f"No layer stands out {where}: the most is {part}, of {name}."


def _where(case: Case, found: Blame) -> str:
    """Say in which steps, and of how many of them it is known."""
    steps = case.steps
    if not steps.count:
        return f"in all {case.one}s"
    kind = f"clipped {case.one}" if steps.are_clipped else "spike"
    if steps.count == 1:
        return f"in the one {kind}"
    of_them = f"{found.steps:,} of " if found.steps < steps.count else ""
    return f"in {of_them}the {counted(steps.count, kind)}"


def _clipped(case: Case) -> str | None:
    if not case.clipped:
        return None
    steps = f"{case.clipped:,} of {counted(len(case.run), case.one)}"
    limit, _ = limit_of(case.run)
    if limit == "clipping":
        return f"{steps} {'was' if case.clipped == 1 else 'were'} clipped."
    return f"{begun(limit)} clipped {steps}."


def _limit_never_acted(case: Case) -> str | None:
    if not np.isfinite(case.run.limit).any():
        return None
    largest = number(float(case.run.usable.max()))
    return f"{begun(limit_of(case.run)[0])} never acted: the largest norm is {largest}."


def _spikes(case: Case) -> str | None:
    count = case.steps.count
    if not count:
        return None
    high = number(float(case.run.norm[case.steps.which].max()))
    up_to = f"of {high}" if count == 1 else f"of up to {high}"
    return f"{counted(count, 'spike')} {up_to} in {counted(len(case.run), case.one)}."


def _level(case: Case) -> str:
    norms = case.run.usable
    low, middle, tenth, high = (
        number(float(each)) for each in np.quantile(norms, (0, 0.5, 0.9, 1))
    )
    if len(norms) == 1:
        return f"One norm is known: {high}."
    if len(norms) < _ENOUGH:
        return f"{counted(len(norms), case.one)} with norms from {low} to {high}."
    if case.steps.settled is not None:
        settled = number(case.steps.settled)
        return f"The norms start as high as {high} and settle at {settled}; no spikes follow."
    if float(np.quantile(norms, 0.9)) > _BROAD * float(np.median(norms)):
        return f"The norms vary much: the median is {middle}, the 90th percentile {tenth}."
    return f"No spikes: the median norm is {middle}, the largest {high}."


_BY_WEIGHT = (
    _no_norm,
    _layer_before_the_end,
    _not_made,
    _diverged,
    _single,
    _limit_sets_the_step,
    _layer,
    _clipped,
    _limit_never_acted,
    _spikes,
    _level,
)
"""The first that has something to say is the finding."""
