"""How the ranks hold one parameter."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from math import prod

from torch.distributed import ProcessGroup

from gradclip.clipping.ranks.dimension import Dimension


@dataclass(frozen=True)
class Holding:
    """How the ranks hold one parameter.

    Args:
        split: The dimensions over which its elements are split; over the others it is replicated.
        cuts: The tensor dimension that each of them cuts, where it is known.
        declared: Those of them along which it is another parameter, as ``partitioned`` says.
        copies: How many ranks hold the very same part, over all dimensions.
        compared: Whether every rank is expected to have a gradient for it when one has.
        flat: Whether it lies in a flat parameter of FSDP1, cut anywhere.
        position: Which of the parts this rank has; ranks with the same position have copies.
        axes: What each number of it counts along: a dimension of the tensor; None for other
            parameters.
        copied: The dimensions all of whose ranks have the part that this rank has.
        absent: Whether this rank has no part of it.
    """

    split: frozenset[int] = frozenset()
    cuts: Mapping[int, int] = field(default_factory=dict)
    declared: frozenset[int] = frozenset()
    copies: int = 1
    compared: bool = True
    flat: bool = False
    position: tuple[int, ...] = ()
    axes: tuple[int | None, ...] = ()
    copied: frozenset[int] = frozenset()
    absent: bool = False

    def split_along(self, tensor_dim: int) -> frozenset[int]:
        """Return the dimensions that cut a dimension of the tensor: its slices are whole then."""
        return frozenset(n for n, cut in self.cuts.items() if cut == tensor_dim)

    def position_of_units(self, unit_dim: int | None) -> tuple[int, ...]:
        """Return which units this rank has a part of; ranks with the same ones know their norms.

        Args:
            unit_dim: The dimension of the tensor that has them; None where it is a single one.
        """
        pairs = zip(self.position, self.axes, strict=True)
        return tuple(at for at, axis in pairs if axis is None or axis == unit_dim)


@dataclass
class Found:
    """What a rank knows of a parameter before it has heard of others.

    Args:
        identity: ``id`` of it.
        split: As in ``Holding``, like all that is not described here.
        groups: The process groups that split it, in the order of ``position``.
        whole: Those of its mesh that do not.
        mesh: The ranks of its mesh, if it is a DTensor.
    """

    identity: int = 0
    split: frozenset[int] = frozenset()
    cuts: Mapping[int, int] = field(default_factory=dict)
    groups: tuple[ProcessGroup, ...] = ()
    whole: tuple[ProcessGroup, ...] = ()
    position: tuple[int, ...] = ()
    axes: tuple[int | None, ...] = ()
    mesh: tuple[int, ...] | None = None
    compared: bool = True
    flat: bool = False
    absent: bool = False
    declared: frozenset[int] = frozenset()
    copies: int = 1

    @property
    def key(self) -> tuple[object, ...]:
        """What parameters that are held alike have in common.

        Ranks say of all of them at once where they stand, so ranks have to tell them from others
        alike. Which numbers or ranks are the same here does not do: other meshes may have the same
        ones on this rank alone. Which process groups are the same is so on every rank.
        """
        return self.position, self.groups, self.whole, self.copies, self.mesh is None

    def weight(self, sizes: Sequence[int]) -> int:
        """Return how often reducing over all dimensions counts it."""
        split = self.split | self.declared
        return prod((self.copies, *(size for n, size in enumerate(sizes) if n not in split)))

    def holding(
        self,
        dimensions: Sequence[Dimension],
        holders: frozenset[int],
        foreign: AbstractSet[tuple[int, ...]],
    ) -> Holding:
        """Return the holding where dimensions are those of a grid.

        Args:
            dimensions: In order.
            holders: The ranks that have the part that this one has.
            foreign: The meshes that some rank is not in.
        """
        split = self.split | self.declared
        return Holding(
            split,
            self.cuts,
            self.declared,
            self.weight([dimension.size for dimension in dimensions]),
            self._is_compared(foreign),
            self.flat,
            self.position,
            self.axes,
            frozenset(
                n
                for n, dimension in enumerate(dimensions)
                if n not in split and self._is_copied(dimension, holders)
            ),
            self.absent,
        )

    def in_one_dimension(
        self,
        everyone: Dimension,
        holders: frozenset[int],
        foreign: AbstractSet[tuple[int, ...]],
    ) -> Holding:
        """Return the holding where there is one dimension, of all ranks."""
        split = frozenset({0}) if self.split or self.declared or self.absent else frozenset()
        return Holding(
            split,
            {},
            frozenset({0}) if self.declared else frozenset(),
            max(1, len(holders)),
            self._is_compared(foreign),
            self.flat,
            self.position,
            self.axes,
            frozenset({0}) if self._is_copied(everyone, holders) else frozenset(),
            self.absent,
        )

    def _is_compared(self, foreign: AbstractSet[tuple[int, ...]]) -> bool:
        return self.compared and not self.absent and self.mesh not in foreign

    def _is_copied(self, dimension: Dimension, holders: frozenset[int]) -> bool:
        """Return whether all ranks of a dimension hold the part that this one holds."""
        return not self.absent and dimension.size > 1 and holders.issuperset(dimension.ranks)
