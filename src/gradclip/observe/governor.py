"""How often the norms of a script are measured that does not measure them itself."""

from math import ceil
from statistics import median

__all__ = ["Governor"]

_SHARE = 0.009
"""Of the time of the steps themselves, for measuring."""

_FREE = 2.0
"""Seconds for watching that are spent first: nobody waits for them, and no spike is missed."""

_LEAST = 2e-5
"""Seconds a step that are spent anyway: a run of very short steps is over soon."""

_WINDOW = 32
"""Steps after which it looks again."""

_MOST = 64


class Governor:
    """Measures each n-th step, so that measuring takes a small share of the time of a long run.

    Args:
        every: n, where it is given; None to choose it: 1 for as long as watching has taken less
            than 2 seconds, and then, again and again, from 1 to 64.

    Attributes:
        every: n.
        left: Seconds that watching may take before n is chosen.
    """

    def __init__(self, every: int | None) -> None:
        self.every = every or 1
        self.left = _FREE
        self._chooses = every is None
        self._last = 0.0
        self._begins_anew()
        self._is_first = True

    def is_due(self, step: int) -> bool:
        """Return whether a step is to be measured."""
        return step % self.every == 0

    def add(self, now: float, spent: float, *, measured: bool) -> bool:
        """Take what a step cost.

        Args:
            now: The time at its end, in seconds.
            spent: What watching took of that, since the last step.
            measured: Whether its norms were measured.

        Returns:
            Whether n changed.
        """
        self._measured += measured
        self._spent[measured] += spent
        self.left -= spent
        self._took.append(now - self._last - spent)
        self._last = now
        steps = len(self._took)
        if not self._chooses or steps < _WINDOW or self._measured == 0:
            return False
        # The median: an evaluation between two steps is none of theirs.
        before, own, idle = self.every, median(self._took), steps - self._measured
        always = self._spent[False] / idle if idle else 0.0
        more = max(self._spent[True] / self._measured - always, 0.0)
        left = max(_SHARE * own - always, _LEAST)
        wanted = min(max(ceil(more / left), 1), _MOST)
        is_first, self._is_first = self._is_first, False
        if self.left <= 0 and not is_first:  # the first steps of a run are not like the others
            self.every = wanted if wanted < before or wanted > 1.3 * before else before
        self._begins_anew()
        return self.every != before

    def _begins_anew(self) -> None:
        self._took: list[float] = []
        self._measured = 0
        self._spent = [0.0, 0.0]
