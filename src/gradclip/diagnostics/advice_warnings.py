"""What makes an advice doubtful: each warning with its evidence."""

from collections.abc import Iterator
from dataclasses import dataclass

from gradclip.diagnostics.advice_kinds import OVERTURNING, to_do
from gradclip.diagnostics.advice_words import line
from gradclip.diagnostics.arrays import Numbers, np
from gradclip.diagnostics.norm_statistics import Level
from gradclip.diagnostics.readers.logged import LoggedRun
from gradclip.diagnostics.run_course import Lost, course_of
from gradclip.diagnostics.summary import compact, percent

__all__ = ["AdviceWarning", "of_the_log", "of_the_loss", "warnings_of"]


@dataclass(frozen=True)
class AdviceWarning:
    """A doubt.

    Args:
        code: A word that does not change.
        text: What was seen, and what it means.
    """

    code: str
    text: str

    @property
    def overturns(self) -> bool:
        """Whether it makes the advice worthless, so that it is to be told first."""
        return self.code in OVERTURNING


def _warning(code: str, seen: str) -> AdviceWarning:
    return AdviceWarning(code, f"{seen} {to_do(code)}")


def of_the_loss(lost: Lost | None, run: LoggedRun) -> Iterator[AdviceWarning]:
    """Return that a run was lost, and what to do.

    Args:
        lost: Where; None if it was not.
        run: What was logged before.
    """
    if lost is None:
        return
    from gradclip.clipping import NormClip  # noqa: PLC0415 - it imports torch

    way = line(NormClip(max_norm=1.0), run.framework, of_ours=True) if run.framework else None
    limit = ""
    if run.limit is not None and run.limit <= 1:
        limit = f" The limit of {run.limit:g} did not keep this run: lower the learning rate, too."
    rest = f" What follows is of the part before {lost.start} alone." if lost.place else ""
    text = f"This run was lost: {lost.seen}. {to_do('LOST', way)}{limit}{rest}"
    yield AdviceWarning("LOST", text)


def warnings_of(
    run: LoggedRun, norms: Numbers, found: Level, limit: float | None
) -> tuple[AdviceWarning, ...]:
    """Return the warnings.

    Args:
        run: What was logged.
        norms: Its norms that are finite and above 0.
        found: Their level.
        limit: The highest norm that the advice allows, or None.
    """
    is_norm = run.is_norm
    return (
        *_of_the_losses(run, found),
        *_of_scale(run.losses[is_norm], found),
        *_of_the_beginning(run, norms, found, limit),
        *of_the_log(run),
        *_of_rounding(found),
        *_of_the_run(run, norms, found),
    )


def _of_scale(losses: Numbers, found: Level) -> Iterator[AdviceWarning]:
    known = np.abs(losses[found.cut :][np.isfinite(losses[found.cut :])])
    if found.median > 1e4 and len(known) and np.median(known) < 1e3:  # noqa: PLR2004
        yield _warning(
            "SCALE",
            f"Norms of {compact(found.median)} stand beside a loss of "
            f"{compact(float(np.median(known)))}: is a loss scale left in, or the loss summed?",
        )


def _of_the_beginning(
    run: LoggedRun, norms: Numbers, found: Level, limit: float | None
) -> Iterator[AdviceWarning]:
    first = norms[: found.cut]
    if limit is None or not len(first) or (share := float((first > limit).mean())) <= 0.25:  # noqa: PLR2004
        return
    steps = round(found.cut * (run.spacing or 1))
    warning = _warning(
        "WARM_UP", f"{percent(share)} of the first {found.cut} norms lie above the limit."
    )
    schedule = (
        "gradclip.NormClip(max_norm=gradclip.Schedule(points=((0, "
        f'float("inf")), ({steps}, {limit:g}))))'
    )
    yield AdviceWarning("WARM_UP", f"{warning.text} This leaves them as they are: {schedule}.")


def of_the_log(run: LoggedRun) -> Iterator[AdviceWarning]:
    """Return doubts about what was logged and what was not."""
    if run.spacing is not None and run.spacing > 1:
        yield _warning("SPACING", f"A norm was logged every {run.spacing:g} steps.")
    share = run.zeros / max(1, len(run.norms))
    if share > 0.05:  # noqa: PLR2004
        yield _warning("ZEROS", f"{percent(share)} of the norms are exactly 0, and were left out.")
    if run.nonfinite:
        yield _warning(
            "NONFINITE",
            f"{run.nonfinite} of {len(run.norms)} norms are NaN or infinite, and were left out.",
        )


def _of_rounding(found: Level) -> Iterator[AdviceWarning]:
    if found.distinct < 0.5:  # noqa: PLR2004
        yield _warning(
            "COARSE",
            f"Only {percent(found.distinct)} of the norms are distinct: they were rounded, say to "
            "bfloat16.",
        )


def _of_the_run(run: LoggedRun, norms: Numbers, found: Level) -> Iterator[AdviceWarning]:
    if not 0.5 <= found.drift <= 2:  # noqa: PLR2004
        yield _warning(
            "DRIFT",
            f"The median norm of the last third is {compact(found.drift)} times that of the first.",
        )
    if run.limit is None:
        return
    share = float((norms > run.limit).mean())
    if share > 0.5:  # noqa: PLR2004
        yield _warning(
            "LIMIT_SETS_STEP",
            f"Your limit of {run.limit:g} clips {percent(share)} of the steps: it sets the step "
            "size.",
        )
    elif share == 0:
        yield _warning("LIMIT_IDLE", f"Your limit of {run.limit:g} has never acted.")


def _of_the_losses(run: LoggedRun, found: Level) -> Iterator[AdviceWarning]:
    places = np.flatnonzero(run.is_norm)
    course = course_of(run, int(places[found.cut]))
    if course is not None and not course.fell:
        yield _warning(
            "LOSS",
            f"The loss does not fall: {course}. Norms of a run that does not learn say little "
            "about one that does.",
        )
