"""The norm of each gradient: measured where it is, and brought to the host many at once."""

from collections import defaultdict
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor, nn

__all__ = ["copies_of", "host_numbers", "local", "norms_of"]

_PLAIN = (Tensor, nn.Parameter)
_kind_of = attrgetter("device", "dtype", "layout")


def local(tensor: Tensor) -> Tensor | None:
    """Return what this rank has of a tensor; None for a kind that has no norm we could take."""
    if type(tensor) in _PLAIN:
        return tensor
    part = getattr(tensor, "_local_tensor", None)
    return part if type(part) in _PLAIN else None


def copies_of(tensor: Tensor, processes: int, *, is_part: bool) -> int:
    """Return on how many ranks the same part of a tensor is.

    Args:
        tensor: A parameter.
        processes: How many ranks there are. A plain tensor is taken for a copy of what they have.
        is_part: Whether it is known to be a part.
    """
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return 1 if is_part else processes
    sizes = getattr(tensor, "device_mesh").shape  # noqa: B009 - tensors have none, DTensors do
    copies = 1
    for size, placement in zip(sizes, placements, strict=True):
        copies *= size if placement.is_replicate() else 1
    return copies


def _are_of_one_kind(tensors: Sequence[Tensor]) -> bool:
    """Return whether tensors are plain, dense, on one device, and of one type of numbers."""
    return set(map(type, tensors)) <= {Tensor} and (
        len(kinds := set(map(_kind_of, tensors))) == 1 and next(iter(kinds))[2] is torch.strided
    )


@torch.no_grad()
def norms_of(parameters: Sequence[Tensor], order: float) -> tuple[tuple[int, ...], Tensor]:
    """Measure gradients, each part on its rank; nothing is asked of another one.

    Args:
        parameters: Of which each has a gradient.
        order: p of the norm.

    Returns:
        The ids of those that have a norm, and the norms (T,).
    """
    gradients: list[Tensor] = [each.grad for each in parameters]  # type: ignore[misc]
    if _are_of_one_kind(gradients):
        found = torch.stack(_norms(gradients, gradients[0].dtype, order))
        return tuple(map(id, parameters)), found
    ids: list[int] = []
    kinds: defaultdict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]]
    kinds = defaultdict(list)
    for parameter, whole in zip(parameters, gradients, strict=True):
        gradient = local(whole)
        if gradient is None or not gradient.numel():
            continue
        if gradient.layout is not torch.strided:
            gradient = gradient.coalesce().values()
        kinds[gradient.device, gradient.dtype].append((len(ids), gradient))
        ids.append(id(parameter))
    norms = [torch.empty((), device="cpu")] * len(ids)
    for (_, dtype), numbered in kinds.items():
        some = _norms([gradient for _, gradient in numbered], dtype, order)
        for (at, _), norm in zip(numbered, some, strict=True):
            norms[at] = norm
    if len(kinds) > 1:
        device = norms[0].device
        norms = [norm.to(device, torch.float64) for norm in norms]
    return tuple(ids), torch.stack(norms) if norms else torch.empty(0, device="cpu")


def _norms(gradients: list[Tensor], dtype: torch.dtype, order: float) -> list[Tensor]:
    if dtype.is_complex or not dtype.is_floating_point:
        real = [torch.view_as_real(g) if dtype.is_complex else g.float() for g in gradients]
        return [torch.linalg.vector_norm(each, order, dtype=torch.float32) for each in real]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return list(torch._foreach_norm(gradients, order, dtype=wide))  # noqa: SLF001 - no public name


@torch.no_grad()
def host_numbers(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Bring numbers to the host, those of a device together: float64, each (n,)."""
    by_device: defaultdict[torch.device, list[int]] = defaultdict(list)
    for at, tensor in enumerate(tensors):
        by_device[tensor.device].append(at)
    found = list(tensors)
    for device, places in by_device.items():
        wide = torch.float32 if device.type == "mps" else torch.float64
        flat = [tensors[at].detach().reshape(-1).to(wide) for at in places]
        joined = torch.cat(flat).to("cpu").to(torch.float64)
        sizes = [each.numel() for each in flat]
        for at, part in zip(places, joined.split(sizes), strict=True):
            found[at] = part
    return found
