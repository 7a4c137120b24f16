"""Whether sums over one dimension after another count what every rank has once.

Ranks reduce over their dimensions one after the other. So what rank a has reaches rank b once for
every chain of sums that leads from a to b. On a grid every rank reaches every rank equally often,
say k times. A part that c ranks hold, each with the weight 1 / w, then adds up to k c / w on every
rank: it is counted once where w = k c. Where process groups overlap, or leave ranks out, ranks are
reached unequally often and no weight is right. Then one sum over all ranks takes the place of the
dimensions.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

Part: TypeAlias = tuple[tuple[int, ...], int, int]
"""What ranks with copies say alike: where among those that split it, how many parameters, which."""


@dataclass(frozen=True)
class Outline:
    """What others need to know of how a rank holds its parameters.

    Args:
        dimensions: The ranks of each dimension that it reduces over, in order.
        parts: What it holds, each kind once, and how often its dimensions would count each.
        foreign: Meshes of parameters of which it has nothing, by their ranks.
        groups: How many process groups it is in.
        apart: For the parts that ``partitioned`` names, how many ranks of a group may hold one, and
            the ranks of each of its groups.
    """

    dimensions: tuple[Sequence[int], ...]
    parts: Mapping[Part, int]
    foreign: frozenset[tuple[int, ...]]
    groups: int = 0
    apart: Mapping[Part, tuple[int, tuple[Sequence[int], ...]]] = field(default_factory=dict)


def compact(ranks: tuple[int, ...]) -> Sequence[int]:
    """Return ranks as a range where they are one, since each rank of thousands tells of its own."""
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    as_range = range(ranks[0], ranks[-1] + 1, step)
    return as_range if tuple(as_range) == ranks else ranks


def connected(outlines: Mapping[int, Outline]) -> bool:
    """Return whether all ranks that these ranks reduce with are among them."""
    return all(outlines.keys() >= set(d) for each in outlines.values() for d in each.dimensions)


def taken_for_copies(outlines: Mapping[int, Outline]) -> list[int]:
    """Return ranks that groups of ``partitioned`` connect, and that seem to hold copies.

    On a grid, ranks that such groups connect stand at different places of them. Where groups
    overlap, as in a chain, they need not, and nothing tells which ranks hold copies.
    """
    connected_to: dict[tuple[int, ...], dict[int, int]] = {}
    seen: set[tuple[object, ...]] = set()
    for outline in outlines.values():
        for (_, *which), (_, groups) in outline.apart.items():
            joined = connected_to.setdefault(tuple(which), {})
            for ranks in groups:
                if (*which, ranks) in seen:
                    continue
                seen.add((*which, ranks))
                roots = {_root(joined, rank) for rank in ranks}
                joined |= dict.fromkeys(roots, min(roots))
    holders: dict[tuple[Part, int], list[int]] = {}
    for rank, outline in outlines.items():
        for part, (copies, _) in outline.apart.items():
            root = _root(connected_to[part[1:]], rank)
            found = holders.setdefault((part, root), [])
            found.append(rank)
            if len(found) > copies:
                return found
    return []


def _root(joined: dict[int, int], rank: int) -> int:
    """Return the rank that stands for all that are connected with one."""
    while (above := joined.setdefault(rank, rank)) != rank:
        joined[rank] = joined.setdefault(above, above)
        rank = above
    return rank


def each_counts_once(outlines: Mapping[int, Outline]) -> bool:
    """Return whether reducing in order, with the weights that go with it, counts every part once.

    It does where dimensions are those of a grid, or of several grids over the same ranks.
    """
    times = _times_reached(outlines)
    if times is None:
        return False
    counts = Counter(part for outline in outlines.values() for part in outline.parts)
    return all(
        weight == times * counts[part]
        for outline in outlines.values()
        for part, weight in outline.parts.items()
    )


def _times_reached(outlines: Mapping[int, Outline]) -> int | None:
    """Return how often every rank reaches every rank when all reduce in order.

    None if that differs, or if ranks would wait for each other for ever.
    """
    # reached[b] is one large integer. Its digit for rank a, 32 bits wide, counts how often what a
    # has arrived at b. So adding up what the members of a group have is one addition.
    reached = {rank: 1 << number * _DIGIT for number, rank in enumerate(outlines)}
    left = {rank: [d for d in each.dimensions if len(d) > 1] for rank, each in outlines.items()}
    waiting = list(outlines)
    while waiting:
        moved: list[int] = []
        for rank in waiting:
            group = left[rank][0] if left[rank] else ()
            # A group can reduce once it is the next one of each of its members.
            if group and all(left[other] and left[other][0] == group for other in group):
                together = sum(reached[other] for other in group)
                for other in group:
                    reached[other] = together
                    left[other].pop(0)
                moved += group
        waiting = moved
    if any(left.values()) or len(set(reached.values())) != 1:
        return None
    once = sum(1 << number * _DIGIT for number in range(len(outlines)))
    times, rest = divmod(next(iter(reached.values())), once)
    return None if rest else times


_DIGIT = 32
