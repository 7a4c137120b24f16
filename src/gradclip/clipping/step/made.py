"""How many steps were made: policies that are asked count them, and else the log of the steps."""

from collections.abc import Mapping
from math import isfinite
from typing import Protocol

from gradclip.clipping.policies import Policy, any_asked
from gradclip.clipping.step.rows import StepLog
from gradclip.record.ring import StepNumbers


class CountsSteps(Protocol):
    """The histories, which count steps while a policy is asked."""

    @property
    def steps(self) -> int:
        """How many were made; waits for the device."""
        ...

    def count_from(self, made: int) -> None:
        """Go on with so many."""


class MadeSteps:
    """Knows how many steps an engine has made, whatever its policies were.

    Args:
        log: Tells of every step.
        histories: Count those that were made while a policy was asked.
    """

    def __init__(self, log: StepLog, histories: CountsSteps) -> None:
        self._log, self._histories = log, histories
        self._counted = _Count()
        log.follow(self._counted)

    def of(self, policies: Mapping[str, Policy | None]) -> int:
        """Return how many there were; waits for the device."""
        if any_asked(policies):
            return self._histories.steps
        self._log.catch_up()
        return self._counted.made

    def go_on(self, made: int) -> None:
        """Count from so many, where no policy is asked."""
        self._log.catch_up()
        self._counted.made = made

    def change(self, old: Mapping[str, Policy | None], new: Mapping[str, Policy | None]) -> None:
        """Hand the count on where other policies count in another way."""
        if any_asked(old) != any_asked(new):
            made = self.of(old)
            self.go_on(made)
            self._histories.count_from(made)


class _Count:
    """Counts the steps that were made. It must not hold the log, which ends when nobody does."""

    def __init__(self) -> None:
        self.made = 0

    def add(self, numbers: StepNumbers) -> None:
        """Take the numbers of a step: one on a NaN counts as made only if it was clamped."""
        self.made += not numbers.skipped and (isfinite(numbers.norm) or numbers.clipped)
