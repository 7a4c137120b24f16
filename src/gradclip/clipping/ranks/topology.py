"""How ranks hold the parameters: over which dimensions each is split, and how often it is held."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gradclip.clipping.ranks.dimension import Dimension, GroupLike, as_groups
from gradclip.clipping.ranks.flat import flat_groups, is_flattened, unknown_flat
from gradclip.errors import ArgumentTypeError, ArgumentValueError


@dataclass(frozen=True)
class Holding:
    """How the ranks hold one parameter.

    Args:
        split: The dimensions over which its elements are split; over the others it is replicated.
        by_row: Those of them that split its leading dimension, so that rows stay whole.
        declared: Those of them along which it is another parameter, as ``partitioned`` says.
        copies: How many ranks hold the very same part, over all dimensions.
        compared: Whether every rank is expected to have a gradient for it when one has.
        flat: Whether it lies in a flat parameter of FSDP1, cut anywhere.
    """

    split: frozenset[int] = frozenset()
    by_row: frozenset[int] = frozenset()
    declared: frozenset[int] = frozenset()
    copies: int = 1
    compared: bool = True
    flat: bool = False


@dataclass(eq=False)
class Topology:
    """The dimensions that norms are reduced over, in order, and who holds what.

    Args:
        dimensions: Every rank reduces over its own, in this order.
        meshes: Dimensions of the parameters' meshes: their ranks hold parts of the same ones.
        holdings: By ``id`` of a parameter.
        matched: Which patterns of ``partitioned`` and ``duplicated`` have parameters here.
    """

    dimensions: list[Dimension] = field(default_factory=list)
    meshes: list[Dimension] = field(default_factory=list)
    holdings: dict[int, Holding] = field(default_factory=dict)
    matched: set[str] = field(default_factory=set)


class Declared:
    """Process groups that somebody declared for names of parameters.

    Args:
        argument: What the argument is called.
        groups: By name pattern.

    Raises:
        ArgumentTypeError: GC011, if it is no mapping of patterns to process groups.
    """

    def __init__(self, argument: str, groups: "Mapping[str, GroupLike] | None") -> None:
        if groups is not None and not isinstance(groups, Mapping):
            raise ArgumentTypeError(
                f"{argument} is a {type(groups).__name__}: expected a mapping of name patterns to "
                "process groups"
            )
        for pattern in groups or ():
            if not isinstance(pattern, str):
                raise ArgumentTypeError(
                    f"{argument} has the key {pattern!r}: expected a name pattern"
                )
        if groups and not dist.is_initialized():
            raise ArgumentValueError(
                f"{argument} names process groups, and torch.distributed is not initialised: call "
                "init_process_group first"
            )
        self.argument = argument
        self.groups = {
            pattern: as_groups(value, f"{argument}[{pattern!r}]")
            for pattern, value in (groups or {}).items()
        }

    def of(self, name: str | None, where: str) -> dict[str, list[ProcessGroup]]:
        """Return the groups of each pattern that matches a name.

        Raises:
            ArgumentValueError: GC010, if the name decides and there is none, or if this rank is in
                none of the groups.
        """
        found: dict[str, list[ProcessGroup]] = {}
        for pattern, groups in self.groups.items():
            if name is None and pattern != "*":
                raise ArgumentValueError(
                    f"{self.argument} has the pattern {pattern!r}, and {where} has no name. Pass "
                    "an nn.Module, (name, tensor) pairs, or an optimizer made from them."
                )
            if pattern == "*" or fnmatchcase(name or "", pattern):
                if not groups:
                    raise ArgumentValueError(
                        f"{self.argument}[{pattern!r}] is for {where}, and rank {dist.get_rank()} "
                        "is in none of its groups"
                    )
                found[pattern] = groups
        return found


def topology_of(
    parameters: Sequence[Tensor],
    names: Callable[[], Sequence[str | None]],
    module: nn.Module | None,
    partitioned: Declared,
    duplicated: Declared,
) -> Topology:
    """Find out how this rank's parameters are held; asks no other rank.

    Args:
        parameters: As they are now.
        names: Gives what they are called.
        module: Where FSDP1 is looked for.
        partitioned: Groups whose ranks hold different parameters under a pattern.
        duplicated: Groups whose ranks hold copies, which ``partitioned`` would count as different.

    Raises:
        ArgumentValueError: GC010, for a flat parameter without its module, or declarations that
            cannot be.
    """
    return _Survey(parameters, names, module, partitioned, duplicated).topology()


class _Survey:
    """Goes through the parameters, and numbers dimensions as they appear."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        names: Callable[[], Sequence[str | None]],
        module: nn.Module | None,
        partitioned: Declared,
        duplicated: Declared,
    ) -> None:
        self._parameters = parameters
        self._partitioned, self._duplicated = partitioned, duplicated
        self._names = names
        self._flat = flat_groups(module)
        self._numbers: dict[tuple[int, ...], int] = {}
        self._dimensions: list[Dimension] = []
        self._meshes: dict[tuple[int, ...], Dimension] = {}
        self._known: dict[ProcessGroup, Dimension] = {}
        self._by_spec: dict[Any, tuple[frozenset[int], frozenset[int]]] = {}
        self._matched: set[str] = set()

    def topology(self) -> Topology:
        declared = bool(self._partitioned.groups or self._duplicated.groups)
        marked = bool(self._flat) or any(map(is_flattened, self._parameters))
        names = self._names() if declared or marked else [None] * len(self._parameters)
        found: list[_Found] = []
        # Meshes before declarations: ranks of one stage share the former, and all know the latter.
        for number, parameter in enumerate(self._parameters):
            split, by_row = self._placed(parameter)
            compared, flat = True, is_flattened(parameter)
            if flat:
                if id(parameter) not in self._flat:
                    raise unknown_flat(names[number] or f"parameters[{number}]")
                if (group := self._flat[id(parameter)]) is not None:
                    split, compared = split | {self._number(group)}, False
            found.append(_Found(id(parameter), split, by_row, compared, flat))
        for groups in self._partitioned.groups.values():
            for group in groups:
                self._number(group)
        for number, each in enumerate(found if declared else ()):
            self._declare(each, names[number], f"parameters[{number}]")
        sizes = [dimension.size for dimension in self._dimensions]
        return Topology(
            self._dimensions,
            list(self._meshes.values()),
            {each.identity: each.holding(sizes) for each in found},
            self._matched,
        )

    def _placed(self, parameter: Tensor) -> tuple[frozenset[int], frozenset[int]]:
        """Return over which dimensions a DTensor is split, and over which of them by rows."""
        spec: Any = getattr(parameter, "_spec", None)
        if spec is None:
            return frozenset(), frozenset()
        key = id(spec.mesh), spec.placements
        if key not in self._by_spec:
            split, by_row = set(), set()
            if spec.mesh.get_coordinate() is not None:
                for mesh_dim, placement in enumerate(spec.placements):
                    group = spec.mesh.get_group(mesh_dim)
                    dimension = self._dimension(group)
                    self._meshes[dimension.ranks] = dimension
                    if placement.is_partial():
                        raise ArgumentValueError(
                            f"a parameter of shape {tuple(parameter.shape)} is placed as "
                            f"{placement}: its ranks hold summands, and no rank the parameter"
                        )
                    if placement.is_replicate():
                        continue
                    number = self._number(group)
                    split.add(number)
                    if getattr(placement, "dim", None) == 0:
                        by_row.add(number)
            self._by_spec[key] = frozenset(split), frozenset(by_row)
        return self._by_spec[key]

    def _declare(self, found: "_Found", name: str | None, place: str) -> None:
        where = place if name is None else name
        for pattern, groups in self._partitioned.of(name, where).items():
            self._matched.add(pattern)
            found.declared |= {self._number(group) for group in groups}
            found.compared = False
        for pattern, groups in self._duplicated.of(name, where).items():
            self._matched.add(pattern)
            for group in groups:
                ranks = set(self._dimension(group).ranks)
                if not any(ranks <= set(self._dimensions[n].ranks) for n in found.declared):
                    raise ArgumentValueError(
                        f"duplicated[{pattern!r}] says that ranks {sorted(ranks)} hold copies of "
                        f"{where}, and no group that it is partitioned over has all of them: it "
                        "would be counted once in any case. Declare the groups over which ranks "
                        "hold different parameters as partitioned, and copies among those only."
                    )
                found.copies *= len(ranks)

    def _dimension(self, group: ProcessGroup) -> Dimension:
        if group not in self._known:
            self._known[group] = Dimension.of(group)
        return self._known[group]

    def _number(self, group: ProcessGroup) -> int:
        """Number a group; groups of the same ranks are one dimension, whoever made them."""
        dimension = self._dimension(group)
        if dimension.ranks not in self._numbers:
            self._numbers[dimension.ranks] = len(self._dimensions)
            self._dimensions.append(dimension)
        return self._numbers[dimension.ranks]


@dataclass
class _Found:
    """What is known of a parameter so far."""

    identity: int
    split: frozenset[int]
    by_row: frozenset[int]
    compared: bool
    flat: bool
    declared: frozenset[int] = frozenset()
    copies: int = 1

    def holding(self, sizes: list[int]) -> Holding:
        split = self.split | self.declared
        copies = self.copies
        for number, size in enumerate(sizes):
            copies *= 1 if number in split else size
        return Holding(split, self.by_row, self.declared, copies, self.compared, self.flat)
