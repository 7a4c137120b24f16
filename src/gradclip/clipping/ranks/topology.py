"""How ranks hold the parameters: over which dimensions each is split, and how often it is held."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gradclip.clipping.ranks import is_debugging
from gradclip.clipping.ranks.coverage import (
    Outline,
    Part,
    compact,
    each_counts_once,
)
from gradclip.clipping.ranks.dimension import (
    Dimension,
    GroupLike,
    as_groups,
    groups_here,
)
from gradclip.clipping.ranks.fsdp1 import flat_groups, is_flattened, unknown_flat
from gradclip.clipping.ranks.holding import Found, Holding
from gradclip.errors import ArgumentTypeError, ArgumentValueError


@dataclass(eq=False)
class Topology:
    """The dimensions that norms are reduced over, in order, and who holds what.

    Args:
        dimensions: Every rank reduces over its own, in this order.
        holdings: By ``id`` of a parameter.
        is_grid: Whether reducing over one dimension after the other counts every rank once;
            otherwise there is one dimension of all ranks.
    """

    dimensions: list[Dimension] = field(default_factory=list)
    holdings: dict[int, Holding] = field(default_factory=dict)
    is_grid: bool = True


class Declared:
    """Process groups that a user declared for names of parameters.

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


class Survey:
    """Finds out how this rank's parameters are held; asks no other rank.

    Args:
        parameters: As they are now.
        names: Gives what they are called.
        module: Where FSDP1 is looked for.
        partitioned: Groups whose ranks hold different parameters under a pattern.
        duplicated: Groups whose ranks hold copies, which ``partitioned`` would count as different.
    """

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
        self._flat = flat_groups(module)
        self._numbers: dict[tuple[int, ...], int] = {}
        self._known: dict[ProcessGroup, Dimension] = {}
        self._by_spec: dict[Any, Found] = {}
        self._grids: dict[int, Any] = {}
        self.dimensions: list[Dimension] = []
        """Those of this rank, in the order in which it reduces over them."""
        self.matched: set[str] = set()
        """Which patterns of ``partitioned`` and ``duplicated`` have parameters here."""
        self.error: Exception | None = None
        """What is wrong here alone, for every rank to hear of."""
        declared = bool(partitioned.groups or duplicated.groups)
        marked = bool(self._flat) or any(map(is_flattened, parameters))
        self._names = names() if declared or marked else [None] * len(parameters)
        # Meshes before declarations: ranks of one stage share the former, and all know the latter.
        # Dimensions that split nothing too: a gradient may be a summand there, on some ranks alone.
        for group in _mesh_groups(parameters):
            self._number(group)
        self._found = [self._guarded(self._placed, number) for number in range(len(parameters))]
        for groups in partitioned.groups.values():
            for group in groups:
                self._number(group)
        for number in range(len(parameters) if declared else 0):
            self._guarded(self._declare, number)
        if is_debugging():
            self._number_all(module)

    def _number_all(self, module: nn.Module | None) -> None:
        """Reduce over all ranks that may have copies, whatever splits anything among them."""
        everyone = dist.group.WORLD
        if isinstance(module, nn.parallel.DistributedDataParallel):
            everyone = module.process_group
        assert everyone is not None
        self._number(everyone)

    def outline(self) -> Outline:
        """Return what the other ranks need to know."""
        foreign = {each.mesh for each in self._found if each.absent and each.mesh}
        return Outline(
            tuple(compact(dimension.ranks) for dimension in self.dimensions),
            {part: found.weight(self._sizes) for found, part in self._parts().values()},
            frozenset(foreign),
            groups_here(),
            {
                part: (
                    found.copies,
                    tuple(compact(self.dimensions[n].ranks) for n in sorted(found.declared)),
                )
                for found, part in self._parts().values()
                if found.declared
            },
        )

    def fingerprints(self, named: Sequence[str]) -> dict[tuple[int, ...] | None, tuple[int, int]]:
        """Return counts and checksums of the parameters that ranks should have alike.

        Args:
            named: What the parameters are called, those without a name too.

        Returns:
            By the ranks that should: those of a mesh, or None for every rank.
        """
        found: dict[tuple[int, ...] | None, tuple[int, int]] = {None: (0, 0)}
        for each, parameter, name in zip(self._found, self._parameters, named, strict=True):
            if each.absent or not each.compared:
                continue
            spec: Any = getattr(parameter, "_spec", None)
            placements = None if spec is None else tuple(map(str, spec.placements))
            label = f"{name} {tuple(parameter.shape)} {parameter.dtype} {placements}"
            count, checksum = found.get(each.mesh, (0, 0))
            found[each.mesh] = count + 1, zlib.crc32(label.encode(), checksum)
        return found

    def settle(self, outlines: Mapping[int, Outline] | None) -> Topology:
        """Return who holds what, now that this rank knows of the others.

        Args:
            outlines: Those of all ranks that can be reached, by rank; None to take it that
                dimensions are those of a grid.
        """
        holders = self._holders(outlines)
        # There are thousands of ranks, and of parameters: not for each of them anew.
        foreign = {mesh for each in (outlines or {}).values() for mesh in each.foreign}
        if outlines is None or each_counts_once(outlines):
            holdings = {
                each.identity: each.holding(self.dimensions, ranks, foreign)
                for each, ranks in zip(self._found, holders, strict=True)
            }
            return Topology(self.dimensions, holdings)
        everyone = Dimension.among(sorted(outlines), max(each.groups for each in outlines.values()))
        holdings = {
            each.identity: each.in_one_dimension(everyone, ranks, foreign)
            for each, ranks in zip(self._found, holders, strict=True)
        }
        return Topology([everyone], holdings, is_grid=False)

    def _holders(self, outlines: Mapping[int, Outline] | None) -> list[frozenset[int]]:
        """Return, for each parameter, which ranks have the part of it that this one has."""
        known: dict[tuple[object, ...], frozenset[int]] = {}
        for key, (found, part) in self._parts().items():
            if outlines is None:
                known[key] = self._twins(found)
            else:
                known[key] = frozenset(r for r, each in outlines.items() if part in each.parts)
        # A rank that has no part of a parameter may hold others in just that way.
        return [frozenset() if each.absent else known[each.key] for each in self._found]

    def _twins(self, found: Found) -> frozenset[int]:
        """Return which ranks stand where this one does, as far as meshes here tell.

        Every mesh that has all the groups that split a parameter tells, and no other one.
        """
        groups = {group for group in found.groups if self._dimension(group).size > 1}
        if not groups:
            return frozenset(range(dist.get_world_size()))
        twins: set[int] = set()
        for mesh in self._grids.values():
            dims = [mesh.get_group(dim) for dim in range(mesh.ndim)]
            if groups <= set(dims):
                at = tuple(
                    place if group in groups else slice(None)
                    for place, group in zip(mesh.get_coordinate(), dims, strict=True)
                )
                twins |= set(mesh.mesh[at].flatten().tolist())
        return frozenset(twins)

    @property
    def _sizes(self) -> list[int]:
        return [dimension.size for dimension in self.dimensions]

    def _parts(self) -> "dict[tuple[object, ...], tuple[Found, Part]]":
        """Return what this rank holds, by kind: parameters that are held alike are one part."""
        kinds: dict[tuple[object, ...], list[int]] = {}
        for number, each in enumerate(self._found):
            if not each.absent:
                kinds.setdefault(each.key, []).append(number)
        parts: dict[tuple[object, ...], tuple[Found, Part]] = {}
        for key, numbers in kinds.items():
            found, checksum = self._found[numbers[0]], 0
            for number in numbers:
                # Stages may call what they tie by different names.
                name = "" if found.copies > 1 else self._names[number] or number
                label = f"{name} {tuple(self._parameters[number].shape)}"
                checksum = zlib.crc32(label.encode(), checksum)
            parts[key] = found, (found.position, len(numbers), checksum)
        return parts

    def _guarded(self, look: "Callable[[int], Found]", number: int) -> "Found":
        try:
            return look(number)
        except (ArgumentValueError, ArgumentTypeError) as error:
            self.error = self.error or error
            return Found(id(self._parameters[number]), absent=True)

    def _placed(self, number: int) -> "Found":
        """Find over which dimensions a parameter is split, as DTensor and FSDP1 tell."""
        parameter = self._parameters[number]
        found = replace(self._of_spec(parameter), identity=id(parameter))
        if is_flattened(parameter):
            found.flat = True
            if id(parameter) not in self._flat:
                raise unknown_flat(self._names[number] or f"parameters[{number}]")
            if (group := self._flat[id(parameter)]) is not None:
                found.split |= {self._number(group)}
                found.groups = (group,)
                found.position = (dist.get_group_rank(group, dist.get_rank()),)
                found.axes = (-1,)
                found.compared = False
        return found

    def _of_spec(self, parameter: Tensor) -> "Found":
        spec: Any = getattr(parameter, "_spec", None)
        if spec is None:
            return Found()
        key = id(spec.mesh), spec.placements
        if key not in self._by_spec:
            self._by_spec[key] = self._of_mesh(spec, tuple(parameter.shape))
        return self._by_spec[key]

    def _of_mesh(self, spec: Any, shape: tuple[int, ...]) -> "Found":
        ranks = tuple(sorted(spec.mesh.mesh.flatten().tolist()))
        found = Found(mesh=ranks)
        coordinate = spec.mesh.get_coordinate()
        if coordinate is None:
            found.absent = True
            return found
        self._grids[id(spec.mesh)] = spec.mesh
        cuts: dict[int, int] = {}
        for mesh_dim, placement in enumerate(spec.placements):
            group = spec.mesh.get_group(mesh_dim)
            if placement.is_partial():
                raise ArgumentValueError(
                    f"a parameter of shape {shape} is placed as {placement}: its ranks hold "
                    "summands, and no rank the parameter"
                )
            if placement.is_replicate():
                found.whole += (group,)
                continue
            found.groups += (group,)
            found.position += (coordinate[mesh_dim],)
            axis = getattr(placement, "dim", -1)
            found.axes += (axis,)
            cuts[self._number(group)] = axis
        found.split, found.cuts = frozenset(cuts), cuts
        return found

    def _declare(self, number: int) -> "Found":
        found, name = self._found[number], self._names[number]
        where = f"parameters[{number}]" if name is None else name
        once: list[set[int]] = []
        for pattern, groups in self._duplicated.of(name, where).items():
            self.matched.add(pattern)
            once += [set(self._dimension(group).ranks) for group in groups]
        declared: list[ProcessGroup] = []
        for pattern, groups in self._partitioned.of(name, where).items():
            self.matched.add(pattern)
            declared += groups
            found.compared = False
        found.declared = frozenset(self._number(group) for group in declared)
        among = [set(self.dimensions[n].ranks) for n in found.declared]
        for ranks in once:
            if not any(ranks <= others for others in among):
                raise ArgumentValueError(
                    f"duplicated says that ranks {sorted(ranks)} hold copies of {where}, and no "
                    "group that it is partitioned over has all of them: it would be counted once "
                    "in any case. Declare the groups over which ranks hold different parameters "
                    "as partitioned, and copies among those only."
                )
            found.copies *= len(ranks)
        rank = dist.get_rank()
        for group in declared:
            members = self._dimension(group).ranks
            # Copies have the position of the first of them.
            twins = [each for each in once if rank in each and each <= set(members)]
            found.position += (members.index(min(twins[0]) if twins else rank),)
            found.axes += (None,)
        found.groups += tuple(declared)
        return found

    def _dimension(self, group: ProcessGroup) -> Dimension:
        if group not in self._known:
            self._known[group] = Dimension.of(group)
        return self._known[group]

    def _number(self, group: ProcessGroup) -> int:
        """Number a group; process groups of the same ranks are one dimension."""
        dimension = self._dimension(group)
        if dimension.ranks not in self._numbers:
            self._numbers[dimension.ranks] = len(self.dimensions)
            self.dimensions.append(dimension)
        number = self._numbers[dimension.ranks]
        # Of several groups of the same ranks all ranks take the same one, whichever they saw first.
        if group.group_name < self.dimensions[number].group.group_name:
            self.dimensions[number] = dimension
        return number


def _mesh_groups(parameters: Sequence[Tensor]) -> list[ProcessGroup]:
    """Return the groups of all dimensions of the meshes of DTensors.

    They come in an order that does not depend on which parameters there are, as long as the
    dimensions of different meshes have different names.
    """
    specs = [spec for each in parameters if (spec := getattr(each, "_spec", None)) is not None]
    meshes: dict[int, Any] = {id(spec.mesh): spec.mesh for spec in specs}
    groups = [
        ((mesh.mesh_dim_names or [""] * mesh.ndim)[dim], mesh.size(dim), mesh.get_group(dim))
        for mesh in meshes.values()
        if mesh.get_coordinate() is not None
        for dim in range(mesh.ndim)
    ]
    return [group for _, _, group in sorted(groups, key=lambda each: each[:2])]
