"""The backend for NVIDIA GPUs: multi-tensor kernels that read every gradient once.

A table, which depends on shapes alone, cuts the rows of all tensors into chunks; one launch
covers all of them, whatever their number, and finds each tensor through a second table, of
addresses. Sums are float32 over the blocks of a chunk and float64 from there on; a chunk whose
sum says that float32 may have lost something is counted again in float64, by its own program.
Nothing is read by the host, and no temporary grows faster than one number per chunk.

The order of every sum follows from shapes: aligned and unaligned memory are read differently and
added alike, so that ranks agree bit by bit.
"""

import struct
from collections import defaultdict

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from gradclip.clipping.kernels import Batch, Clamped, TensorSpecs, Write, foreach
from gradclip.clipping.kernels import triton_programs as programs
from gradclip.clipping.kernels.blocks import representable
from gradclip.clipping.kernels.fused import FusedStep, Report
from gradclip.clipping.kernels.tables import Addresses, Table
from gradclip.clipping.kernels.triton_launch import Launcher, current
from gradclip.clipping.kernels.writes import run_each

CHUNK = 1 << 14
"""Elements of one program."""

BLOCK = 1 << 12
"""Elements that a program holds at a time."""

_RECOUNT = 1 << 10
"""Elements at a time where a chunk is counted in float64."""

_LARGEST_POWER = 1e6
"""Of quotients in float32."""

_PROGRAMS = 8
"""Programs for each multiprocessor, of a pass that may have nothing to do and then ends at once."""

_FOLD = 1 << 10
"""Sums of chunks that are added at a time."""

_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

_LAUNCHERS: defaultdict[torch.device, Launcher] = defaultdict(Launcher)
"""For what belongs to no plan."""


def power_sums(batch: Batch, p: float) -> Tensor:
    """Sum ``|x|**p`` over each row for p = 1, 2: (R, A); see ``Kernels.power_sums``."""
    if not _is_served(batch):
        return foreach.power_sums(batch, p)
    return _reduced(batch, int(p))


def abs_max(batch: Batch) -> Tensor:
    """Find the largest modulus of each row: (R, 1)."""
    if not _is_served(batch):
        return foreach.abs_max(batch)
    return _reduced(batch, programs.MAXIMUM.value)


def scaled_power_sums(batch: Batch, p: float, scale_R: Tensor) -> Tensor:
    """Sum ``|x / scale|**p`` over each row: float64 (R, 1)."""
    if not _is_served(batch):
        return foreach.scaled_power_sums(batch, p, scale_R)
    # Below p = 1, quotients that float32 cannot hold would count; a large p it cannot hold itself.
    kind = _wide(batch.dtype) if 1 <= p <= _LARGEST_POWER else tl.float64
    plan = batch.specs.plan(_Plan)
    sums_C = _empty(batch, plan.chunks)
    with current(batch.device):
        plan.launch(
            programs.scaled_power_sums,
            (plan.chunks,),
            plan.addresses_of(batch),
            plan.table.on(batch.device),
            scale_R.contiguous(),
            _bits(p),
            sums_C,
            DTYPE=_TYPES[batch.dtype],
            KIND=kind,
            BLOCK=_RECOUNT if kind is tl.float64 else BLOCK,
            RECOUNT=_RECOUNT,
        )
        return _folded(batch, plan, sums_C, columns=1, largest=False)


def scaling(
    batch: Batch,
    coefficients: float | Tensor,
    *,
    zeroes: bool = True,
) -> list[Write]:
    """Prepare to multiply each row by its coefficient, or all by the one that there is."""
    if not _is_served(batch):
        return foreach.scaling(batch, coefficients, zeroes=zeroes)
    plan, device = batch.specs.plan(_Plan), batch.device
    if not isinstance(coefficients, Tensor):
        coefficients = torch.full((1,), coefficients, dtype=torch.float64, device=device)
    addresses, table = plan.addresses_of(batch), plan.table.on(device)
    factors = coefficients.contiguous()

    def launch() -> None:
        increment_version(batch.tensors)  # autograd sees no write of its own
        with current(device):
            plan.launch(
                programs.scale,
                (min(plan.chunks, _PROGRAMS * _multiprocessors(device)),),
                addresses,
                table,
                factors,
                plan.chunks,
                PER_ROW=factors.numel() > 1,
                DTYPE=_TYPES[batch.dtype],
                BLOCK=BLOCK,
            )

    return [Write(run_each, ([launch],))]


def clamping(batch: Batch, limit: float | Tensor) -> list[Write]:
    """Prepare to clamp to [-limit, limit]."""
    # In the interpreter, which runs on the CPU, nothing is prepared where nothing exceeds it.
    if not _is_served(batch) or batch.device.type == "cpu":
        return foreach.clamping(batch, limit)
    return [Write(run_each, ([_Clamp(batch, limit, write=True)],))]


def clamp_(batch: Batch, limit: float | Tensor, write: bool) -> Clamped:
    """Sum squares before and after clamping to [-limit, limit]; write in the same pass, or not."""
    if not _is_served(batch):
        return foreach.clamp_(batch, limit, write)
    clamp = _Clamp(batch, limit, write=write)
    clamp()
    with current(batch.device):
        return Clamped(clamp.folded(clamp.before_CA), clamp.folded(clamp.after_CA), clamp.moved())


class _Clamp:
    """One launch that clamps, for which everything is there.

    Args:
        batch: What is clamped.
        limit: To [-limit, limit].
        write: Whether to write, or only to find out.
    """

    def __init__(self, batch: Batch, limit: float | Tensor, *, write: bool) -> None:
        self._batch, self._write = batch, write
        self._plan = plan = batch.specs.plan(_Plan)
        self._columns = _columns(batch)
        top = representable(limit, batch.dtype)
        if not isinstance(top, Tensor):
            top = torch.full((1,), top, dtype=torch.float64, device=batch.device)
        self._addresses, self._table = plan.addresses_of(batch), plan.table.on(batch.device)
        self._top = top.to(torch.float64)
        self.before_CA = _empty(batch, plan.chunks, self._columns)
        self.after_CA = _empty(batch, plan.chunks, self._columns)
        self._changed_C = torch.empty(plan.chunks, dtype=torch.int64, device=batch.device)

    def __call__(self) -> None:
        """Launch it."""
        batch = self._batch
        if self._write:
            increment_version(batch.tensors)
        with current(batch.device):
            self._plan.launch(
                programs.clamp,
                (self._plan.chunks,),
                self._addresses,
                self._table,
                self._top,
                self.before_CA,
                self.after_CA,
                self._changed_C,
                DTYPE=_TYPES[batch.dtype],
                KIND=_wide(batch.dtype),
                WRITE=self._write,
                BLOCK=BLOCK,
                RECOUNT=_RECOUNT,
            )

    def folded(self, found_CA: Tensor) -> Tensor:
        """Bring sums of chunks together by rows: (R, A)."""
        return _folded(self._batch, self._plan, found_CA, columns=self._columns, largest=False)

    def moved(self) -> Tensor:
        """Return how many elements change: 0-d int64."""
        return self._changed_C.sum()


def coefficients(
    norms_S: Tensor,
    thresholds: float | Tensor,
    targets: float | Tensor,
    committed: Tensor,
    guard: float,
    skipped_coefficient: float,
) -> Tensor:
    """Return what each scope is multiplied by, float64 (S,), in one launch."""
    threshold_bits = target_bits = 0
    if isinstance(thresholds, Tensor) or isinstance(targets, Tensor):
        given = [
            each.to(torch.float64).expand_as(norms_S)
            if isinstance(each, Tensor)
            else torch.full_like(norms_S, each)
            for each in (thresholds, targets)
        ]
    else:
        given = []
        threshold_bits, target_bits = _bits(thresholds), _bits(targets)
    found_S = torch.empty_like(norms_S)
    with current(norms_S.device):
        _LAUNCHERS[norms_S.device](
            programs.coefficients,
            (triton.cdiv(len(norms_S), _FOLD),),
            norms_S.contiguous(),
            *(each.contiguous() for each in given or (norms_S, norms_S)),
            threshold_bits,
            target_bits,
            committed,
            _bits(1 - guard),
            _bits(skipped_coefficient),
            found_S,
            len(norms_S),
            NUMBERS=not given,
            BLOCK=_FOLD,
        )
    return found_S


def fused(step: FusedStep) -> Report | None:
    """Measure, decide and scale in three launches; see ``Kernels.fused``."""
    from gradclip.clipping.kernels import triton_fused  # noqa: PLC0415 - it builds on this module

    return triton_fused.fused(step)


def _is_served(batch: Batch) -> bool:
    """Return whether the programs can read a batch: real rows without gaps, as they are."""
    return batch.specs.flat[0] and batch.limit is None and not batch.dtype.is_complex


def _reduced(batch: Batch, power: int) -> Tensor:
    plan = batch.specs.plan(_Plan)
    columns = 1 if power == programs.MAXIMUM.value else _columns(batch)
    found_CA = _empty(batch, plan.chunks, columns)
    with current(batch.device):
        plan.launch(
            programs.power_sums,
            (plan.chunks,),
            plan.addresses_of(batch),
            plan.table.on(batch.device),
            found_CA,
            POWER=power,
            DTYPE=_TYPES[batch.dtype],
            KIND=_wide(batch.dtype),
            BLOCK=BLOCK,
            RECOUNT=_RECOUNT,
        )
        return _folded(
            batch, plan, found_CA, columns=columns, largest=power == programs.MAXIMUM.value
        )


def _folded(
    batch: Batch, plan: "_Plan", found_CA: Tensor, *, columns: int, largest: bool
) -> Tensor:
    """Bring what was found in chunks together by rows: (R, A)."""
    folded_RA = _empty(batch, plan.rows, columns)
    plan.launch(
        programs.fold,
        (plan.rows, columns),
        found_CA,
        plan.firsts.on(batch.device),
        folded_RA,
        COLUMNS=columns,
        LARGEST=largest,
        BLOCK=_FOLD,
    )
    return folded_RA


def _empty(batch: Batch, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=batch.device)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # in the interpreter
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _columns(batch: Batch) -> int:
    return 3 if batch.dtype is torch.float64 else 1


def _wide(dtype: torch.dtype) -> tl.dtype:
    """Return what elements are computed in."""
    return tl.float64 if dtype is torch.float64 else tl.float32


def _numbers(count: int) -> Tensor:
    return torch.arange(count, device="cpu")


def _bits(number: float) -> int:
    """Return the bits of a float64: Triton would round a number to float32."""
    bits: int = struct.unpack("q", struct.pack("d", number))[0]
    return bits


class _Plan:
    """The chunks of a specs, and where its tensors were found last."""

    def __init__(self, specs: TensorSpecs) -> None:
        sizes_R = torch.tensor(specs.row_sizes, dtype=torch.int64, device="cpu")
        rows_T = torch.tensor(specs.rows, dtype=torch.int64, device="cpu")
        tensor_R = _numbers(len(specs)).repeat_interleave(rows_T)
        first_row_T = rows_T.cumsum(0) - rows_T
        start_R = (_numbers(len(sizes_R)) - first_row_T[tensor_R]) * sizes_R
        chunks_R = (sizes_R + CHUNK - 1) // CHUNK
        row_C = _numbers(len(sizes_R)).repeat_interleave(chunks_R)
        last_R = chunks_R.cumsum(0)
        offset_C = (_numbers(len(row_C)) - (last_R - chunks_R)[row_C]) * CHUNK
        count_C = (sizes_R[row_C] - offset_C).clamp(max=CHUNK)
        self.rows = len(sizes_R)
        self.chunks = len(row_C)
        self.table = Table(
            torch.stack([tensor_R[row_C], start_R[row_C] + offset_C, count_C, row_C], dim=1)
        )
        """For each chunk: tensor, first element, elements, row; int64 (C, 4)."""
        self.firsts = Table(torch.cat([last_R.new_zeros(1), last_R]))
        """The first chunk of each row, and their number: int64 (R + 1,)."""
        self.launch = Launcher()
        self._addresses: Addresses | None = None

    def addresses_of(self, batch: Batch) -> Tensor:
        """Return where the tensors of a batch are: int64 (T,), on their device."""
        self.table.on(batch.device)  # refuses a capture that comes before the first steps
        if self._addresses is None:
            self._addresses = Addresses(batch.device, len(batch.tensors))
        return self._addresses.of(batch.addresses)
