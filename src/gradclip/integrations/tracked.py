"""What trackers are told of clipping: the same names wherever something logs."""

from collections.abc import Mapping
from typing import Protocol

from gradclip.clipping import ClipResult
from gradclip.clipping.step.rows import StepLog
from gradclip.record.ring import READING
from gradclip.record.stats import Stats, StepStats, together

__all__ = ["Norms", "Tracked", "named", "numbers_of"]


class Tracked:
    """The steps since the last time that something was logged.

    Args:
        log: All steps.
    """

    def __init__(self, log: StepLog) -> None:
        self._log, self._since = log, StepStats()
        log.follow(self._since)

    def take(self) -> Stats:
        """Return what the steps since the last call came to; waits for the device."""
        with READING:
            self._log.catch_up()
            found = together([self._since])
            self._since.clear()
        return found


class Norms(Protocol):
    """The norms of a step, of all gradients or of those of a pattern."""

    @property
    def norm_pre(self) -> float:
        """That before clipping."""
        ...

    @property
    def norm_post(self) -> float:
        """That after it."""
        ...


def named(last: Norms, groups: Mapping[str, Norms], since: Stats) -> dict[str, float]:
    """Return what is logged, by name.

    Args:
        last: The last step.
        groups: The same, by name pattern.
        since: What the steps since the last time came to.
    """
    return {
        "gradclip/norm_pre": last.norm_pre,
        "gradclip/norm_post": last.norm_post,
        "gradclip/norm_max": since.max,
        "gradclip/clip_fraction": since.clipped / max(since.steps, 1),
        "gradclip/skipped": since.skipped,
        **{f"gradclip/{name}/norm_pre": each.norm_pre for name, each in groups.items()},
    }


def numbers_of(last: ClipResult, since: Stats) -> dict[str, float]:
    """Return what is logged, by name; waits for the device.

    Args:
        last: The result of the last step.
        since: What the steps since the last time came to.
    """
    stats = last.to_host()
    return named(stats, stats.groups, since)
