"""The backend for NVIDIA GPUs: multi-tensor kernels that read every gradient once.

A table, which depends on shapes alone, cuts the rows of all tensors into chunks; one launch
covers all of them, whatever their number, and finds each tensor through a second table, of
addresses. Sums are float32 over the blocks of a chunk and float64 from there on; a chunk whose
sum says that float32 may have lost something is counted again in float64, by its own program.
Nothing is read by the host, and no temporary grows faster than one number per chunk.

The order of every sum follows from shapes: aligned and unaligned memory are read differently and
added alike, so that ranks agree bit by bit.
"""

from collections import defaultdict

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from gradclip.clipping.kernels import Batch, Clamped, Write, foreach, triton_plan
from gradclip.clipping.kernels import triton_programs as programs
from gradclip.clipping.kernels.blocks import representable
from gradclip.clipping.kernels.fused import FusedStep, Report
from gradclip.clipping.kernels.triton_launch import Launcher, current
from gradclip.clipping.kernels.writes import run_each

_LARGEST_POWER = 1e6
"""Of quotients in float32."""

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
    plan = batch.specs.plan(triton_plan.Chunks)
    sums_C = _empty(batch, plan.chunks)
    with current(batch.device):
        plan.launch(
            programs.scaled_power_sums,
            (plan.chunks,),
            plan.addresses_of(batch),
            plan.table.on(batch.device),
            scale_R.contiguous(),
            triton_plan.bits(p),
            sums_C,
            DTYPE=triton_plan.TYPES[batch.dtype],
            KIND=kind,
            BLOCK=triton_plan.RECOUNT if kind is tl.float64 else triton_plan.BLOCK,
            RECOUNT=triton_plan.RECOUNT,
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
    plan, device = batch.specs.plan(triton_plan.Chunks), batch.device
    if not isinstance(coefficients, Tensor):
        coefficients = torch.full((1,), coefficients, dtype=torch.float64, device=device)
    addresses, table = plan.addresses_of(batch), plan.table.on(device)
    factors = coefficients.contiguous()

    def launch() -> None:
        increment_version(batch.tensors)  # autograd sees no write of its own
        with current(device):
            plan.launch(
                programs.scale,
                (min(plan.chunks, triton_plan.programs_on(device)),),
                addresses,
                table,
                factors,
                plan.chunks,
                PER_ROW=factors.numel() > 1,
                DTYPE=triton_plan.TYPES[batch.dtype],
                BLOCK=triton_plan.BLOCK,
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
        self._plan = plan = batch.specs.plan(triton_plan.Chunks)
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
                DTYPE=triton_plan.TYPES[batch.dtype],
                KIND=_wide(batch.dtype),
                WRITE=self._write,
                BLOCK=triton_plan.BLOCK,
                RECOUNT=triton_plan.RECOUNT,
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
        threshold_bits, target_bits = triton_plan.bits(thresholds), triton_plan.bits(targets)
    found_S = torch.empty_like(norms_S)
    with current(norms_S.device):
        _LAUNCHERS[norms_S.device](
            programs.coefficients,
            (triton.cdiv(len(norms_S), triton_plan.FOLD),),
            norms_S.contiguous(),
            *(each.contiguous() for each in given or (norms_S, norms_S)),
            threshold_bits,
            target_bits,
            committed,
            triton_plan.bits(1 - guard),
            triton_plan.bits(skipped_coefficient),
            found_S,
            len(norms_S),
            NUMBERS=not given,
            BLOCK=triton_plan.FOLD,
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
    plan = batch.specs.plan(triton_plan.Chunks)
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
            DTYPE=triton_plan.TYPES[batch.dtype],
            KIND=_wide(batch.dtype),
            BLOCK=triton_plan.BLOCK,
            RECOUNT=triton_plan.RECOUNT,
        )
        return _folded(
            batch, plan, found_CA, columns=columns, largest=power == programs.MAXIMUM.value
        )


def _folded(
    batch: Batch, plan: triton_plan.Chunks, found_CA: Tensor, *, columns: int, largest: bool
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
        BLOCK=triton_plan.FOLD,
    )
    return folded_RA


def _empty(batch: Batch, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=batch.device)


def _columns(batch: Batch) -> int:
    return 3 if batch.dtype is torch.float64 else 1


def _wide(dtype: torch.dtype) -> tl.dtype:
    """Return what elements are computed in."""
    return tl.float64 if dtype is torch.float64 else tl.float32
