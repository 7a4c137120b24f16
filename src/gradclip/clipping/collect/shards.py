"""DTensor gradients: their local parts, and those that arrive with other placements."""

from collections.abc import Callable, Sequence
from itertools import repeat
from operator import attrgetter, is_, is_not
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradclip.errors import UnsupportedGradientError

Placements: TypeAlias = tuple[Any, ...]


def local_part(tensor: Tensor) -> Tensor:
    """Return what of a tensor is on this process."""
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


class MisplacedGradientError(UnsupportedGradientError):
    """A gradient is placed otherwise than its parameter, and no rank expected that."""


_SPEC, _LOCAL = attrgetter("_spec"), attrgetter("_local_tensor")
_MESH, _PLACEMENTS = attrgetter("mesh"), attrgetter("placements")


class Shards:
    """Takes the local parts of gradients, and sees to it that they are those of the parameters.

    Args:
        parameters: Of one group; some are DTensors.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._specs = [getattr(parameter, "_spec", None) for parameter in parameters]
        self._all_distributed = all(spec is not None for spec in self._specs)
        self._passed: list[Any] = self._specs
        self._every = self._all_distributed
        self._recurred = True

    def local(
        self, found: Sequence[Tensor | None], names: Callable[[], Sequence[str]]
    ) -> list[Any]:
        """Return the local part of each gradient that there is.

        Args:
            found: The gradient of each parameter.
            names: Gives what they are called.

        Raises:
            UnsupportedGradientError: GC020, for one that is placed otherwise than its parameter.
        """
        try:
            specs = list(map(_SPEC, found))
        except AttributeError:  # one is None, or plain
            specs = [getattr(gradient, "_spec", None) for gradient in found]
        if len(specs) != len(self._passed) or not all(map(is_, specs, self._passed)):
            self._every = all(map(is_not, specs, repeat(None)))
            if not (self._every and self._placed_like_parameters(specs)):
                for number in misplaced(self._parameters, found):
                    raise _misplaced(names()[number], self._specs[number], specs[number])
            # Specifications that are new at every step are not kept: to free them costs more.
            self._passed = specs if self._recurred else []
            self._recurred = False
        else:
            self._recurred = True
        if self._every:
            return list(map(_LOCAL, found))
        return [
            gradient if spec is None else gradient._local_tensor  # type: ignore[union-attr]  # noqa: SLF001
            for gradient, spec in zip(found, specs, strict=True)
        ]

    def _placed_like_parameters(self, specs: list[Any]) -> bool:
        """Return whether specifications are plain to see the same, which most are."""
        if not self._all_distributed:
            return False
        meshes = map(is_, map(_MESH, specs), map(_MESH, self._specs))
        return all(meshes) and list(map(_PLACEMENTS, specs)) == list(map(_PLACEMENTS, self._specs))


def misplaced(parameters: Sequence[Tensor], found: Sequence[Tensor | None]) -> list[int]:
    """Return which gradients are placed otherwise than their parameters."""
    try:
        specs = list(map(_SPEC, found))
        if all(map(is_, specs, map(_SPEC, parameters))):
            return []
    except AttributeError:  # one is None, or plain
        pass
    wrong = []
    for number, (parameter, gradient) in enumerate(zip(parameters, found, strict=True)):
        if gradient is None:
            continue
        expected, spec = getattr(parameter, "_spec", None), getattr(gradient, "_spec", None)
        if expected is spec:
            continue
        if expected is None or spec is None or not _same(expected, spec):
            wrong.append(number)
    return wrong


def _same(expected: Any, spec: Any) -> bool:
    return _is_on(spec, expected.mesh, expected.placements)


def _is_on(spec: Any, mesh: Any, placements: Placements) -> bool:
    same_mesh = spec.mesh is mesh or spec.mesh == mesh
    return bool(same_mesh and tuple(spec.placements) == tuple(placements))


def _misplaced(name: str, expected: Any, spec: Any) -> MisplacedGradientError:
    return MisplacedGradientError(
        f"the gradient of {name} is {_said(spec)}, and its parameter {_said(expected)}: one cannot "
        "be brought to the placements of the other. No gradient was changed."
    )


def _said(spec: Any) -> str:
    return "a plain tensor" if spec is None else f"placed as {tuple(spec.placements)}"


def reduced(tensor: Tensor) -> Tensor:
    """Return a DTensor whose ranks hold summands as one whose ranks hold the sum."""
    spec: Any = getattr(tensor, "_spec", None)
    if spec is None or not any(placement.is_partial() for placement in spec.placements):
        return tensor
    from torch.distributed.tensor import Replicate  # noqa: PLC0415 - slow, and only for such tensors

    whole = [Replicate() if each.is_partial() else each for each in spec.placements]
    done: Tensor = tensor.redistribute(spec.mesh, whole)  # type: ignore[attr-defined]
    return done


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor, or all of a DTensor; every rank of its mesh takes part."""
    if not hasattr(tensor, "_spec"):
        return tensor
    gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


def place(parameter: Tensor, placements: Placements) -> None:
    """Bring a gradient to the placements of its parameter; every rank of the mesh takes part.

    Args:
        parameter: A DTensor. Where it has no gradient, or one that is placed like the parameter
            already, zeros take part. So they do for one that is placed in a third way, is plain or
            on another mesh: it is refused later, for a rank that raised here would leave the
            others waiting.
        placements: Those that its gradient has on the ranks that have another one.
    """
    spec: Any = parameter._spec  # type: ignore[attr-defined]  # noqa: SLF001
    gradient: Any = parameter.grad
    of_gradient: Any = getattr(gradient, "_spec", None)
    is_so = of_gradient is not None and _is_on(of_gradient, spec.mesh, placements)
    offered = gradient if is_so else _zeros(parameter, spec, placements)
    there = offered.redistribute(spec.mesh, spec.placements)
    # Where no rank had one, there is none.
    if is_so or (gradient is None and not _is_plainly_zero(there)):
        parameter.grad = there


def _zeros(parameter: Tensor, spec: Any, placements: Placements) -> Any:
    """Return a DTensor of zeros in the shape of a parameter."""
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - slow, and only for such gradients

    shape = list(parameter.shape)
    for mesh_dim, placement in enumerate(placements):
        if placement.is_shard():
            size, number = spec.mesh.size(mesh_dim), spec.mesh.get_local_rank(mesh_dim)
            rest = torch.empty(shape[placement.dim], device="meta").chunk(size)
            shape[placement.dim] = rest[number].numel() if number < len(rest) else 0
    local = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
    return DTensor.from_local(
        local,
        spec.mesh,
        placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _is_plainly_zero(tensor: Any) -> bool:
    local = tensor.to_local()
    return local.device.type == "cpu" and not bool(local.any())


def global_offset(tensor: Tensor, dim: int) -> int:
    """Return where the part on this process begins in a dimension of the whole tensor."""
    spec: Any = getattr(tensor, "_spec", None)
    if spec is None:
        return 0
    from torch.distributed.tensor._utils import (  # noqa: PLC0415 - torch has no other name for it
        compute_local_shape_and_global_offset,
    )

    _, offset = compute_local_shape_and_global_offset(tensor.shape, spec.mesh, spec.placements)
    return int(offset[dim])
