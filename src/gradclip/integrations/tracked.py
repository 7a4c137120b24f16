"""What trackers are told of clipping: the same names wherever something logs."""

from gradclip.clipping import ClipResult
from gradclip.clipping.step.rows import StepLog
from gradclip.record.ring import READING
from gradclip.record.stats import Stats, StepStats, together

__all__ = ["Tracked", "numbers_of"]


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


def numbers_of(last: ClipResult, since: Stats) -> dict[str, float]:
    """Return what is logged, by name.

    Args:
        last: The result of the last step.
        since: What the steps since the last time came to.
    """
    stats = last.to_host()
    return {
        "gradclip/norm_pre": stats.norm_pre,
        "gradclip/norm_post": stats.norm_post,
        "gradclip/norm_max": since.max,
        "gradclip/clip_fraction": since.clipped / max(since.steps, 1),
        "gradclip/skipped": since.skipped,
        **{f"gradclip/{name}/norm_pre": each.norm_pre for name, each in stats.groups.items()},
    }
