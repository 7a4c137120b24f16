"""Gradients that share bytes: found before anything is written, and refused."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import add, le

import torch
from torch import Tensor

from gradclip.clipping.collect.gradients import Gradients
from gradclip.clipping.kernels.places import Lengths, Places
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

    def __call__(
        self, gradients: Sequence[Gradients], left_alone: Sequence[Gradients] = ()
    ) -> None:
        """Look at the gradients of all groups together.

        Args:
            gradients: Those that a policy bounds.
            left_alone: Those that none does: scaling another one must not scale them. What they
                share among themselves does not matter.

        Raises:
            OverlappingGradientsError: GC021, naming the first two.
        """
        batches = [group.stored for group in (*gradients, *left_alone)]
        seen = [(batch.specs, batch.addresses) for batch in batches]
        if seen == self._passed:  # the same specs, and equal addresses
            return
        if not _lie_apart(batches):
            count = sum(len(group.tensors) for group in gradients)
            _check_extents(batches, _names((*gradients, *left_alone)), count)
        self._passed = seen


def _lie_apart(batches: Sequence[Batch]) -> bool:
    """Return whether it is plain to see that no byte is shared: no gaps, one behind another."""
    if not all(batch.specs.plan(Bytes).packed for batch in batches):
        return False
    if len(batches) == 1:
        return batches[0].places.are_apart
    each = [(batch.specs.plan(Lengths), batch.addresses) for batch in batches]
    starts = torch.cat([lengths.starts(addresses) for lengths, addresses in each])
    return Places(starts, torch.cat([lengths.taken for lengths, _ in each])).are_apart


class Bytes:
    """How many bytes each tensor of a specs takes, which has no gaps."""

    def __init__(self, specs: TensorSpecs) -> None:
        self.packed = all(specs.packed)
        self.lengths = [
            shape.numel() * dtype.itemsize
            for shape, dtype in zip(specs.shapes, specs.dtypes, strict=True)
        ]
        self._apart: list[int] | None = None

    def lie_apart(self, addresses: list[int]) -> bool:
        """Return whether it is plain to see that none is shared: one tensor behind another.

        Args:
            addresses: Where each tensor begins; all have elements, and no gaps.
        """
        if addresses != self._apart:
            ends = sorted(map(add, addresses, self.lengths))
            if not all(map(le, ends, sorted(addresses)[1:])):
                return False
            self._apart = addresses
        return True


@dataclass(frozen=True)
class _Extent:
    """Where a tensor lies: from its first byte to behind its last."""

    start: int
    end: int
    number: int
    tensor: Tensor


def _check_extents(batches: Sequence[Batch], names: list[str], bounded: int) -> None:
    """Look at the very bytes wherever two extents overlap.

    Args:
        batches: All gradients.
        names: Of each.
        bounded: How many, from the first on, a policy bounds.
    """
    tensors = [tensor for batch in batches for tensor in batch.tensors]
    for name, tensor in zip(names, tensors[:bounded], strict=False):
        if not tensor.is_contiguous() and _overlaps_itself(tensor):
            raise _overlap(
                f"the gradient of {name} shares memory with itself (an expanded tensor, or such "
                "strides), so scaling it once would scale some elements twice"
            )
    extents = sorted(
        (_extent(number, tensor) for number, tensor in enumerate(tensors) if tensor.numel()),
        key=lambda extent: (extent.start, extent.end),
    )
    run: list[_Extent] = []
    end = 0
    for extent in extents:
        if extent.start >= end:
            _check_run(run, names, bounded)
            run = []
        run.append(extent)
        end = max(end, extent.end)
    _check_run(run, names, bounded)


def _names(gradients: Sequence[Gradients]) -> list[str]:
    return [name for group in gradients for name in group.names]


def _extent(number: int, tensor: Tensor) -> _Extent:
    start = tensor.data_ptr()
    return _Extent(start, start + _span(tensor), number, tensor)


def _span(tensor: Tensor) -> int:
    """Return the bytes from a tensor's first element to its last."""
    if tensor.numel() == 0:
        return 0
    elements = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return elements * tensor.element_size()


_WINDOW = 1 << 18
"""Bytes that are looked at at a time: a number of 32 bits is kept for each."""


def _check_run(run: list[_Extent], names: list[str], bounded: int) -> None:
    """Look at the very bytes of gradients whose extents overlap, window by window."""
    if len(run) < 2 or all(extent.number >= bounded for extent in run):  # noqa: PLR2004 - a pair
        return
    # Those that are left alone come last, and leave no trace for each other.
    slices = [
        _Slices(extent.number, part)
        for extent in sorted(run, key=lambda extent: extent.number >= bounded)
        for part in _in_small_slices(extent.tensor)
    ]
    reach = max(each.length for each in slices)
    owner = torch.empty(_WINDOW + 2 * reach, dtype=torch.int32, device="cpu")
    for start in range(run[0].start, max(extent.end for extent in run), _WINDOW):
        owner.fill_(-1)
        for each in slices:
            place = each.place_in(owner, start, start + _WINDOW, reach)
            if place is None:
                continue
            taken = int(place.max())
            if taken >= 0:
                raise _overlap(
                    f"the gradient of {names[each.number]} shares memory with {names[taken]}, so "
                    "what scales one of them scales the other too"
                )
            if each.number < bounded:
                place.fill_(each.number)


def _in_small_slices(tensor: Tensor) -> Iterator[Tensor]:
    """Yield views of a tensor whose first dimension has the largest stride, and small slices."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:  # the same bytes again
            tensor = tensor.narrow(dim, 0, 1)
    strides = tensor.stride()
    ordered = tensor.permute(sorted(range(tensor.dim()), key=lambda d: -strides[d]))
    if ordered.dim() and _span(ordered[0]) > _WINDOW:
        for part in ordered.unbind():
            yield from _in_small_slices(part)
    else:
        yield ordered


class _Slices:
    """The slices of a tensor in its first dimension.

    Args:
        number: Which gradient it is of.
        tensor: At least one element.
    """

    def __init__(self, number: int, tensor: Tensor) -> None:
        if not tensor.dim():
            tensor = tensor.unsqueeze(0)
        self.number = number
        self.length = _span(tensor[0])
        self._count, self._start = tensor.shape[0], tensor.data_ptr()
        size = tensor.element_size()
        self._step = max(tensor.stride(0) * size, 1)
        self._sizes = (*tensor.shape[1:], size)
        self._strides = (*(stride * size for stride in tensor.stride()), 1)

    def place_in(self, owner: Tensor, start: int, end: int, reach: int) -> Tensor | None:
        """Return the numbers of the bytes of those slices that have one in a window.

        Args:
            owner: A number for each byte from ``start - reach`` on.
            start: The first byte of the window.
            end: Behind its last.
            reach: Bytes of the longest slice.
        """
        first = max(0, (start - self.length - self._start) // self._step + 1)
        last = min(self._count, (end - 1 - self._start) // self._step + 1)
        if first >= last:
            return None
        offset = self._start + first * self._step - start + reach
        return owner.as_strided((last - first, *self._sizes), self._strides, offset)


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
    taken = torch.zeros(_span(tensor) // tensor.element_size(), dtype=torch.bool, device="cpu")
    taken.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return int(taken.sum()) < tensor.numel()


def _overlap(fact: str) -> OverlappingGradientsError:
    return OverlappingGradientsError(f"{fact}. Clone one of them. No gradient was changed.")
