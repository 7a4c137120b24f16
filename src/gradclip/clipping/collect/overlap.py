"""Gradients that share bytes: found before anything is written, and refused."""

from array import array
from collections.abc import Sequence
from itertools import chain, compress
from operator import add, le

import torch
from torch import Tensor

from gradclip.clipping.collect.gradients import Gradients
from gradclip.clipping.kernels.tensor_specs import Batch, TensorSpecs
from gradclip.errors import OverlappingGradientsError


class DisjointCheck:
    """Refuses gradients that share bytes: scaling each once would scale some bytes twice.

    Views that interleave without sharing a byte are legal. Gradients that lie where those of the
    last call lay, in the same shapes, are not looked at again.
    """

    def __init__(self) -> None:
        self._passed: list[tuple[TensorSpecs, list[int]]] = []

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Copy and pickle as one that has seen nothing: copies of gradients lie elsewhere."""
        return DisjointCheck, ()

    def __call__(self, gradients: Sequence[Gradients]) -> None:
        """Look at the gradients of all groups together.

        Raises:
            OverlappingGradientsError: GC021, naming the first two.
        """
        batches = [group.written for group in gradients]
        seen = [(batch.specs, batch.addresses) for batch in batches]
        if seen == self._passed:  # the same specs, and equal addresses
            return
        if not _lie_apart(batches):
            _check_extents(batches, _names(gradients))
        self._passed = seen


def _lie_apart(batches: Sequence[Batch]) -> bool:
    """Return whether it is plain to see that no byte is shared: no gaps, one behind another."""
    if not all(batch.specs.plan(_Bytes).packed for batch in batches):
        return False
    kept = [batch.specs.plan(_Bytes) for batch in batches]
    starts = array("q")
    for batch, of_each in zip(batches, kept, strict=True):
        starts.extend(compress(batch.addresses, of_each.lengths))
    # Some byte is taken twice just where one begins before as many have ended.
    if len(starts) < _MANY:
        lengths = filter(None, chain.from_iterable(of_each.lengths for of_each in kept))
        ends = sorted(map(add, starts, lengths))
        return all(map(le, ends, sorted(starts)[1:]))
    begun = torch.frombuffer(starts, dtype=torch.int64)
    ended = (begun + torch.cat([of_each.taken for of_each in kept])).sort()[0]
    return bool((ended[:-1] <= begun.sort()[0][1:]).all())


_MANY = 256
"""From so many tensors on torch sorts faster than Python."""


class _Bytes:
    """How many bytes each tensor of a specs takes, which has no gaps."""

    def __init__(self, specs: TensorSpecs) -> None:
        self.packed = all(specs.packed)
        self.lengths = [
            shape.numel() * dtype.itemsize
            for shape, dtype in zip(specs.shapes, specs.dtypes, strict=True)
        ]
        self.taken = torch.tensor([length for length in self.lengths if length], dtype=torch.int64)


def _check_extents(batches: Sequence[Batch], names: list[str]) -> None:
    """Look at the very bytes wherever two extents overlap."""
    tensors = [tensor for batch in batches for tensor in batch.tensors]
    for name, tensor in zip(names, tensors, strict=True):
        if not tensor.is_contiguous() and _overlaps_itself(tensor):
            raise _overlap(name, "itself (an expanded tensor, or such strides)")
    extents = sorted((t.data_ptr(), _span(t), i) for i, t in enumerate(tensors) if t.numel())
    _check_interleaved(extents, names, tensors)


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
