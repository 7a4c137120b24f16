"""A list of tensors as the kernels get it, and what of it stays from step to step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from itertools import accumulate, chain, repeat
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradclip.clipping.kernels.blocks import representable
from gradclip.clipping.kernels.places import Lengths, Places, Runs
from gradclip.clipping.kernels.tables import Table

_Guards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)  # noqa: SLF001
"""Compares types, devices, sizes and strides of thousands of tensors in one call."""

_Plan = TypeVar("_Plan")


@dataclass(eq=False)
class TensorSpecs:
    """Devices, dtypes and shapes of some tensors, and what was worked out from them.

    It holds no tensor: it outlives the step, and keeps no gradient alive.

    Args:
        shapes: One per tensor.
        dtypes: One per tensor.
        devices: One per tensor.
        dense: Whether each is strided, without a pending sign.
        packed: Whether each fills the memory from its first element to its last, in any order of
            dimensions, and no element twice.
        flat: Whether each row of a tensor is one stretch of memory behind the last.
        plain: Whether each is a tensor of torch's own type, and has no graph.
        rows: Rows of each tensor: 1, or its leading dimension.
    """

    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    devices: list[torch.device]
    dense: list[bool]
    packed: list[bool]
    flat: list[bool]
    plain: list[bool]
    rows: list[int]
    _plans: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, tensors: Sequence[Tensor], rows: Sequence[int] | None = None) -> "TensorSpecs":
        """Describe tensors.

        Args:
            tensors: Of any kind.
            rows: Rows of each; 1 where they are not given.
        """
        counts = [1] * len(tensors) if rows is None else list(rows)
        packed = list(map(_is_packed, tensors))
        return cls(
            shapes=[tensor.shape for tensor in tensors],
            dtypes=[tensor.dtype for tensor in tensors],
            devices=[tensor.device for tensor in tensors],
            dense=[t.layout is torch.strided and not t.is_neg() for t in tensors],
            packed=packed,
            flat=[
                fills and (n == 1 or tensor.is_contiguous())
                for tensor, n, fills in zip(tensors, counts, packed, strict=True)
            ],
            plain=[type(t) is Tensor and not t.requires_grad for t in tensors],
            rows=counts,
        )

    @classmethod
    def joined(cls, parts: Sequence["TensorSpecs"]) -> "TensorSpecs":
        """Describe the tensors of several specs, one after the other."""
        lists: dict[str, Any] = {
            name: [value for part in parts for value in getattr(part, name)] for name in _lists()
        }
        return cls(**lists)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without what was worked out: compiled programs, and memory."""
        return {**vars(self), "_plans": {}}

    def __len__(self) -> int:
        return len(self.shapes)

    def plan(self, kind: Callable[["TensorSpecs"], _Plan]) -> _Plan:
        """Return what ``kind`` makes of this specs: made once, and kept with it."""
        if kind not in self._plans:
            self._plans[kind] = kind(self)
        plan: _Plan = self._plans[kind]
        return plan

    @cached_property
    def one_row_each(self) -> bool:
        """Whether every tensor is one row."""
        return all(n == 1 for n in self.rows)

    @cached_property
    def row_sizes(self) -> list[int]:
        """Elements of each row, one tensor after the other: (R,)."""
        each = zip(self.shapes, self.rows, strict=True)
        return list(chain.from_iterable(repeat(s.numel() // max(n, 1), n) for s, n in each))

    @cached_property
    def parts(self) -> list["Part"]:
        """The parts that kernels see: each of one device, one dtype, and flat or not."""
        kinds: dict[tuple[object, ...], list[int]] = {}
        for index, kind in enumerate(zip(self.devices, self.dtypes, self.flat, strict=True)):
            kinds.setdefault(kind, []).append(index)
        if len(kinds) <= 1:
            return [Part(self, None, None) for _ in kinds]
        return [
            Part(
                self.chosen(chosen),
                chosen,
                Table.of(self._rows_of(chosen)),
            )
            for chosen in kinds.values()
        ]

    @cached_property
    def row_order(self) -> Table:
        """Where each row is, (R,), among the rows of all parts one after the other."""
        rows = [row for part in self.parts for row in self._rows_of(part.indices or [])]
        return Table(torch.tensor(rows, dtype=torch.int64, device="cpu").argsort())

    def _rows_of(self, indices: list[int]) -> list[int]:
        ends = list(accumulate(self.rows))
        return [row for i in indices for row in range(ends[i] - self.rows[i], ends[i])]

    def chosen(self, indices: list[int]) -> "TensorSpecs":
        """Describe some of the tensors."""
        lists: dict[str, Any] = {
            name: [getattr(self, name)[index] for index in indices] for name in _lists()
        }
        return TensorSpecs(**lists)


def _lists() -> list[str]:
    """Return the names of what a specs has for each tensor."""
    return [each.name for each in fields(TensorSpecs) if each.name != "_plans"]


@dataclass(frozen=True, eq=False)
class Part:
    """The tensors of a specs that are on one device and of one dtype.

    Args:
        specs: Of these alone.
        indices: Which they are; None for all.
        rows: Which rows are theirs, (R',); None for all.
    """

    specs: TensorSpecs
    indices: list[int] | None
    rows: Table | None


@dataclass(eq=False)
class Batch:
    """Tensors at one step, with their specs.

    Args:
        tensors: The tensors.
        specs: Theirs.
        limit: Elements count as if they were clamped to [-limit, limit]; None for as they are.
        together: Whether nobody asks for what is found of each row: kernels may give what several
            rows come to together in place of that, in any order.
    """

    tensors: Sequence[Tensor]
    specs: TensorSpecs
    limit: float | Tensor | None = None
    together: bool = False

    @classmethod
    def of(cls, tensors: Sequence[Tensor], rows: Sequence[int] | None = None) -> "Batch":
        """Describe tensors that will not come again."""
        return cls(tensors, TensorSpecs.of(tensors, rows))

    def limited(self, limit: float | Tensor) -> "Batch":
        """Return the same tensors, whose elements count as if they were clamped."""
        return Batch(self.tensors, self.specs, limit)

    def joined(self) -> "Batch":
        """Return the same elements in as few tensors as possible, for what is asked of all.

        Tensors that lie behind one another in one storage become one.
        """
        found = self.specs.plan(Runs).join(self)
        tensors, specs = (self.tensors, self.specs) if found is None else found
        return Batch(tensors, specs, self.limit, together=True)

    @cached_property
    def top(self) -> float | Tensor | None:
        """The limit as the dtype has it, for a batch that a kernel gets."""
        if self.limit is None:
            return None
        limit = self.limit.to(self.device) if isinstance(self.limit, Tensor) else self.limit
        return representable(limit, self.dtype)

    @cached_property
    def addresses(self) -> list[int]:
        """Of the first element of each tensor."""
        return list(map(Tensor.data_ptr, self.tensors))

    @cached_property
    def places(self) -> Places:
        """Where the tensors lie that have elements; there are no gaps in any."""
        lengths = self.specs.plan(Lengths)
        return Places(lengths.starts(self.addresses), lengths.taken)

    @property
    def device(self) -> torch.device:
        """The device of all, for a batch that a kernel gets."""
        return self.specs.devices[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all, for a batch that a kernel gets."""
        return self.specs.dtypes[0]

    @property
    def parts(self) -> list[tuple["Batch", Table | None]]:
        """The part on each device and of each dtype, and which rows it has; None for all."""
        # A batch that kept itself would keep the gradients of a step until cycles are collected.
        whole = all(part.indices is None for part in self.specs.parts)
        return [(self, None) for _ in self.specs.parts] if whole else self._several

    @cached_property
    def _several(self) -> list[tuple["Batch", Table | None]]:
        return [
            (
                Batch(
                    [self.tensors[index] for index in part.indices or ()],
                    part.specs,
                    self.limit,
                    self.together,
                ),
                part.rows,
            )
            for part in self.specs.parts
        ]


class SpecsCache:
    """Recognises tensors like those of the last calls, so that nothing is worked out twice.

    Args:
        capacity: Layouts that are kept.
    """

    def __init__(self, *, capacity: int = 4) -> None:
        self._capacity = capacity
        self._known: tuple[tuple[int, Callable[..., bool], TensorSpecs], ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as one that knows nothing yet."""
        return partial(SpecsCache, capacity=self._capacity), ()

    def find(self, tensors: Sequence[Tensor]) -> TensorSpecs | None:
        """Return the specs of earlier tensors of the same types, devices, shapes and strides."""
        for position, (count, fit, specs) in enumerate(self._known):
            if count == len(tensors) and fit(*tensors):
                if position:
                    self._keep(fit, specs)
                return specs
        return None

    def add(self, tensors: Sequence[Tensor], rows: Sequence[int] | None = None) -> TensorSpecs:
        """Describe tensors that were not found, and recognise them from now on.

        Args:
            tensors: Of any kind.
            rows: Rows of each; 1 where they are not given.
        """
        specs = TensorSpecs.of(tensors, rows)
        self._keep(_fitting(tensors), specs)
        return specs

    def batch(self, tensors: Sequence[Tensor], rows: Sequence[int] | None = None) -> Batch:
        """Return tensors with their specs, found or made."""
        specs = self.find(tensors)
        return Batch(tensors, self.add(tensors, rows) if specs is None else specs)

    def _keep(self, fit: Callable[..., bool], specs: TensorSpecs) -> None:
        others = [known for known in self._known if known[-1] is not specs]
        self._known = ((len(specs), fit, specs), *others[: self._capacity - 1])


def _is_packed(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided:
        return False
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _fitting(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Return what compares other tensors, as many, with these; it holds none of them."""
    if _Guards is None:
        return partial(_all_match, list(map(_fact, tensors)))
    guards = _Guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    check: Callable[..., bool] = guards.check
    return check


def _all_match(facts: Sequence[tuple[object, ...]], *tensors: Tensor | None) -> bool:
    return all(map(_matches, facts, tensors))


def _matches(fact: tuple[object, ...], tensor: Tensor | None) -> bool:
    return tensor is not None and fact == _fact(tensor)


def _fact(tensor: Tensor) -> tuple[object, ...]:
    strides = tensor.stride() if tensor.layout is torch.strided else None
    signs = tensor.is_conj(), tensor.is_neg(), tensor.requires_grad and torch.is_grad_enabled()
    return type(tensor), tensor.dtype, tensor.device, tensor.layout, tensor.shape, strides, signs
