"""A clip by norm in three launches: sums of chunks, the decision, and the scaling.

With ``triton.py`` it shares plans and programs, but not the order of launches: nothing is asked of
the host, or of torch, between two of them.
"""

from collections import defaultdict
from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from gradclip.clipping.kernels import triton_decide, triton_plan, triton_programs
from gradclip.clipping.kernels.blocks import representable
from gradclip.clipping.kernels.device import is_capturing, stream_of
from gradclip.clipping.kernels.fused import COLUMNS, FusedStep, Layout, Report
from gradclip.clipping.kernels.tables import Addresses, Table, keep_for_replays
from gradclip.clipping.kernels.tensor_specs import TensorSpecs
from gradclip.clipping.kernels.triton_launch import Launcher, current

_CALLS = 64
"""Calls whose results are allocated together."""

_CAPTURES = 64
"""Calls inside CUDA graphs that find a counter which is zero already."""

_NOT, _BY_NUMBER, _BY_SINGLE, _BY_DOUBLE = range(4)
"""What norms are divided by."""

_POWERS = {1.0: 1, 2.0: 2, inf: triton_programs.MAXIMUM.value}


def fused(step: FusedStep) -> Report | None:
    """Measure, decide and scale; see ``Kernels.fused``."""
    plan = step.layout.plan(_FusedPlan)
    return plan.run(step) if plan.serves else None


class _Scratch(NamedTuple):
    """Memory of one call, which the next call on the same stream takes over.

    Args:
        chunks: What was found of each chunk, and of those of each part: sums, float64; and where
            patterns clamp, the sums of what is left, float64, and how many elements change, int64.
        rows: The last two of each row, float64.
        coefficients_P: What gradients are multiplied by, float64.
        counter: 0 between two calls: int32.
    """

    chunks: list[tuple[Tensor, list[Tensor]]]
    rows: list[Tensor]
    coefficients_P: Tensor
    counter: Tensor


class _Tables(NamedTuple):
    """What depends on shapes alone, on the device.

    Args:
        chunks: Of each part.
        tops: What its elements are clamped to; None where they are not.
        spans: The first chunk of each tensor, and the one behind its last.
        starts: The first tensor of each pattern.
        limits: What bounds each pattern.
    """

    chunks: list[Tensor]
    tops: list[Tensor | None]
    spans: Tensor
    starts: Tensor
    limits: Tensor


class _Part:
    """Gradients that are measured by one launch: their chunks.

    Args:
        specs: Of these gradients.
        indices: Which of all they are; None for all.
        layout: All gradients.
        element_limit: What their elements are clamped to; None where they are not.
    """

    def __init__(
        self,
        specs: TensorSpecs,
        indices: list[int] | None,
        layout: Layout,
        element_limit: float | None,
    ) -> None:
        self.top: Table | None = None
        if element_limit is not None:
            top = representable(element_limit, specs.dtypes[0])
            self.top = Table.of([float(top)], torch.float64)
        plan = specs.plan(triton_plan.Chunks)
        self.specs, self.indices, self.chunks = specs, indices, plan.chunks
        self.dtype = triton_plan.TYPES[specs.dtypes[0]]
        self.firsts = plan.firsts.on(_CPU)
        self.table = plan.table
        """For each chunk: which of all tensors, first element, elements, pattern; int64 (C, 4)."""
        if indices is not None or layout.patterns > 1:
            table = plan.table.on(_CPU).clone()
            numbers = range(len(layout.specs)) if indices is None else indices
            tensor_C = torch.tensor(numbers, device="cpu")[table[:, 0]]
            inner = layout.starts_table.on(_CPU)[1:-1].contiguous()
            table[:, 0], table[:, 3] = tensor_C, torch.bucketize(tensor_C, inner, right=True)
            self.table = Table(table)

    def of(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return those of all gradients that are these."""
        return tensors if self.indices is None else [tensors[index] for index in self.indices]


class _FusedPlan:
    """What stays from step to step for gradients of one layout."""

    def __init__(self, layout: Layout) -> None:
        specs = layout.specs
        self._layout = layout
        self._device = layout.device
        self.serves = (
            len(set(specs.devices)) == 1
            and all(specs.flat)
            and set(specs.dtypes) <= _SERVED
            and layout.power in _POWERS
        )
        if not self.serves:
            return
        self._parts = _parts(layout)
        self._chunks = sum(part.chunks for part in self._parts)
        self.serves = self._chunks > 0
        self._spans = Table(_spans(self._parts, len(specs)))
        self._width = triton.next_power_of_2(max(layout.patterns, 2))
        self._programs = triton_plan.programs_on(self._device)
        self._launch = Launcher()
        self._scratch: defaultdict[int, list[_Scratch]] = defaultdict(list)
        self._tables: dict[int, _Tables] = {}
        self._reports: defaultdict[int, list[Report]] = defaultdict(list)
        self._zeros: list[Tensor] = []
        self._addresses: Addresses | None = None
        self._tried = False

    def run(self, step: FusedStep) -> Report | None:
        """Launch everything; None where a step is not allowed, and nothing was written."""
        device, clamps = self._device, self._layout.clamps
        if clamps and (step.grad_scale is not None or not step.allows()):
            return None
        capturing, stream = is_capturing(device), stream_of(device)
        if capturing and not self._tried:  # its tables are not there yet; the ordinary way's may be
            return None
        tables = self._tables_on(stream, capturing=capturing)
        addresses = self._addresses_of(step)
        scratch, report = self._memory(stream, capturing=capturing)
        try:
            with current(device):
                if not self._tried:
                    # What cannot be compiled fails before anything is written: a limit of inf
                    # changes nothing, and neither does a coefficient of 1.
                    if clamps:
                        self._measure(step, scratch, addresses, tables, unlimited=True)
                        self._decide(step, scratch, report, tables)
                    scratch.coefficients_P.fill_(1.0)
                    self._scale(scratch, addresses, tables)
                    self._tried = True
                self._measure(step, scratch, addresses, tables)
                # The host looks at what only writing needs while the device sums.
                if not (clamps or step.allows()):
                    return None
                self._decide(step, scratch, report, tables)
                if not step.accepts(report):
                    return None
                if step.scales:
                    increment_version(step.tensors)  # autograd sees no write of its own
                    self._scale(scratch, addresses, tables)
            return report
        finally:
            if not capturing:
                self._scratch[stream].append(scratch)

    def _tables_on(self, stream: int, *, capturing: bool) -> _Tables:
        """Return the tables, copied once for each stream; a graph keeps those that it reads."""
        known = None if capturing else self._tables.get(stream)
        if known is None:
            device, parts, layout = self._device, self._parts, self._layout
            known = _Tables(
                [part.table.on(device) for part in parts],
                [None if part.top is None else part.top.on(device) for part in parts],
                self._spans.on(device),
                layout.starts_table.on(device),
                layout.limits_table.on(device),
            )
            if not capturing:
                self._tables[stream] = known
        return known

    def _addresses_of(self, step: FusedStep) -> Tensor:
        """Return where the gradients are: int64 (T,), on their device."""
        if self._addresses is None:
            self._addresses = Addresses(self._device, len(self._layout.specs))
        return self._addresses.of(step.addresses)

    def _measure(
        self,
        step: FusedStep,
        scratch: _Scratch,
        addresses: Tensor,
        tables: _Tables,
        *,
        unlimited: bool = False,
    ) -> None:
        """Sum the powers of each chunk; clamp on the way what is clamped, unless told otherwise."""
        for number, (part, table) in enumerate(zip(self._parts, tables.chunks, strict=True)):
            found = [parts[number] for _, parts in scratch.chunks]
            if part.top is None:
                self._launch(
                    triton_programs.power_sums,
                    (part.chunks,),
                    addresses,
                    table,
                    found[0],
                    POWER=_POWERS[self._layout.power],
                    DTYPE=part.dtype,
                    KIND=tl.float32,
                    BLOCK=triton_plan.BLOCK,
                    RECOUNT=triton_plan.RECOUNT,
                )
            else:
                increment_version(part.of(step.tensors))  # autograd sees no write of its own
                self._launch(
                    triton_programs.clamp,
                    (part.chunks,),
                    addresses,
                    table,
                    _UNLIMITED.on(self._device) if unlimited else tables.tops[number],
                    *found,
                    DTYPE=part.dtype,
                    KIND=tl.float32,
                    WRITE=True,
                    BLOCK=triton_plan.BLOCK,
                    RECOUNT=triton_plan.RECOUNT,
                )

    def _decide(self, step: FusedStep, scratch: _Scratch, report: Report, tables: _Tables) -> None:
        """Fold the sums, judge them, and fill the report."""
        layout, scale, limits = self._layout, step.grad_scale, tables.limits
        count = layout.starts[-1]
        scaled, scale_bits, scale_there = _NOT, 0, limits
        if isinstance(scale, Tensor):
            wide = scale.dtype is not torch.float32
            scaled = _BY_DOUBLE if wide else _BY_SINGLE
            scale_there = scale.to(torch.float64) if wide else scale
        elif scale is not None:
            scaled, scale_bits = _BY_NUMBER, triton_plan.bits(scale)
        chunks, rows = [whole for whole, _ in scratch.chunks], scratch.rows
        unused = [] if layout.clamps else [limits, limits]
        self._launch(
            triton_decide.decide,
            (count,),
            *chunks,
            *unused,
            tables.spans,
            tables.starts,
            limits,
            scale_there,
            scale_bits,
            scratch.counter,
            report.sums_T,
            *rows,
            *unused,
            scratch.coefficients_P,
            report.values,
            count,
            layout.patterns,
            POWER=_POWERS[layout.power],
            CLAMPS=layout.clamps,
            SKIPS=layout.skips,
            SCALED=scaled,
            WIDTH=self._width,
            BLOCK=triton_plan.FOLD,
        )

    def _scale(self, scratch: _Scratch, addresses: Tensor, tables: _Tables) -> None:
        """Multiply each chunk by the coefficient of its pattern."""
        for part, table in zip(self._parts, tables.chunks, strict=True):
            self._launch(
                triton_programs.scale,
                (min(part.chunks, self._programs),),
                addresses,
                table,
                scratch.coefficients_P,
                part.chunks,
                PER_ROW=self._layout.patterns > 1,
                DTYPE=part.dtype,
                BLOCK=triton_plan.BLOCK,
            )

    def _memory(self, stream: int, *, capturing: bool) -> tuple[_Scratch, Report]:
        """Return memory to work with, and memory for what one call comes to.

        A captured graph works at each replay with what it was given: nobody else gets that.
        """
        if capturing:
            return self._make_scratch(capturing=True), self._make_reports(1)[0]
        free, reports = self._scratch[stream], self._reports[stream]
        try:
            scratch = free.pop()
        except IndexError:  # the first call on this stream, or another thread has it
            scratch = self._make_scratch(capturing=False)
        try:
            report = reports.pop()
        except IndexError:
            report, *more = self._make_reports(_CALLS)
            reports += more
        return scratch, report

    def _make_scratch(self, *, capturing: bool) -> _Scratch:
        """Allocate; the counter is zeroed outside of a CUDA graph, where that is no launch."""
        device = self._device
        if capturing and self._zeros:
            counter = keep_for_replays(self._zeros.pop())
        else:
            counter = torch.zeros(4, dtype=torch.int32, device=device)
        if not (capturing or self._zeros):
            zeros = torch.zeros(_CAPTURES, 4, dtype=torch.int32, device=device)
            self._zeros = list(zeros.unbind())
        sizes = [part.chunks + part.chunks % 2 for part in self._parts]  # of 16 bytes each
        kinds = (torch.float64, torch.float64, torch.int64)[: 3 if self._layout.clamps else 1]
        chunks = [torch.empty(sum(sizes), dtype=kind, device=device) for kind in kinds]
        count = len(self._layout.specs)
        return _Scratch(
            [(each, list(each.split(sizes))) for each in chunks],
            [torch.empty(count, dtype=torch.float64, device=device) for _ in kinds[1:]],
            torch.empty(self._width, dtype=torch.float64, device=device),
            counter,
        )

    def _make_reports(self, calls: int) -> list[Report]:
        """Allocate what some calls come to."""
        patterns, count = self._layout.patterns, len(self._layout.specs)
        sizes = COLUMNS * (patterns + 1), count + count % 2
        values, sums = (
            torch.empty(calls, size, dtype=torch.float64, device=self._device).unbind()
            for size in sizes
        )
        return [Report(*each, patterns) for each in zip(values, sums, strict=True)]


_CPU = torch.device("cpu")
_UNLIMITED = Table.of([inf], torch.float64)
_SERVED = frozenset({torch.float16, torch.bfloat16, torch.float32})
"""Dtypes whose sums are in range in float64, and whose coefficients are too."""


def _parts(layout: Layout) -> list[_Part]:
    """Cut gradients by dtype, and those that are clamped by pattern too."""
    specs, starts = layout.specs, layout.starts
    alike: dict[tuple[torch.dtype, int | None], list[int]] = {}
    for pattern, limit in enumerate(layout.limits):
        for index in range(starts[pattern], starts[pattern + 1]):
            clamped = pattern if limit.clamps else None
            alike.setdefault((specs.dtypes[index], clamped), []).append(index)
    if len(alike) == 1:
        only = layout.limits[0]
        return [_Part(specs, None, layout, only.element_limit if only.clamps else None)]
    return [
        _Part(
            specs.chosen(indices),
            indices,
            layout,
            None if clamped is None else layout.limits[clamped].element_limit,
        )
        for (_, clamped), indices in alike.items()
    ]


def _spans(parts: list[_Part], count: int) -> Tensor:
    """Return the first chunk of each tensor, and the one behind its last: int64 (T, 2)."""
    spans = torch.empty(count, 2, dtype=torch.int64, device="cpu")
    offset = 0
    for part in parts:
        there = part.firsts + offset
        here = slice(None) if part.indices is None else torch.tensor(part.indices, device="cpu")
        spans[here] = torch.stack([there[:-1], there[1:]], dim=1)
        offset += part.chunks + part.chunks % 2
    return spans
