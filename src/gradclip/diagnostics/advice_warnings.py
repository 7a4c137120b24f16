"""What makes an advice doubtful: each warning with its evidence."""

from collections.abc import Iterator
from dataclasses import dataclass

from gradclip.diagnostics.arrays import Numbers, np
from gradclip.diagnostics.norm_statistics import Level
from gradclip.diagnostics.readers.logged import LoggedRun
from gradclip.diagnostics.summary import compact, percent

__all__ = ["AdviceWarning", "of_the_log", "warnings_of"]

_FEW_LOSSES = 20
_LOST = 10
"""Norms at the end that are not finite, after which no run comes back."""


@dataclass(frozen=True)
class AdviceWarning:
    """A doubt.

    Args:
        code: A word that does not change.
        text: What was seen, and what it means.
    """

    code: str
    text: str


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
        *_of_scale(run.losses[is_norm], found),
        *_of_the_beginning(run, norms, found, limit),
        *of_the_log(run),
        *_of_rounding(found),
        *_of_the_run(run, norms, run.losses[is_norm], found),
    )


def _of_scale(losses: Numbers, found: Level) -> Iterator[AdviceWarning]:
    known = np.abs(losses[found.cut :][np.isfinite(losses[found.cut :])])
    if found.median > 1e4 and len(known) and np.median(known) < 1e3:  # noqa: PLR2004
        yield AdviceWarning(
            "SCALE",
            f"Norms of {compact(found.median)} beside a loss of "
            f"{compact(float(np.median(known)))}: is a loss scale left in, or the loss summed? "
            "Settle that first.",
        )


def _of_the_beginning(
    run: LoggedRun, norms: Numbers, found: Level, limit: float | None
) -> Iterator[AdviceWarning]:
    first = norms[: found.cut]
    if limit is None or not len(first) or (share := float((first > limit).mean())) <= 0.25:  # noqa: PLR2004
        return
    steps = round(found.cut * (run.spacing or 1))
    yield AdviceWarning(
        "WARM_UP",
        f"{percent(share)} of the first {found.cut} norms lie above the limit. Here is a schedule "
        f"if you want them untouched: gradclip.NormClip(max_norm=gradclip.Schedule(points=((0, "
        f'float("inf")), ({steps}, {limit:g})))).',
    )


def of_the_log(run: LoggedRun) -> Iterator[AdviceWarning]:
    """Return doubts about what was logged and what was not."""
    if run.spacing is not None and run.spacing > 1:
        yield AdviceWarning(
            "SPACING",
            f"A norm was logged every {run.spacing:g} steps. The usual norm, and the one that a "
            "step in ten exceeds, hold. The largest spikes are not in this log.",
        )
    share = run.zeros / max(1, len(run.norms))
    if share > 0.05:  # noqa: PLR2004
        yield AdviceWarning(
            "ZEROS",
            f"{percent(share)} of the norms are exactly 0, and were left out: why are they?",
        )
    if run.nonfinite:
        yield AdviceWarning(
            "NONFINITE",
            f"{run.nonfinite} of {len(run.norms)} norms are NaN or infinite, and were left out. "
            "A limit does not mend those; skipping the step does, as gradclip does.",
        )
    last = int(np.argmax(np.isfinite(run.norms[::-1])))
    if last >= _LOST:
        yield AdviceWarning(
            "LOST",
            f"The last {last} norms are NaN or infinite: this run was lost. The norms just before "
            "are those of a run that breaks, and say little about one that does not. For a better "
            "limit, cut the log off where the norms begin to rise.",
        )


def _of_rounding(found: Level) -> Iterator[AdviceWarning]:
    if found.distinct < 0.5:  # noqa: PLR2004
        yield AdviceWarning(
            "COARSE",
            f"Only {percent(found.distinct)} of the norms are distinct: they were rounded, say to "
            "bfloat16. The limit is no finer than that.",
        )


def _of_the_run(
    run: LoggedRun, norms: Numbers, losses: Numbers, found: Level
) -> Iterator[AdviceWarning]:
    if not 0.5 <= found.drift <= 2:  # noqa: PLR2004
        yield AdviceWarning(
            "DRIFT",
            f"The median of the last third is {compact(found.drift)} times that of the first: a "
            "longer run may need another limit.",
        )
    known = losses[found.cut :]
    known = known[np.isfinite(known)]
    if len(known) >= _FEW_LOSSES and (known > 0).mean() > 0.95:  # noqa: PLR2004
        fifth = len(known) // 5
        first, last = float(np.median(known[:fifth])), float(np.median(known[-fifth:]))
        if last > 0.98 * first:
            yield AdviceWarning(
                "LOSS",
                f"The loss does not fall (from {compact(first)} to {compact(last)}): norms of a "
                "run that does not learn say little about one that does.",
            )
    if run.limit is None:
        return
    share = float((norms > run.limit).mean())
    if share > 0.5:  # noqa: PLR2004
        yield AdviceWarning(
            "LIMIT_SETS_STEP",
            f"Your limit of {run.limit:g} clips {percent(share)} of the steps: it sets the step "
            "size.",
        )
    elif share == 0:
        yield AdviceWarning("LIMIT_IDLE", f"Your limit of {run.limit:g} has never acted.")
