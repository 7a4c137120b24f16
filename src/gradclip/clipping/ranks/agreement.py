"""What ranks make sure of before the first step: that they mean the same thing."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch.distributed as dist
from torch import Tensor

from gradclip.clipping.collect.shards import Placements, misplaced
from gradclip.clipping.ranks.coverage import Outline, connected, taken_for_copies
from gradclip.clipping.ranks.dimension import Dimension, gathered
from gradclip.errors import ArgumentValueError, ReplicaError


@dataclass(frozen=True)
class Facts:
    """What a rank says of itself.

    Args:
        policies: What is done with gradients, in words.
        outline: How it holds its parameters.
        parameters: How many parameters the ranks of a mesh (None: every rank) should have, and a
            checksum of what they are.
        doubles: Whether it has float64 parameters.
        singles: Whether it has others.
        unmatched: Patterns, by the argument that has them, that match none of its parameters.
        idle: Those for which it is in no process group, as None says.
        error: What is wrong with its arguments, in words.
        groups: The ranks of each process group over which it talks.
        made: How many clippers it has made with others.
    """

    policies: str
    outline: Outline
    parameters: Mapping[tuple[int, ...] | None, tuple[int, int]]
    doubles: bool
    singles: bool
    unmatched: frozenset[tuple[str, str]]
    idle: frozenset[tuple[str, str]]
    error: str | None
    groups: tuple[Sequence[int], ...]
    made: int


def gather_facts(dimensions: Sequence[Dimension], facts: Facts) -> dict[int, Facts]:
    """Return what every rank says that is reached over some dimensions, by rank.

    Groups may form a chain, and a rank at one end has to hear of the other end.
    """
    # In an order that all ranks have: none waits for one that waits for another one.
    in_order = sorted(dimensions, key=lambda dimension: _place(dimension.ranks))
    known, rounds = {dist.get_rank(): facts}, 0
    while rounds < _rounds({rank: each.groups for rank, each in known.items()}):
        known, rounds = gathered(in_order, known), rounds + 1
    return known


def _place(ranks: Sequence[int]) -> tuple[int, Sequence[int]]:
    """Return where a group comes: neighbours first, so that the rows of a grid are together."""
    return ranks[-1] - ranks[0], tuple(ranks)


def _rounds(groups: Mapping[int, Sequence[Sequence[int]]]) -> float:
    """Return after how many rounds every rank knows all; the same on each that knows all.

    Infinity where this rank does not know all yet.
    """
    every = sorted({tuple(each) for known in groups.values() for each in known}, key=_place)
    if any(rank not in groups for each in every for rank in each):
        return inf
    # knows[b] is one large integer, in which the bit of rank a says whether b has heard of a.
    knows = {rank: 1 << number for number, rank in enumerate(groups)}
    all_known, rounds = (1 << len(groups)) - 1, 0
    for _ in groups:
        if all(known == all_known for known in knows.values()):
            break
        for each in every:
            together = 0
            for rank in each:
                together |= knows[rank]
            knows |= dict.fromkeys(each, together)
        rounds += 1
    return rounds


def check_agreement(known: Mapping[int, Facts]) -> None:
    """Raise on every rank if they do not mean the same thing.

    Raises:
        ArgumentValueError: GC010, they differ, a pattern matches nothing anywhere, or a rank has
            arguments that cannot be.
    """
    for rank, each in known.items():
        if each.error is not None:
            raise ArgumentValueError(f"clipping could not begin on rank {rank}: {each.error}")
    first, expected = next(iter(known.items()))
    for rank, other in known.items():
        if other.policies != expected.policies:
            raise _disagreement("policies", first, rank, expected.policies, other.policies)
        for mesh in expected.parameters.keys() | other.parameters.keys():
            if mesh is not None and not {first, rank} <= set(mesh):
                continue
            wanted = expected.parameters.get(mesh, (0, 0))
            seen = other.parameters.get(mesh, (0, 0))
            if wanted != seen:
                words = [
                    f"{count} of them, checksum {check:08x}" for count, check in (wanted, seen)
                ]
                raise _disagreement("parameters", first, rank, *words)
    nowhere = frozenset.intersection(*(other.unmatched for other in known.values()))
    # A rank that is in no group may have none of the parameters that the groups have.
    nowhere -= frozenset.intersection(*(other.idle for other in known.values()))
    for argument, pattern in sorted(nowhere):
        raise ArgumentValueError(
            f"the pattern {pattern!r} of {argument} matches no parameter on any of the ranks "
            f"{list(known)[:_SHOWN]} (or earlier patterns took all of them)"
        )
    _check_groups({rank: each.outline for rank, each in known.items()})


def _check_groups(outlines: Mapping[int, Outline]) -> None:
    """Raise if the groups do not say which ranks hold what, or lead to ranks that are not here."""
    if mistaken := taken_for_copies(outlines):
        raise ArgumentValueError(
            f"groups of partitioned connect the ranks {mistaken[:_SHOWN]}, and these stand at the "
            "same places of their groups, as copies do: the groups overlap. Name one group of all "
            "ranks that hold different parameters, or give the parameters another name on each "
            "rank."
        )
    strangers = {r for each in outlines.values() for mesh in each.foreign for r in mesh}
    if not strangers <= outlines.keys() or not connected(outlines):
        raise ArgumentValueError(
            f"ranks {list(outlines)[:_SHOWN]} hold parameters together, and others are on ranks "
            f"{sorted(strangers - outlines.keys())[:_SHOWN]}, so that no norm is of all of them. "
            'Name the group of all ranks: partitioned={"*": dist.group.WORLD}.'
        )


def _disagreement(what: str, first: int, rank: int, wanted: str, seen: str) -> ArgumentValueError:
    return ArgumentValueError(
        f"ranks {first} and {rank} disagree about the {what} that are clipped together: {wanted} "
        f"and {seen}. Give every rank the same arguments and the same "
        "model; parameters that differ by rank are declared: partitioned={pattern: process group}."
    )


_SHOWN = 16


def agree_on_misplaced(
    dimensions: Sequence[Dimension], parameters: Sequence[Tensor]
) -> dict[int, Placements]:
    """Find out which gradients some rank has with placements other than their parameter's.

    Args:
        dimensions: Those over which ranks heard that some gradient is placed otherwise.
        parameters: All, in the order that all ranks have.

    Returns:
        The placements, by number of the parameter, in order: the same on all those ranks.

    Raises:
        ReplicaError: GC211, on all those ranks, if they were given other parameters, or a gradient
            is placed in several other ways.
    """
    told = gathered(dimensions, {dist.get_rank(): _by_mesh(parameters)})
    agreed: dict[tuple[int, ...], tuple[int, _OnMesh]] = {}
    # All ranks look at all meshes, so that all raise.
    for rank, (mesh, theirs) in [(r, each) for r, known in told.items() for each in known.items()]:
        first, ours = agreed.setdefault(mesh, (rank, theirs))
        if (ours.count, ours.checksum) != (theirs.count, theirs.checksum):
            raise ReplicaError(
                f"ranks {first} and {rank} were given {ours.count} and {theirs.count} parameters "
                "of one mesh, or others, and some of their gradients are summands or placed "
                "otherwise than their parameters, which ranks reduce together, one by one. Give "
                "every rank the same parameters, those without a gradient too. No gradient was "
                "changed."
            )
        for position, placements in theirs.misplaced.items():
            if ours.misplaced.setdefault(position, placements) != placements:
                raise ReplicaError(
                    f"the gradient of one parameter (number {position} on its mesh) is placed as "
                    f"{ours.misplaced[position]} on one rank, and on rank {rank} as {placements}, "
                    "so ranks cannot bring it together to the placements of its parameter. No "
                    "gradient was changed."
                )
    numbers = _numbers_on_meshes(parameters)
    merged = {
        numbers[mesh][position]: placements
        for mesh in numbers
        for position, placements in agreed[mesh][1].misplaced.items()
    }
    return dict(sorted(merged.items()))


@dataclass(frozen=True)
class _OnMesh:
    """What a rank has on one mesh.

    Args:
        count: How many parameters.
        checksum: Of their shapes.
        misplaced: Which of them have gradients with other placements, and those.
    """

    count: int
    checksum: int
    misplaced: dict[int, Placements]


def _numbers_on_meshes(parameters: Sequence[Tensor]) -> dict[tuple[int, ...], list[int]]:
    """Return which of some parameters are on each mesh of this rank, by the ranks of the mesh."""
    known: dict[int, tuple[int, ...]] = {}
    numbers: dict[tuple[int, ...], list[int]] = {}
    for number, parameter in enumerate(parameters):
        spec: Any = getattr(parameter, "_spec", None)
        if spec is None or spec.mesh.get_coordinate() is None:
            continue
        if id(spec.mesh) not in known:
            known[id(spec.mesh)] = tuple(spec.mesh.mesh.flatten().tolist())
        numbers.setdefault(known[id(spec.mesh)], []).append(number)
    return numbers


def _by_mesh(parameters: Sequence[Tensor]) -> dict[tuple[int, ...], _OnMesh]:
    wrong: dict[int, Placements] = {}
    found = [parameter.grad for parameter in parameters]
    for number in misplaced(parameters, found):
        spec: Any = getattr(found[number], "_spec", None)
        expected: Any = getattr(parameters[number], "_spec", None)
        # What is on another mesh, or no DTensor, is refused later, and no rank waits for it.
        if spec is not None and expected is not None and spec.mesh == expected.mesh:
            wrong[number] = tuple(spec.placements)
    return {
        mesh: _OnMesh(
            len(numbers),
            zlib.crc32(repr([tuple(parameters[n].shape) for n in numbers]).encode()),
            {place: wrong[number] for place, number in enumerate(numbers) if number in wrong},
        )
        for mesh, numbers in _numbers_on_meshes(parameters).items()
    }
