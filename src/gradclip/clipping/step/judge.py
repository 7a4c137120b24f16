"""Whether a step may be made: errors where they are due, and the count of skipped steps."""

from collections import deque
from math import isfinite

from torch import Tensor

from gradclip.clipping.arguments import Options
from gradclip.clipping.flags import Flag, any_of, negated
from gradclip.clipping.measure.group import Group
from gradclip.clipping.measure.norm import combine
from gradclip.clipping.policies import Decision
from gradclip.clipping.ranks.peers import Peers
from gradclip.clipping.step.nonfinite import (
    Faults,
    SkipCounter,
    nonfinite_error,
    nonfinite_report,
    skip_report,
    too_many_skips,
)


class Judge:
    """Decides what a NaN, an infinity or a policy's skip means for the step.

    Its verdicts are those of all ranks, so what one raises, all raise.

    Args:
        options: The checked keywords.
        total_order: p of the norms that an error quotes.
    """

    def __init__(self, options: Options, total_order: float) -> None:
        self.skips = SkipCounter(options.max_consecutive_skips)
        self._nonfinite = options.nonfinite
        self._total_order = total_order
        self._recent: deque[Tensor] = deque(maxlen=32)

    def judge(
        self,
        groups: list[Group],
        decisions: list[Decision],
        *,
        bounded: list[Flag],
        committed: Flag,
        unwanted: Flag,
        overflow_expected: bool,
        may_skip: bool,
        peers: Peers,
        step: int,
    ) -> None:
        """Raise where errors are due, before anything is written; count a skipped step.

        Args:
            groups: The gradients of each pattern.
            decisions: What the policies decided.
            bounded: Whether nothing was found in a pattern that its policy cannot bound.
            committed: Whether nothing forbids the step, on any rank.
            unwanted: Whether a policy asks to skip it.
            overflow_expected: A loss scaler answers for an overflow.
            may_skip: Whether a policy may ask to skip a step at all.
            peers: The ranks that an error tells of.
            step: Which call it is.

        Raises:
            NonFiniteGradientError: GC201, with ``nonfinite="raise"``.
            TooManySkipsError: GC202.
        """
        if self._nonfinite == "raise" and not all(map(bool, bounded)):
            raise nonfinite_error(self._report(groups, decisions, peers, step))
        skips = self._nonfinite == "skip"
        if not (skips or may_skip):
            return
        skipped = any_of([negated(committed), unwanted]) if skips else unwanted
        if self.skips.record(skipped, unwanted, expected=overflow_expected):
            by_policy = committed is True and unwanted is not False
            report = (
                skip_report(step) if by_policy else self._report(groups, decisions, peers, step)
            )
            raise too_many_skips(report, self.skips.limit)

    def remember(self, norms_S: Tensor) -> None:
        """Keep the norms of a step that was made, for what an error says later."""
        self._recent.append(norms_S)

    def _report(
        self, groups: list[Group], decisions: list[Decision], peers: Peers, step: int
    ) -> str:
        recent = [float(combine(norms_S, self._total_order)) for norms_S in self._recent]
        policy = groups[0].policy
        limit = decisions[0].thresholds if policy.element_limit is None else policy.element_limit
        return nonfinite_report(
            peers.gather(lambda: Faults.of([group.gradients for group in groups], peers.rank)),
            norm_type=policy.order,
            step=step,
            last_norms=[norm for norm in recent if isfinite(norm)][-4:],
            limit=limit,
        )
