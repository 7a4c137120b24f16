"""Gradients that share bytes: found before anything is written, and refused."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradclip.clipping.gradients import Gradients
from gradclip.errors import OverlappingGradientsError


def check_disjoint(gradients: Sequence[Gradients]) -> None:
    """Refuse gradients that share bytes: scaling each once would scale some bytes twice.

    Views that interleave without sharing a byte are legal.

    Raises:
        OverlappingGradientsError: GC021, naming the first two.
    """
    tensors = [tensor for group in gradients for tensor in group.written]
    extents = []
    for index, tensor in enumerate(tensors):
        contiguous = tensor.is_contiguous()
        if not contiguous and _overlaps_itself(tensor):
            raise _overlap(_names(gradients)[index], "itself (an expanded tensor, or such strides)")
        extents.append((tensor.data_ptr(), tensor.nbytes if contiguous else _span(tensor), index))
    extents.sort()
    end = 0
    for start, length, _ in extents:
        if start < end and length:
            _check_interleaved([e for e in extents if e[1]], _names(gradients), tensors)
            return
        end = start + length


def _names(gradients: Sequence[Gradients]) -> list[str]:
    return [name for group in gradients for name in group.names]


def _span(tensor: Tensor) -> int:
    """Return the bytes from a tensor's first element to its last."""
    if tensor.numel() == 0:
        return 0
    elements = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return elements * tensor.element_size()


def _check_interleaved(
    extents: list[tuple[int, int, int]], names: list[str], tensors: list[Tensor]
) -> None:
    """Look at the very bytes of each run of gradients whose extents overlap."""
    run: list[tuple[int, int, int]] = []
    for extent in [*extents, (1 << 63, 0, -1)]:
        if run and extent[0] >= max(start + length for start, length, _ in run):
            if len(run) > 1:
                _check_bytes(run, names, tensors)
            run = []
        run.append(extent)


def _check_bytes(run: list[tuple[int, int, int]], names: list[str], tensors: list[Tensor]) -> None:
    base, end = run[0][0], max(start + length for start, length, _ in run)
    owner = torch.full((end - base,), -1, dtype=torch.int32)
    for start, _, index in run:
        tensor = tensors[index]
        size = tensor.element_size()
        strides = [stride * size for stride in tensor.stride()]
        place = owner.as_strided((*tensor.shape, size), (*strides, 1), start - base)
        taken = int(place.max())
        if taken >= 0:
            raise _overlap(names[index], names[taken])
        place.fill_(index)


def _overlaps_itself(tensor: Tensor) -> bool:
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride <= reach:
            return stride == 0 or _has_shared_bytes(tensor)
        reach += stride * (size - 1)
    return False


def _has_shared_bytes(tensor: Tensor) -> bool:
    taken = torch.zeros(_span(tensor) // tensor.element_size(), dtype=torch.bool)
    taken.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return int(taken.sum()) < tensor.numel()


def _overlap(name: str, other: str) -> OverlappingGradientsError:
    return OverlappingGradientsError(
        f"the gradient of {name} shares memory with {other}, so scaling each gradient once would "
        "scale some elements twice. Clone one of them. No gradient was changed."
    )
