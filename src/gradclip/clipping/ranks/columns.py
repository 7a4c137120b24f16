"""What is added up of a pattern: a column for each kind of sum."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

from gradclip.clipping.ranks.peers import PatternShare, Rule
from gradclip.clipping.ranks.share import Share


@dataclass(frozen=True, eq=False)
class Member:
    """A pattern that has a policy, whatever gradients there are.

    Args:
        pattern: Of the names.
        rule: What its policy asks for.
        share: How its parameters are held.
        told: What the engine is told of that.
    """

    pattern: str
    rule: Rule
    share: Share
    told: PatternShare


@dataclass(frozen=True, eq=False)
class Column:
    """One table of a pack: sums of one kind for the scopes of one pattern."""

    member: Member
    name: str
    share: Share
    order: float

    @property
    def reads_twice(self) -> bool:
        """Whether the elements are read again, scaled by their maximum over all ranks."""
        return self.order not in {1.0, 2.0, inf} and self.name != "left"


def columns_of(member: Member, total_order: float) -> Iterator[Column]:
    """Yield what is added up of a pattern, under the names that ``Found.sums`` has."""
    rule, share = member.rule, member.share
    yield Column(member, "norm", share, rule.order)
    if total_order != rule.order:
        yield Column(member, "total", share, total_order)
    if rule.needs_pattern_norm:
        yield Column(member, "pattern_norm", share.as_group(), rule.order)
    if rule.weighs:
        yield Column(member, "weights", share, rule.order)
    if rule.clamps:
        yield Column(member, "left", share, rule.order)
