"""The sum of the squares of many tensors on the CPU together, where nobody asks for that of each.

Small tensors are gathered and converted to float64; larger ones are summed as short rows in their
own precision, and all short rows of all tensors together in float64.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf, isfinite
from operator import itemgetter

import torch
from torch import Tensor

from gradclip.clipping.kernels import blocks, halves
from gradclip.clipping.kernels.tensor_specs import Batch, TensorSpecs

GATHERED = 1 << 15
"""Elements gathered at a time: they stay in a cache, and start no threads."""

GATHERED_IN_LANES = 1 << 17
"""Elements gathered at a time that are summed in lanes, which is worth threads."""

SMALL = 8192
"""Tensors up to this many elements are gathered; twice as many where they take half the bytes."""

WORTH_LANES = 1024
"""Tensors from this many elements on are summed in lanes."""

ALIKE = 4
"""Tensors of one shape that are worth a gathering of their own, which is cheaper for each."""

LANES = 256
"""Elements that are summed in the tensors' own precision before float64 takes over."""

SUMMED = 1 << 27
"""Elements summed in lanes at a time: one sum of each lane is kept."""

LOST_FLOAT32_SQUARE = 2.0**-100
"""Below this mean square, squares that vanished could be 2^-26 of the sum."""


def square_total(batch: Batch) -> float | None:
    """Return the sum of the squares of all elements; None where this way does not find it.

    It does not where something is not finite, where squares left the range of float32, and where
    tensors have gaps, elements are limited, or are others than float32, bfloat16 and float16.
    """
    is_half = batch.dtype in halves.HALVES and halves.can_sum()
    is_plain = batch.limit is None and batch.specs.one_row_each and all(batch.specs.flat)
    if not (is_plain and (is_half or batch.dtype is torch.float32)):
        return None
    plan, lanes = batch.specs.plan(_Gathering), _Lanes(batch.dtype)
    exact = 0.0
    with plan.memory() as (buffer, wide):
        for gathered in plan.small(batch.tensors, buffer):
            exact += _square_sum(wide[: len(gathered)].copy_(gathered))
        for gathered in plan.medium(batch.tensors, buffer):
            lanes.add(gathered)
    for index in plan.large:
        for piece in blocks.pieces(blocks.flat(batch.tensors[index]), SUMMED):
            lanes.add(piece)
    in_lanes = lanes.total()
    return None if in_lanes is None or not isfinite(exact) else exact + in_lanes


class _Lanes:
    """Sums squares by lanes, and those in float64.

    Args:
        dtype: Of the tensors: bfloat16, float16 or float32.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._is_half = dtype in halves.HALVES
        self._width = halves.WIDTHS.get(dtype, LANES)
        self._found: list[Tensor] = []
        self._rests: list[Tensor] = []
        self._total, self._count, self._held = 0.0, 0, 0

    def add(self, flat: Tensor) -> None:
        """Sum a 1-d tensor, which may change after that, but for its last elements."""
        count = flat.numel()
        if rest := count % self._width:
            count -= rest
            self._rests.append(flat[count:].double())
            flat = flat[:count]
        if not count:
            return
        if self._held + count > SUMMED:
            self._bring_together()
        self._held += count
        if self._is_half:
            self._found.append(halves.square_sums(flat, self._width))
        else:
            self._found.append(torch.linalg.vector_norm(flat.view(-1, self._width), dim=1))

    def _bring_together(self) -> None:
        if self._found:
            lanes = self._found[0] if len(self._found) == 1 else torch.cat(self._found)
            if self._is_half:
                self._total += float(lanes.sum(dtype=torch.float64))
            else:
                self._total += float(torch.linalg.vector_norm(lanes, dtype=torch.float64)) ** 2
            self._count += self._held
            self._held, self._found = 0, []

    def total(self) -> float | None:
        """Return the sum; None where it is not right, or not finite."""
        self._bring_together()
        if not self._count * LOST_FLOAT32_SQUARE <= self._total < inf:
            return None
        return self._total + (_square_sum(torch.cat(self._rests)) if self._rests else 0.0)


def _square_sum(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) ** 2


class _Gathering:
    """Which tensors of a specs are gathered: those that can be concatenated as they are."""

    def __init__(self, specs: TensorSpecs) -> None:
        sizes = specs.row_sizes
        top = SMALL * 4 // specs.dtypes[0].itemsize
        small = [n for n, size in enumerate(sizes) if size < WORTH_LANES]
        medium = [n for n, size in enumerate(sizes) if WORTH_LANES <= size <= top]
        self.large = [n for n, size in enumerate(sizes) if size > top]
        self._small = _gatherings(small, specs, GATHERED)
        self._medium = _gatherings(medium, specs, GATHERED_IN_LANES)
        self._dtype = specs.dtypes[0]
        self._most = max((count for _, _, count in self._small), default=0)
        self._largest = max((count for _, _, count in self._medium), default=0)
        self._free: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def memory(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Lend memory for what is gathered at a time, and for the small of that in float64.

        It is kept: to get the pages of new memory takes longer than to fill them.
        """
        try:
            memory = self._free.pop()
        except IndexError:  # the first call, or another thread has it
            largest = max(self._most, self._largest)
            with torch.inference_mode(mode=False):  # it is for calls of any mode
                memory = (
                    torch.empty(largest, dtype=self._dtype, device="cpu"),
                    torch.empty(self._most, dtype=torch.float64, device="cpu"),
                )
        yield memory
        self._free.append(memory)

    def small(self, tensors: Sequence[Tensor], buffer: Tensor) -> Iterator[Tensor]:
        """Yield the small tensors, gathered in a buffer."""
        return _gather(self._small, tensors, buffer)

    def medium(self, tensors: Sequence[Tensor], buffer: Tensor) -> Iterator[Tensor]:
        """Yield those that are worth lanes, gathered in a buffer."""
        return _gather(self._medium, tensors, buffer)


_Taker = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
_Gathered = tuple[_Taker, torch.Size | None, int]
"""What takes tensors, the dimensions of each but the first, or None for any, and all elements."""


def _gather(
    gatherings: Sequence[_Gathered], tensors: Sequence[Tensor], buffer: Tensor
) -> Iterator[Tensor]:
    for take, shape, count in gatherings:
        taken, flat = list(take(tensors)), buffer[:count]
        if shape is None:
            taken = [tensor.reshape(-1) for tensor in taken]
        torch.cat(taken, out=flat.view(-1, *shape) if shape else flat)
        yield flat


def _gatherings(indices: Sequence[int], specs: TensorSpecs, limit: int) -> list[_Gathered]:
    sizes = specs.row_sizes
    alike: dict[torch.Size | None, list[int]] = {}
    for index in indices:
        if sizes[index]:
            shape = specs.shapes[index]
            alike.setdefault(shape[1:] if shape else None, []).append(index)
    mixed = [n for shape, some in alike.items() if not _is_many(shape, some) for n in some]
    groups = [(shape, some) for shape, some in alike.items() if _is_many(shape, some)]
    return [
        (taker(piece), shape, sum(sizes[index] for index in piece))
        for shape, some in [*groups, (None, mixed)]
        for piece in cut(some, sizes, limit)
    ]


def _is_many(shape: torch.Size | None, indices: Sequence[int]) -> bool:
    return shape is not None and (len(indices) >= ALIKE or not shape)


def taker(indices: Sequence[int]) -> _Taker:
    """Return what takes the elements of a sequence at some indices."""
    if len(indices) == 1:
        return lambda rows: (rows[indices[0]],)
    return itemgetter(*indices)


def cut(indices: Sequence[int], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Cut indices so that no piece holds more elements than are gathered at a time."""
    pieces: list[list[int]] = []
    total = 0
    for index in indices:
        total += sizes[index]
        if not pieces or total > limit:
            pieces.append([])
            total = sizes[index]
        pieces[-1].append(index)
    return pieces
