"""What the steps of a run came to: a few numbers, and a line at its end."""

import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, fields
from math import isfinite, nan

from gradclip.record.ring import READING, StepNumbers

__all__ = ["Stats", "StepStats", "together"]

WINDOW = 10_000
"""Quantiles are those of at most so many last steps."""

_log = logging.getLogger("gradclip")


@dataclass(frozen=True)
class Stats:
    """What the steps since a clipper was made came to.

    Quantiles are of the norm before clipping, over the last 10,000 steps. A norm that is NaN or
    infinite is in none of them. They are NaN where no norm is finite.

    Attributes:
        steps: How many calls there were, skipped ones too.
        clipped: At how many of them a gradient was made smaller.
        skipped: How many should not be stepped on, for a NaN, an infinity, or a policy that asked.
        nonfinite: At how many of them the norm was NaN or infinite.
        p50: The median norm.
        p90: What one norm in ten exceeds.
        p99: What one norm in a hundred exceeds.
        max: The largest norm.
        since: The first step that the quantiles cover, counted from 0.
    """

    steps: int = 0
    clipped: int = 0
    skipped: int = 0
    nonfinite: int = 0
    p50: float = nan
    p90: float = nan
    p99: float = nan
    max: float = nan
    since: int = 0

    def __repr__(self) -> str:
        numbers = ((each.name, getattr(self, each.name)) for each in fields(self))
        return f"Stats({', '.join(f'{name}={_short(value)}' for name, value in numbers)})"


class StepStats:
    """Counts steps, and keeps the last norms, on the host: a reader of a ``StepRing``.

    Attributes:
        steps: How many there were.
        clipped: As in ``Stats``.
        skipped: Likewise.
        nonfinite: Likewise.
        by_scaler: How many of the skips were overflows that a loss scaler answers for.
        first_skip: The first step that was skipped for another reason.
        window: The last steps and their norms.
    """

    def __init__(self) -> None:
        self.steps = self.clipped = self.skipped = self.nonfinite = self.by_scaler = 0
        self.first_skip: int | None = None
        self._said = 0
        self.window: deque[tuple[int, float]] = deque(maxlen=WINDOW)

    def add(self, numbers: StepNumbers) -> None:
        """Take the numbers of a step."""
        self.steps += 1
        self.clipped += numbers.clipped
        self.skipped += numbers.skipped
        self.nonfinite += not isfinite(numbers.norm)
        if numbers.skipped and numbers.expected:
            self.by_scaler += 1
        elif numbers.skipped and self.first_skip is None:
            self.first_skip = numbers.step
        self.window.append((numbers.step, numbers.norm))

    def clear(self) -> None:
        """Begin anew."""
        self.__dict__.update(StepStats().__dict__)

    def say_at_end(self, label: str, *, only_most: bool = False) -> None:
        """Log a line if steps were not made, unless all were overflows of a loss scale.

        Nothing is logged where that was said of these steps before.

        Args:
            label: What clipped, as its user knows it.
            only_most: Whether to log it only of a run of which most steps were not made.
        """
        most = 2 * self.skipped > self.steps
        if self.first_skip is None or self._said == self.steps or (only_most and not most):
            return
        self._said = self.steps
        hint = (
            "This is hardly a training: lower the learning rate, or look at the data and the loss."
            if most
            else "Its `stats` has the numbers."
        )
        _log.log(
            logging.ERROR if most else logging.WARNING,
            "%s: %d of %d steps were not made, the first was step %d. The norm was NaN or infinite "
            "at %d; %d were overflows of the loss scale. %s",
            label,
            self.skipped,
            self.steps,
            self.first_skip,
            self.nonfinite,
            self.by_scaler,
            hint,
        )


def together(counted: Iterable[StepStats]) -> Stats:
    """Return what the steps of one or several optimizers came to."""
    with READING:
        every = list(counted)
        windows = [each.window for each in every if each.window]
        norms = sorted(norm for window in windows for _, norm in window if isfinite(norm))
        return Stats(
            steps=sum(each.steps for each in every),
            clipped=sum(each.clipped for each in every),
            skipped=sum(each.skipped for each in every),
            nonfinite=sum(each.nonfinite for each in every),
            p50=_quantile(norms, 0.5),
            p90=_quantile(norms, 0.9),
            p99=_quantile(norms, 0.99),
            max=norms[-1] if norms else nan,
            since=min((window[0][0] for window in windows), default=0),
        )


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _quantile(ordered: list[float], share: float) -> float:
    """Return a quantile of ordered numbers; between two of them where it falls there."""
    if not ordered:
        return nan
    place = share * (len(ordered) - 1)
    low, high = ordered[int(place)], ordered[min(int(place) + 1, len(ordered) - 1)]
    return low + (high - low) * (place - int(place))
