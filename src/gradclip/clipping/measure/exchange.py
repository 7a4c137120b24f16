"""What ranks add to what one of them found: maxima before powers are summed, then sums."""

from collections.abc import Sequence
from dataclasses import replace

from gradclip.clipping.flags import Flag
from gradclip.clipping.measure.group import Found, Group
from gradclip.clipping.measure.norm import Sums, reads_twice
from gradclip.clipping.ranks.peers import GlobalSums, LocalSums, Peers


def exchange_maxima(peers: Peers, found: Sequence[Found]) -> list[Found]:
    """Replace the maxima of this rank by those of all, for the norms that are read twice."""
    twice: list[Sums] = []
    with peers.guarding():
        # In the order in which ranks expect them. What clamping leaves is read in full at once.
        twice = [
            sums
            for each in found
            for name, sums in each.sums.items()
            if name != "left" and reads_twice(sums.order)
        ]
    maxima = iter(peers.maximise([each.maxima_S for each in twice if each.maxima_S is not None]))
    if not twice:
        return list(found)
    replaced = {id(sums): replace(sums, maxima_S=next(maxima)) for sums in twice}
    return [
        each.with_sums({name: replaced.get(id(s), s) for name, s in each.sums.items()})
        for each in found
    ]


def exchange_sums(
    peers: Peers, groups: Sequence[Group], found: list[Found], step_tag: str
) -> tuple[Flag | None, list[Found]]:
    """Replace what this process found by what all ranks found.

    Args:
        peers: The processes that hold the gradients.
        groups: The gradients of each pattern; none after an error on this rank.
        found: What was found in them.
        step_tag: At which step this rank stands, in words that are the same on all ranks.

    Returns:
        Whether all is well, None if gradients have to be collected again; and what was found.
    """
    if peers.is_single:
        return True, found
    local: list[LocalSums] = []
    with peers.guarding():
        # After an error on this rank there may be less found than groups, and none of it is used.
        local = [_local(group, each) for group, each in zip(groups, found, strict=False)]
    sound, totals = peers.combine(local, step_tag)
    if sound is None:
        return None, found
    return sound, [_global(each, total) for each, total in zip(found, totals, strict=True)]


def _local(group: Group, found: Found) -> LocalSums:
    sums = found.sums
    return LocalSums(
        group.gradients,
        {name: each.sums_SA for name, each in sums.items()},
        {name: each.maxima_S for name, each in sums.items() if each.maxima_S is not None},
        found.norm.rows_RA,
        found.tensor_sums_T,
        found.changed,
    )


def _global(found: Found, total: GlobalSums) -> Found:
    sums = {
        name: replace(
            each,
            sums_SA=total.sums[name],
            maxima_S=total.maxima.get(name, each.maxima_S),
            down_S=None,
        )
        for name, each in found.sums.items()
    }
    return replace(
        found.with_sums(sums),
        changed=total.changed,
        nonfinite=total.nonfinite,
        unbounded=total.unbounded,
    )
