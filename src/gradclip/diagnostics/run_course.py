"""How a run went: whether its loss fell, and where it was lost."""

from dataclasses import dataclass, replace

from gradclip.diagnostics.arrays import Places, np
from gradclip.diagnostics.norm_statistics import smoothed
from gradclip.diagnostics.readers.logged import LoggedRun
from gradclip.diagnostics.summary import compact

__all__ = ["LossCourse", "Lost", "before_the_loss", "course_of"]

_FEW_LOSSES = 20
_LAST = 10
"""Norms at the end that are not finite, after which no run comes back."""
_BLOWN_UP = 100
_HUGE = 1e150


@dataclass(frozen=True)
class LossCourse:
    """The losses at the beginning and at the end.

    Args:
        first: The median of the first fifth.
        last: The median of the last fifth.
        highest: The highest running median of five losses in the first fifth.
        where: Which steps the two fifths are.
    """

    first: float
    last: float
    highest: float
    where: tuple[str, str]

    @property
    def fell(self) -> bool:
        """Whether the end is below the beginning, or far below a part of it."""
        return self.last <= 0.98 * self.first or self.last < 0.5 * self.highest

    def __str__(self) -> str:
        begun, ended = self.where
        return f"its median is {compact(self.first)} in {begun} and {compact(self.last)} in {ended}"


@dataclass(frozen=True)
class Lost:
    """Where a run was lost.

    Args:
        place: How many norms were before.
        start: Which step that is.
        seen: What was seen, in one sentence.
    """

    place: int
    start: str
    seen: str


def course_of(run: LoggedRun, start: int = 0) -> LossCourse | None:
    """Compare the losses at both ends; None where too few are known, or some are below 0.

    Args:
        run: The run.
        start: Where the first fifth begins. The highest loss is looked for before that, too.
    """
    known = np.flatnonzero(np.isfinite(run.losses))
    after = known[known >= start]
    losses = run.losses[known]
    if len(after) < _FEW_LOSSES or (losses > 0).mean() <= 0.95:  # noqa: PLR2004
        return None
    fifth = len(after) // 5
    begun, ended = after[:fifth], after[-fifth:]
    early = run.losses[known[known <= begun[-1]]]
    return LossCourse(
        first=float(np.median(run.losses[begun])),
        last=float(np.median(run.losses[ended])),
        highest=float(smoothed(early, 5).max()),
        where=(_steps(run, begun), _steps(run, ended)),
    )


def before_the_loss(run: LoggedRun) -> tuple[LoggedRun, Lost | None]:
    """Return the part of a run before it was lost: all of it, if it was not."""
    is_bad = ~(run.norms < _HUGE)
    finite = np.flatnonzero(~is_bad)
    place = int(finite[-1]) + 1 if len(finite) else 0
    if (count := len(run.norms) - place) >= _LAST:
        start = _step(run, place)
        seen = (
            f"its norms are NaN or infinite from {start} to the end ({count} of {len(run.norms)})"
        )
        return _until(run, place), Lost(place, start, seen)
    norms = np.flatnonzero(run.is_norm)
    found = run.norms[norms]
    if len(found) < 5 * _LAST:
        return run, None
    usual, last = float(np.median(found[: len(found) // 5])), float(np.median(found[-_LAST:]))
    course = course_of(run) if np.isfinite(run.losses[norms[-_LAST:]]).any() else None
    if last <= _BLOWN_UP * usual or (course is not None and course.fell):
        return run, None
    # Where it began to rise for good: the last place where norms were still about as usual.
    place = int(norms[np.flatnonzero(smoothed(found, 11) <= 2 * usual)[-1]]) + 1
    start = _step(run, place)
    seen = (
        f"its norms rise from {start} on, from {compact(usual)} to {compact(last)}, and stay there"
    )
    return _until(run, place), Lost(place, start, seen)


def _until(run: LoggedRun, place: int) -> LoggedRun:
    parts = {name: getattr(run, name)[:place] for name in ("norms", "steps", "losses", "rates")}
    return replace(run, **parts)


def _step(run: LoggedRun, place: int) -> str:
    return f"step {_number(run, place)}" if run.spacing is not None else f"norm {place}"


def _steps(run: LoggedRun, places: Places) -> str:
    first, last = int(places[0]), int(places[-1])
    if run.spacing is None:
        return f"the norms {first} to {last}"
    return f"the steps {_number(run, first)} to {_number(run, last)}"


def _number(run: LoggedRun, place: int) -> str:
    step = float(run.steps[place])
    return f"{step:.0f}" if abs(step) < _HUGE else f"of norm {place}"
