"""What ranks make sure of before the first step: that they mean the same thing."""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradclip.clipping.ranks.dimension import Dimension, gathered
from gradclip.clipping.ranks.shards import Placements, misplaced
from gradclip.errors import ArgumentValueError


@dataclass(frozen=True)
class Facts:
    """What a rank says of itself.

    Args:
        policies: What is done with gradients, in words.
        parameters: How many parameters every rank should have, and a checksum of what they are.
        doubles: Whether it has float64 parameters.
        singles: Whether it has others.
        unmatched: Patterns, by the argument that has them, that match none of its parameters.
    """

    policies: str
    parameters: tuple[int, int]
    doubles: bool
    singles: bool
    unmatched: frozenset[tuple[str, str]]


def fingerprint_of(parameters: Iterable[tuple[str, Tensor]]) -> tuple[int, int]:
    """Return a count and a checksum of parameters: of names, whole shapes and placements."""
    count, checksum = 0, 0
    for name, parameter in parameters:
        spec: Any = getattr(parameter, "_spec", None)
        placements = None if spec is None else tuple(map(str, spec.placements))
        said = f"{name} {tuple(parameter.shape)} {parameter.dtype} {placements}"
        count, checksum = count + 1, zlib.crc32(said.encode(), checksum)
    return count, checksum


def agreed(dimensions: Sequence[Dimension], facts: Facts) -> Facts:
    """Compare what the ranks say, and return what holds for all of them.

    Raises:
        ArgumentValueError: GC010, on every rank, if they differ, or if a pattern matches nothing
            anywhere.
    """
    said = gathered(dimensions, facts)
    first, expected = next(iter(said.items()))
    for rank, other in said.items():
        for name in ("policies", "parameters"):
            seen, wanted = getattr(other, name), getattr(expected, name)
            if seen != wanted:
                raise ArgumentValueError(
                    f"ranks {first} and {rank} disagree about the {name} that are clipped "
                    f"together: {_words(name, wanted)} and {_words(name, seen)}. Every rank makes "
                    "its GradientClipper with the same arguments, of the same model; parameters "
                    "that differ by rank are declared: partitioned={pattern: process group}."
                )
    nowhere = frozenset.intersection(*(other.unmatched for other in said.values()))
    for argument, pattern in sorted(nowhere):
        raise ArgumentValueError(
            f"the pattern {pattern!r} of {argument} matches no parameter on any of the ranks "
            f"{list(said)[:_SHOWN]} (or earlier patterns took all of them)"
        )
    return Facts(
        expected.policies,
        expected.parameters,
        any(other.doubles for other in said.values()),
        any(other.singles for other in said.values()),
        nowhere,
    )


_SHOWN = 16


def _words(name: str, value: Any) -> str:
    return f"{value[0]} of them, checksum {value[1]:08x}" if name == "parameters" else str(value)


def agree_on_misplaced(
    dimensions: Sequence[Dimension], parameters: Sequence[Tensor]
) -> dict[int, Placements]:
    """Find out which gradients some rank has with placements other than their parameter's.

    Args:
        dimensions: Of the meshes: their ranks have parts of the same parameters.
        parameters: All, in the order that all ranks have.

    Returns:
        The placements, by number of the parameter, in order: the same on all those ranks.
    """
    found = [parameter.grad for parameter in parameters]
    mine: dict[int, Placements] = {}
    for number in misplaced(parameters, found):
        spec: Any = getattr(found[number], "_spec", None)
        if spec is not None:
            mine[number] = tuple(spec.placements)
    merged: dict[int, Placements] = {}
    for theirs in gathered(dimensions, mine).values():
        merged = {**theirs, **merged}
    return dict(sorted(merged.items()))
