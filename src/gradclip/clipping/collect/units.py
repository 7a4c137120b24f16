"""Which elements of a tensor are a unit: what one output of a layer is computed from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gradclip.errors import ArgumentValueError, warn

DeclaredUnits: TypeAlias = Mapping[str, int | Literal["tensor"]]
"""By name pattern the dimension that has the units, or "tensor" for a single one."""

_CLEAR = 2
"""Dimensions of a tensor up to which the first one has the outputs, if no module says more."""


@dataclass(frozen=True)
class Units:
    """Each index of a dimension is a unit; a scalar or a vector is a single one.

    Args:
        dim: The dimension; None where the whole tensor is one unit.
        groups: Within each of so many equal parts of the leading dimension: a transposed
            convolution has its inputs there, and each group of them has outputs of its own.
    """

    dim: int | None = 0
    groups: int = 1

    @property
    def is_plain(self) -> bool:
        """Whether units are rows of the tensor as it is."""
        return not self.dim and self.groups == 1

    def rows(self, tensor: Tensor) -> int:
        """Return how many units a tensor has."""
        return 1 if self._is_one(tensor) else tensor.shape[self.dim or 0] * self._parts(tensor)

    def views(self, tensor: Tensor) -> list[tuple[Tensor, int]]:
        """Return views of a tensor that have the units in their leading dimension.

        Returns:
            Each with the number of its units, in the order of ``rows``.
        """
        if self._is_one(tensor):
            return [(tensor, 1)]
        groups = self._parts(tensor)
        parts = tensor.chunk(groups) if groups > 1 else (tensor,)
        moved = [part.movedim(self.dim, 0) if self.dim else part for part in parts]
        return [(part, part.shape[0]) for part in moved]

    def _parts(self, tensor: Tensor) -> int:
        """Return how many groups a tensor has: one where it does not fall into equal parts."""
        return 1 if tensor.shape[0] % self.groups else self.groups

    def _is_one(self, tensor: Tensor) -> bool:
        return self.dim is None or tensor.dim() <= 1


_WHOLE, _FIRST = Units(None), Units()


def units_of(
    parameters: Sequence[Tensor],
    names: Sequence[str] | None,
    module: nn.Module | None,
    declared: DeclaredUnits,
) -> list[Units]:
    """Return the units of each parameter: those that are declared, or its module's.

    Args:
        parameters: Whose units.
        names: What they are called; None where nothing is declared.
        module: Has them, if it is known.
        declared: By name pattern; the first match wins.

    Raises:
        ArgumentValueError: GC010, for a dimension that a tensor has not.
    """
    known = dict(_of_modules(module)) if module is not None else {}
    found = [known.get(id(parameter), _FIRST) for parameter in parameters]
    for number, name in enumerate(names or ()):
        pattern = next((each for each in declared if fnmatchcase(name, each)), None)
        if pattern is None:
            continue
        dim, parameter = declared[pattern], parameters[number]
        if dim != "tensor" and not dim < max(parameter.dim(), 1):
            raise ArgumentValueError(
                f"units has {pattern!r}: {dim}, and {name}, of shape {tuple(parameter.shape)}, has "
                f"no dimension {dim}: expected one of {list(range(max(parameter.dim(), 1)))}, or "
                '"tensor"'
            )
        found[number] = _WHOLE if dim == "tensor" else Units(dim)
    return found


def warn_of_unclear(
    parameters: Sequence[Tensor],
    names: Sequence[str],
    module: nn.Module | None,
    declared: DeclaredUnits,
) -> bool:
    """Warn of tensors of which nothing says which dimension has the units; say whether there are.

    Args:
        parameters: Whose units.
        names: What they are called.
        module: Has them, if it is known.
        declared: By name pattern.
    """
    known = dict(_of_modules(module)) if module is not None else {}
    unclear = [
        (name, tuple(parameter.shape))
        for name, parameter in zip(names, parameters, strict=True)
        if sum(size > 1 for size in parameter.shape) > 1
        and parameter.dim() > _CLEAR
        and id(parameter) not in known
        and not any(fnmatchcase(name, each) for each in declared)
    ]
    if unclear:
        (name, shape), *others = unclear
        more = f" (and {len(others)} more)" if others else ""
        warn(
            f"{name}, of shape {shape}{more}, has three dimensions or more, and no layer that is "
            "known says which one has its outputs: each index of dimension 0 is a unit. If it has "
            f"other units, as stacked experts have, say so: AGCClip(units={{{name!r}: 2}}), or "
            '"tensor" for a single one; 0 says that this is right.'
        )
    return bool(unclear)


def _of_modules(module: nn.Module) -> Iterator[tuple[int, Units]]:
    """Yield the units of what layers have that say it, by ``id`` of a parameter."""
    for layer in module.modules():
        units = _of_layer(layer)
        if units is not None:
            # What parametrizations compute a weight from has its shape; the weight is not asked
            # for, since it would be computed.
            sources = getattr(layer, "parametrizations", nn.ModuleDict()).values()
            for each in (layer, *sources):
                yield from ((id(one), units) for one in each.parameters(recurse=False))


def _of_layer(layer: nn.Module) -> Units | None:
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):  # of any shape
        return _WHOLE
    if isinstance(layer, _ConvTransposeNd):
        return Units(1, layer.groups)
    return _FIRST if isinstance(layer, _ConvNd | nn.Bilinear) else None
