"""A clip by norm in three launches: sums of chunks, the decision, and the scaling.

With ``triton.py``, whose plans and programs it launches, it shares everything but the order of
launches: nothing is asked of the host, or of torch, between two of them.
"""

from collections import defaultdict
from math import inf
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from gradclip.clipping.kernels import triton as backend
from gradclip.clipping.kernels import triton_decide, triton_programs
from gradclip.clipping.kernels.device import is_capturing, stream_of
from gradclip.clipping.kernels.fused import COLUMNS, FusedStep, Layout, Report
from gradclip.clipping.kernels.tables import Addresses, Table
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
        sums_C: Of each chunk, float64.
        coefficients_P: What gradients are multiplied by, float64.
        counter: 0 between two calls: int32 (1,).
        parts: Of ``sums_C`` those of each part.
    """

    sums_C: Tensor
    coefficients_P: Tensor
    counter: Tensor
    parts: list[Tensor]


class _Part:
    """Gradients of one dtype: their chunks.

    Args:
        specs: Of these gradients.
        indices: Which of all they are; None for all.
        layout: All gradients.
    """

    def __init__(self, specs: TensorSpecs, indices: list[int] | None, layout: Layout) -> None:
        plan = specs.plan(backend._Plan)  # noqa: SLF001 - the other half of this backend
        self.specs, self.indices, self.chunks = specs, indices, plan.chunks
        self.dtype = backend._TYPES[specs.dtypes[0]]  # noqa: SLF001
        self.firsts = plan.firsts.on(_CPU)
        self.table = plan.table
        if layout.patterns > 1:  # chunks have the coefficient of their pattern
            table = plan.table.on(_CPU).clone()
            starts = layout.starts_table.on(_CPU)
            numbers = range(len(layout.specs)) if indices is None else indices
            tensor_T = torch.tensor(numbers, device="cpu")
            pattern_T = torch.bucketize(tensor_T, starts[1:-1].contiguous(), right=True)
            table[:, 3] = pattern_T[table[:, 3]]
            self.table = Table(table)
        self._addresses: Addresses | None = None

    def addresses_of(self, step: FusedStep) -> Tensor:
        """Return where the gradients are: int64 (T',), on their device."""
        if self._addresses is None:
            self._addresses = Addresses(self.specs.devices[0], len(self.specs))
        every = step.addresses
        mine = every if self.indices is None else [every[index] for index in self.indices]
        return self._addresses.of(mine)


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
            and not any(limit.clamps for limit in layout.limits)
            and layout.power in _POWERS
        )
        if not self.serves:
            return
        self._parts = [_Part(part.specs, part.indices, layout) for part in specs.parts]
        self._chunks = sum(part.chunks for part in self._parts)
        self.serves = self._chunks > 0
        self._spans = Table(_spans(self._parts, len(specs)))
        self._width = triton.next_power_of_2(max(layout.patterns, 2))
        self._launch = Launcher()
        self._scratch: defaultdict[int, list[_Scratch]] = defaultdict(list)
        self._reports: defaultdict[int, list[Report]] = defaultdict(list)
        self._zeros: list[Tensor] = []

    def run(self, step: FusedStep) -> Report | None:
        """Launch everything; None where a step is not allowed, and nothing was written."""
        device = self._device
        capturing, stream = is_capturing(device), stream_of(device)
        there = [(part.addresses_of(step), part.table.on(device)) for part in self._parts]
        scratch, report = self._memory(stream, capturing=capturing)
        try:
            with current(device):
                self._sum(scratch, there)
                # The host looks at what only writing needs while the device sums.
                if not step.allows():
                    return None
                self._decide(step, scratch, report)
                if not step.accepts(report):
                    return None
                if step.scales:
                    self._scale(step, scratch, there)
            return report
        finally:
            if not capturing:
                self._scratch[stream].append(scratch)

    def _sum(self, scratch: _Scratch, there: list[tuple[Tensor, Tensor]]) -> None:
        """Sum the powers of each chunk."""
        for part, (addresses, table), sums_C in zip(self._parts, there, scratch.parts, strict=True):
            self._launch(
                triton_programs.power_sums,
                (part.chunks,),
                addresses,
                table,
                sums_C,
                POWER=_POWERS[self._layout.power],
                DTYPE=part.dtype,
                KIND=tl.float32,
                BLOCK=backend.BLOCK,
                RECOUNT=backend._RECOUNT,  # noqa: SLF001
            )

    def _decide(self, step: FusedStep, scratch: _Scratch, report: Report) -> None:
        """Fold the sums, judge them, and fill the report."""
        layout, device, scale = self._layout, self._device, step.grad_scale
        count = len(layout.specs)
        limits = layout.limits_table.on(device)
        scaled, scale_bits, scale_there = _NOT, 0, limits
        if isinstance(scale, Tensor):
            wide = scale.dtype is not torch.float32
            scaled = _BY_DOUBLE if wide else _BY_SINGLE
            scale_there = scale.to(torch.float64) if wide else scale
        elif scale is not None:
            scaled, scale_bits = _BY_NUMBER, backend._bits(scale)  # noqa: SLF001
        self._launch(
            triton_decide.decide,
            (count,),
            scratch.sums_C,
            self._spans.on(device),
            layout.starts_table.on(device),
            limits,
            scale_there,
            scale_bits,
            scratch.counter,
            report.sums_T,
            scratch.coefficients_P,
            report.values,
            count,
            layout.patterns,
            POWER=_POWERS[layout.power],
            SKIPS=layout.skips,
            SCALED=scaled,
            WIDTH=self._width,
            BLOCK=backend._FOLD,  # noqa: SLF001
        )

    def _scale(
        self, step: FusedStep, scratch: _Scratch, there: list[tuple[Tensor, Tensor]]
    ) -> None:
        """Multiply each chunk by the coefficient of its pattern."""
        increment_version(step.tensors)  # autograd sees no write of its own
        for part, (addresses, table) in zip(self._parts, there, strict=True):
            self._launch(
                triton_programs.scale,
                (min(part.chunks, backend._PROGRAMS),),  # noqa: SLF001
                addresses,
                table,
                scratch.coefficients_P,
                part.chunks,
                PER_ROW=self._layout.patterns > 1,
                DTYPE=part.dtype,
                BLOCK=backend.BLOCK,
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
            counter = self._zeros.pop()
        else:
            counter = torch.zeros(4, dtype=torch.int32, device=device)
        if not (capturing or self._zeros):
            zeros = torch.zeros(_CAPTURES, 4, dtype=torch.int32, device=device)
            self._zeros = list(zeros.unbind())
        sizes = [part.chunks + part.chunks % 2 for part in self._parts]  # of 16 bytes each
        sums_C = torch.empty(sum(sizes), dtype=torch.float64, device=device)
        coefficients_P = torch.empty(self._width, dtype=torch.float64, device=device)
        return _Scratch(sums_C, coefficients_P, counter, list(sums_C.split(sizes)))

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
_SERVED = frozenset({torch.float16, torch.bfloat16, torch.float32})
"""Dtypes whose sums are in range in float64, and whose coefficients are too."""


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
