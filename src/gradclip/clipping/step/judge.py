"""Whether a step may be made: errors where they are due, and the count of skipped steps."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite

from torch import Tensor

from gradclip.clipping.arguments import Options
from gradclip.clipping.flags import Flag, all_of, any_of, negated
from gradclip.clipping.kernels.fused import FusedClip, Report
from gradclip.clipping.measure.binding import Binding
from gradclip.clipping.measure.group import Found, Group
from gradclip.clipping.measure.norm import combine
from gradclip.clipping.measure.pattern import Pattern
from gradclip.clipping.policies import Decision, PolicyState
from gradclip.clipping.ranks.peers import Peers
from gradclip.clipping.step.nonfinite import (
    Describe,
    Faults,
    SkipCounter,
    Suspects,
    first_skip,
    nonfinite_error,
    nonfinite_report,
    skip_report,
    too_many_skips,
)


@dataclass(frozen=True, eq=False)
class Decided:
    """What all policies decided together.

    Args:
        decisions: Of each pattern.
        bounded: Whether nothing was found in a pattern that its policy cannot bound.
        committed: Whether nothing forbids the step: no NaN, no infinity, no error on any rank.
        unwanted: Whether a policy asks to skip the step.
        made: Whether the step is made: committed, and not unwanted.
    """

    decisions: list[Decision]
    bounded: list[Flag]
    committed: Flag
    unwanted: Flag
    made: Flag

    def histories(self, groups: list[Group]) -> dict[str, tuple[PolicyState, Flag]]:
        """Return the history of each policy that was asked, and whether it counts."""
        return {
            # The history of what only measures sees no NaN either.
            group.of.name: (
                decision.state,
                self.made if group.of.writes else all_of([self.made, fine]),
            )
            for group, decision, fine in zip(groups, self.decisions, self.bounded, strict=True)
            if group.of.limit is None
        }


class Judge:
    """Decides what a NaN, an infinity or a policy's skip means for the step.

    Its verdicts are those of all ranks, so what one raises, all raise.

    Args:
        options: The checked keywords.
        binding: Has p of the norms that an error quotes.
        called: What clips, as its user knows it; None for a function.
        owned: Whether a step that is skipped is kept from being made.
    """

    def __init__(
        self, options: Options, binding: Binding, *, called: str | None, owned: bool
    ) -> None:
        self.skips = SkipCounter(options.max_consecutive_skips)
        self._nonfinite = options.nonfinite
        self._binding = binding
        self._called, self._owned = called, owned
        self._recent: deque[Tensor | Report | float] = deque(maxlen=32)

    def judge(
        self,
        groups: list[Group],
        found: list[Found],
        decided: Decided,
        *,
        overflow_expected: bool,
        may_skip: bool,
        peers: Peers,
        step: int,
    ) -> None:
        """Raise where errors are due, before anything is written; count a skipped step.

        Args:
            groups: The gradients of each pattern.
            found: What was found in them.
            decided: What the policies decided together.
            overflow_expected: A loss scaler answers for an overflow.
            may_skip: Whether a policy may ask to skip a step at all.
            peers: The ranks that an error tells of.
            step: Which call it is.

        Raises:
            NonFiniteGradientError: GC201, with ``nonfinite="raise"``.
            TooManySkipsError: GC202.
        """
        if self._nonfinite == "raise" and not all(map(bool, decided.bounded)):
            report = self._report(groups, decided.decisions, peers, step)
            raise nonfinite_error(report, self._called)
        skips = self._nonfinite == "skip"
        if not (skips or may_skip):
            return
        committed, unwanted = decided.committed, decided.unwanted
        skipped = any_of([negated(committed), unwanted]) if skips else unwanted
        by_policy = all_of([committed, unwanted])
        describe = None
        if not (self.skips.warned or skipped is False):
            describe = self._describing(groups, found, peers, step)
        if self.skips.record(skipped, by_policy, describe, expected=overflow_expected):
            report = self._report(groups, decided.decisions, peers, step, self.skips.by_policy)
            raise too_many_skips(report, self.skips.limit)

    def judge_report(
        self,
        clip: FusedClip,
        found: Sequence[Sequence[Tensor | None]],
        patterns: Sequence[Pattern],
        *,
        overflow_expected: bool,
        may_skip: bool,
        peers: Peers,
        step: int,
    ) -> bool:
        """Judge what a device reports, before gradients are multiplied.

        Args:
            clip: What it came to.
            found: The gradient of each parameter of each pattern, if it has one.
            patterns: All of them.
            overflow_expected: A loss scaler answers for an overflow.
            may_skip: Whether a policy may ask to skip a step at all.
            peers: This process.
            step: Which call it is.

        Returns:
            Whether to go on; not where a NaN is an error, which says more than a report knows.

        Raises:
            TooManySkipsError: GC202.
        """
        report, on_host = clip.report, clip.on_host
        if self._nonfinite == "raise" and not report.is_bounded:
            return False
        if on_host is not None and (self._nonfinite == "skip" or may_skip):
            describe = None
            if not self.skips.warned:
                describe = partial(
                    self._first_skip_of, clip, _present(clip, found), patterns, step, peers.rank
                )
            if self.skips.record_late(on_host, overflow_expected, describe, waits=on_host.waits):
                groups = [Group.collect(pattern, self._binding.total_order) for pattern in patterns]
                limits = [each.of.decision for each in groups if each.of.decision is not None]
                said = self._report(groups, limits, peers, step, self.skips.by_policy)
                raise too_many_skips(said, self.skips.limit)
        self._recent.append(report)
        return True

    def pass_sound(self, norm: float) -> None:
        """Note a step in which nothing was found: what ``judge`` and ``remember`` note of one."""
        if self._nonfinite == "skip":
            self.skips.end_row()
        self._recent.append(norm)

    def remember(self, norms_S: Tensor) -> None:
        """Keep the norms of a step that was made, for what an error says later."""
        self._recent.append(norms_S)

    def _norm_of_all(self, seen: Tensor | Report) -> Tensor:
        return seen.norm if isinstance(seen, Report) else combine(seen, self._binding.total_order)

    def _describing(
        self, groups: list[Group], found: list[Found], peers: Peers, step: int
    ) -> Describe:
        """Return what describes a skip of this step, perhaps some steps later."""
        suspects = [
            Suspects(
                group.gradients.group,
                group.gradients.present,
                each.tensor_sums_T,
                group.of.element_limit is not None,
            )
            for group, each in zip(groups, found, strict=True)
            if group.of.writes
        ]
        return partial(self._first_skip, step, peers.rank, suspects)

    def _first_skip(
        self, step: int, rank: int, suspects: list[Suspects], by_policy: bool
    ) -> str | None:
        called = self._called or "gradclip"
        return first_skip(called, step, rank, suspects, owned=self._owned, by_policy=by_policy)

    def _first_skip_of(
        self,
        clip: FusedClip,
        present: list[list[bool]] | None,
        patterns: Sequence[Pattern],
        step: int,
        rank: int,
        by_policy: bool,
    ) -> str | None:
        starts = clip.layout.starts
        suspects = [
            Suspects(
                pattern.parameters,
                None if present is None else present[number],
                clip.report.sums_T[starts[number] : starts[number + 1]],
                pattern.element_limit is not None,
            )
            for number, pattern in enumerate(patterns)
            if pattern.writes
        ]
        return self._first_skip(step, rank, suspects, by_policy)

    def _report(
        self,
        groups: list[Group],
        decisions: list[Decision],
        peers: Peers,
        step: int,
        by_policy: bool = False,
    ) -> str:
        faults = peers.gather(lambda: Faults.of([group.gradients for group in groups], peers.rank))
        if by_policy and not any(each.described for each in faults):
            return skip_report(step)
        recent = [
            each if isinstance(each, float) else float(self._norm_of_all(each))
            for each in self._recent
        ]
        policy = groups[0].policy
        limit = decisions[0].thresholds if policy.element_limit is None else policy.element_limit
        return nonfinite_report(
            faults,
            norm_type=policy.order,
            step=step,
            last_norms=[norm for norm in recent if isfinite(norm)][-4:],
            limit=limit,
        )


def _present(clip: FusedClip, found: Sequence[Sequence[Tensor | None]]) -> list[list[bool]] | None:
    """Return which parameters of each pattern have a gradient; None for all of them."""
    if clip.layout.starts[-1] == sum(map(len, found)):
        return None
    return [[gradient is not None for gradient in each] for each in found]
