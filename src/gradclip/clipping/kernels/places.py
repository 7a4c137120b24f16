"""Where tensors lie in memory: which share bytes, and which lie behind one another as one run.

FSDP2 and DDP leave the gradients of a step as views of a few buffers, one behind another. What is
asked of all of them together is asked of a run: it is read by one operation, and not by thousands.
"""

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gradclip.clipping.kernels.tensor_specs import Batch, TensorSpecs


class Lengths:
    """How many bytes each tensor of a specs takes, of those that have elements and no gaps."""

    def __init__(self, specs: "TensorSpecs") -> None:
        pairs = zip(specs.shapes, specs.dtypes, strict=True)
        lengths = [shape.numel() * dtype.itemsize for shape, dtype in pairs]
        filled = [number for number, length in enumerate(lengths) if length]
        self.taken = _numbers([lengths[number] for number in filled])
        self.filled = None if len(filled) == len(lengths) else _numbers(filled)

    def starts(self, addresses: Sequence[int]) -> Tensor:
        """Return where those begin, of the addresses of all."""
        every = _numbers(addresses)
        return every if self.filled is None else every[self.filled]


class Places:
    """Tensors in the order of memory.

    Args:
        starts: Where each begins.
        taken: How many bytes it takes, from there on: at least one.
    """

    def __init__(self, starts: Tensor, taken: Tensor) -> None:
        begun, self.order = starts.sort()
        self.gaps = begun[1:] - (begun + taken[self.order])[:-1]
        """Bytes between each and the next one; below 0 just where some are shared."""

    @property
    def are_apart(self) -> bool:
        """Whether no byte is shared."""
        return min(self.gaps.tolist(), default=0) >= 0


class _Known(NamedTuple):
    """What was found in a layout.

    Args:
        addresses: Of the tensors that had it last.
        order: In which they lie.
        adjacent: Which of them the next one follows without a gap.
        spans: The first tensor of each run, and how many elements it has; none without runs.
        specs: Those of the runs.
    """

    addresses: list[int]
    order: Tensor
    adjacent: Tensor
    spans: list[tuple[int, int]]
    specs: "TensorSpecs | None"


class Runs:
    """Which tensors of a specs are one run of memory, found once for a layout.

    A run is a stretch of memory in which every byte belongs to a view of one tensor. What is
    written to it, all of them count as a change.
    """

    def __init__(self, specs: "TensorSpecs") -> None:
        self._fit = specs.one_row_each and all(specs.flat) and all(specs.dense) and all(specs.plain)
        self._kinds = list(zip(specs.devices, specs.dtypes, strict=True))
        self._elements = [shape.numel() for shape in specs.shapes]
        self._filled = specs.plan(Lengths).filled
        self._known: _Known | None = None

    def join(self, batch: "Batch") -> "tuple[list[Tensor], TensorSpecs] | None":
        """Return the memory of a batch as fewer tensors; None where no two are adjacent."""
        if not self._fit:
            return None
        known = self._known  # taken and replaced as one: threads may share it
        if known is None or known.addresses != batch.addresses:
            order, adjacent = batch.places.order, batch.places.gaps == 0
            if known and torch.equal(known.order, order) and torch.equal(known.adjacent, adjacent):
                known = known._replace(addresses=batch.addresses)
            else:
                spans = self._spans(batch.tensors, order, adjacent)
                known = _Known(batch.addresses, order, adjacent, spans, None)
        views = self._views(batch.tensors, known.spans) if known.spans else None
        if views is not None and known.specs is None:
            known = known._replace(specs=type(batch.specs).of(views))
        self._known = known
        return None if views is None or known.specs is None else (views, known.specs)

    def _spans(
        self, tensors: Sequence[Tensor], order: Tensor, adjacent: Tensor
    ) -> list[tuple[int, int]]:
        follow = adjacent.tolist()
        if not any(follow):
            return []
        numbers = (order if self._filled is None else self._filled[order]).tolist()
        spans: list[tuple[int, int]] = []
        last: tuple[object, ...] = ()
        for number, follows in zip(numbers, [False, *follow], strict=True):
            base = tensors[number]._base  # noqa: SLF001 - views of one tensor count changes together
            kind = self._kinds[number], None if base is None else id(base)
            if follows and base is not None and kind == last:
                first, count = spans.pop()
                spans.append((first, count + self._elements[number]))
            else:
                spans.append((number, self._elements[number]))
            last = kind
        return spans

    def _views(
        self, tensors: Sequence[Tensor], spans: Sequence[tuple[int, int]]
    ) -> list[Tensor] | None:
        views = []
        for first, count in spans:
            tensor = tensors[first]
            if count != self._elements[first]:
                offset = tensor.storage_offset()
                # Tensors that lie so at a later step may be of several storages.
                if (offset + count) * tensor.element_size() > tensor.untyped_storage().nbytes():
                    return None
                tensor = tensor.as_strided((count,), (1,), offset)
            views.append(tensor)
        return views


def _numbers(values: Sequence[int]) -> Tensor:
    if not values:
        return torch.zeros(0, dtype=torch.int64, device="cpu")
    # An array takes a list of Python's integers several times as fast as a tensor does.
    return torch.frombuffer(array("q", values), dtype=torch.int64)
