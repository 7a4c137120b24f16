"""Parameters by layer: what to call them, and which has how much of the norm."""

from collections.abc import Sequence
from dataclasses import dataclass

from gradclip.diagnostics.arrays import Flags, Numbers, Places, np

__all__ = ["Layers", "layers_of", "mean_shares", "short_names"]

_BLOCK = 4096
"""Rows that are squared at a time."""


@dataclass(frozen=True, eq=False)
class Layers:
    """Which layer each parameter is of.

    Attributes:
        names: Of the layers, in the model's order.
        ticks: A few letters for each, for the edge of a chart; empty where they do not fit.
        of: The layer of each parameter.
    """

    names: list[str]
    ticks: list[str]
    of: Places

    def added(self, of_parameters: Numbers) -> Numbers:
        """Add up the numbers of each layer's parameters."""
        of_layers: Numbers = np.zeros(len(self.names))
        np.add.at(of_layers, self.of, of_parameters)
        return of_layers


def layers_of(names: Sequence[str]) -> Layers:
    """Sort parameters into layers: by the first number in a name, else by the module.

    A module is called by its whole name, which a limit by name needs.

    >>> found = layers_of(["model.embed.weight", "model.h.0.a.weight", "model.h.1.a.weight"])
    >>> found.names, found.of.tolist()
    (['model.embed', 'layer 0', 'layer 1'], [0, 1, 2])
    """
    split = [name.split(".") for name in names]
    start = _common_start(split)
    each = [_place(parts[start:]) for parts in split]
    common = split[0][:start] if names else []
    stems = {stem for stem, number in each if number is not None}
    known: dict[tuple[tuple[str, ...], str | None], int] = {}
    of = [known.setdefault(place, len(known)) for place in each]
    titles, ticks = [], []
    for stem, number in known:
        if number is None:
            titles.append(".".join((*common, *stem)))
            ticks.append("")
        elif len(stems) == 1:
            titles.append(f"layer {number}")
            ticks.append(f"layer {number}")
        else:
            titles.append(".".join((*common, *stem, number)))
            ticks.append(".".join((*stem[-1:], number)))
    return Layers(titles, ticks, np.array(of, dtype=np.int64))


def short_names(names: Sequence[str]) -> list[str]:
    """Leave out what all names have, and what comes before a layer's number where that is clear.

    It is for the edge of a chart. A limit by name needs the whole name.

    >>> short_names(["model.embed.weight", "model.h.0.a.weight", "model.h.1.a.weight"])
    ['embed', '0.a', '1.a']
    >>> short_names(["0.weight", "0.bias"])
    ['0.weight', '0.bias']
    """
    split = [name.split(".") for name in names]
    start = _common_start(split)
    split = [parts[start:] for parts in split]
    begun = [".".join(parts) for parts in split]
    stems = {stem for stem, number in map(_place, split) if number is not None}
    shorter = begun
    if len(stems) == 1:
        stem = [*stems.pop()]
        shorter = [
            ".".join(parts[len(stem) :] if parts[: len(stem)] == stem else parts) for parts in split
        ]
    is_all_weights = all(name.endswith(".weight") for name in names)
    shortest = [name.removesuffix(".weight") for name in shorter] if is_all_weights else shorter
    for found in (shortest, shorter, begun):
        if len(set(found)) == len(set(names)) and not any(map(str.isdecimal, found)):
            return found
    return list(names)


def mean_shares(norms: Numbers, which: Flags) -> tuple[Numbers, int]:
    """Return the mean share of each parameter in the squared norm, and of how many steps.

    Args:
        norms: Of each parameter, by step. Steps with one that is not finite are left out.
        which: The steps to take.
    """
    total, count = np.zeros(norms.shape[1]), 0
    places = np.flatnonzero(which)
    for start in range(0, len(places), _BLOCK):
        part = norms[places[start : start + _BLOCK]]
        largest = part.max(1, keepdims=True)
        part, largest = (each[np.isfinite(largest[:, 0])] for each in (part, largest))
        part, largest = (each[largest[:, 0] > 0] for each in (part, largest))
        squares = (part / largest) ** 2
        total += (squares / squares.sum(1, keepdims=True)).sum(0)
        count += len(part)
    return total / max(count, 1), count


def _place(parts: Sequence[str]) -> tuple[tuple[str, ...], str | None]:
    """Return the start of a name up to its first number, and that; or its module."""
    for at, part in enumerate(parts):
        if part.isdecimal():
            return tuple(parts[:at]), part
    return tuple(parts[:-1] or parts), None


def _common_start(split: Sequence[Sequence[str]]) -> int:
    """Return how many parts all names begin with; two of each are left."""
    start = 0
    while all(len(parts) > start + 2 and not parts[start].isdecimal() for parts in split) and (
        len({parts[start] for parts in split}) == 1
    ):
        start += 1
    return start
