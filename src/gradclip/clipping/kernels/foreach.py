"""The portable backend: torch's own operations, arranged so that sums are right.

On the CPU a large tensor is summed as rows of 256 elements in its own precision and those in
float64, which reads at the speed of memory and errs by about 1e-7; small tensors are converted
to float64 together. Where float32 squares may have left their range, a tensor is counted anew in
float64. On an accelerator ``off_cpu.py`` takes its place.
"""

from collections.abc import Callable, Iterator, Sequence
from math import inf, isfinite, isnan

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from gradclip.clipping.kernels import (
    Batch,
    Clamped,
    TensorSpecs,
    Write,
    blocks,
    carry_out,
    halves,
    matrices,
    off_cpu,
    total,
)
from gradclip.clipping.kernels.device import result_device_of
from gradclip.clipping.kernels.rows import in_blocks, shaped
from gradclip.clipping.kernels.writes import clamp_each

_CONVERTED = 1 << 23
"""Bytes of a large tensor converted at a time, so that no temporary grows with the model."""

_LOST_SQUARE = {torch.float64: 2.0**-960}
_COARSE_COEFFICIENT = 2.0**-120
"""Smaller coefficients are applied in two steps, since float32 would round them coarsely."""

_EUCLIDEAN = 2.0

coefficients = blocks.coefficients
fused = None


def power_sums(batch: Batch, p: float) -> Tensor:
    """Sum ``|x|**p`` over each row for p = 1, 2: (R, A); see ``Kernels.power_sums``."""
    top = batch.top
    if batch.together and p == _EUCLIDEAN and _on_cpu(batch):
        squares = total.square_total(batch)
        if squares is not None:
            return torch.full((1, 1), squares, dtype=torch.float64, device="cpu")
    if batch.dtype.is_complex or not _on_cpu(batch):
        found = None if _on_cpu(batch) else off_cpu.reduced(batch, p)
        if found is None:
            found = _by_blocks(batch, lambda row: blocks.power_sum(row, p, 0, top))
        sums_R = found
    else:
        sums_R = _by_rows(batch, p, lambda row: _large_sum(row, p, top))
    if batch.dtype in {torch.float64, torch.complex128}:
        return _with_range(sums_R, batch, p)
    return sums_R.unsqueeze(1)


def abs_max(batch: Batch) -> Tensor:
    """Find the largest modulus of each row: (R, A)."""
    if batch.dtype.is_complex:
        maxima_RA = _by_blocks(batch, blocks.modulus_max)
        return maxima_RA if len(maxima_RA) else maxima_RA.unsqueeze(1)
    if _on_cpu(batch):
        maxima_R = _by_rows(batch, inf, lambda row: float(blocks.abs_max(row)))
    else:
        found = off_cpu.reduced(batch, inf)
        maxima_R = _by_blocks(batch, blocks.abs_max) if found is None else found
    return (maxima_R if batch.top is None else maxima_R.clamp(max=batch.top)).unsqueeze(1)


def scaled_power_sums(batch: Batch, p: float, scale_R: Tensor) -> Tensor:
    """Sum ``|x / scale|**p`` over each row: (R, 1)."""
    found = None if _on_cpu(batch) else off_cpu.scaled_power_sums(batch, p, scale_R)
    if found is not None:
        return found.unsqueeze(1)
    scales, top = iter(scale_R), batch.top
    return _by_blocks(
        batch, lambda row: blocks.scaled_power_sum(row, p, next(scales), top)
    ).unsqueeze(1)


def scaling(batch: Batch, coefficients: float | Tensor, *, zeroes: bool = True) -> list[Write]:
    """Prepare to multiply each row by its coefficient, or all by the one that there is."""
    if not _on_cpu(batch):
        return off_cpu.scaling(batch, coefficients, zeroes=zeroes)
    if not isinstance(coefficients, Tensor) or coefficients.numel() == 1:
        return _scaling_together(list(batch.joined().tensors), float(coefficients))
    if batch.specs.one_row_each:
        pairs = zip(batch.tensors, coefficients.tolist(), strict=True)
        return [write for tensor, c in pairs for write in _scaling_together([tensor], c)]
    per_tensor = coefficients.split(batch.specs.rows)
    chosen = [
        (tensor, factors)
        for tensor, factors in zip(batch.tensors, per_tensor, strict=True)
        if bool((factors != 1).any())
    ]
    if batch.dtype not in {torch.float32, torch.float64}:
        return in_blocks(chosen, torch.float64)  # torch would convert the whole tensor
    return [write for pair in chosen for write in _scaling_rows(*pair)]


def clamping(batch: Batch, limit: float | Tensor) -> list[Write]:
    """Prepare to clamp to [-limit, limit]; on the CPU only the tensors that exceed it."""
    top = blocks.representable(limit, batch.dtype)
    wide = list(batch.tensors)
    if _on_cpu(batch):
        wide = _exceeding(batch, float(top))
    return [Write(clamp_each, (wide, [-top] * len(wide), [top] * len(wide)))] if wide else []


def clamp_(batch: Batch, limit: float | Tensor, write: bool) -> Clamped:
    """Clamp to [-limit, limit], or find out what that would do."""
    before_RA, writes = power_sums(batch, _EUCLIDEAN), clamping(batch, limit)
    changed = torch.full((), len(writes), dtype=torch.int64, device=before_RA.device)
    if not _on_cpu(batch):
        top = blocks.representable(limit, batch.dtype)
        counts = [blocks.count_beyond(row, top) for row in _rows(batch)]
        changed = torch.stack(counts).sum().to(before_RA.device) if counts else changed * 0
    if not writes:
        return Clamped(before_RA, before_RA, changed)
    if not write:
        return Clamped(before_RA, power_sums(batch.limited(limit), _EUCLIDEAN), changed)
    carry_out(writes)
    return Clamped(before_RA, power_sums(batch, _EUCLIDEAN), changed)


def _on_cpu(batch: Batch) -> bool:
    return batch.device.type == "cpu"


def _rows(batch: Batch) -> list[Tensor]:
    """Return a view of every row of a batch."""
    pairs = zip(batch.tensors, batch.specs.rows, strict=True)
    return [row for tensor, n in pairs for row in blocks.rows_of(tensor, n)]


def _by_blocks(batch: Batch, of_row: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what float64 blocks say of each row: (R, ...)."""
    found = list(map(of_row, _rows(batch)))
    if not found:
        return torch.zeros(0, dtype=torch.float64, device=result_device_of((batch.device,)))
    return torch.stack(found)


# --- the CPU, where the host reads for nothing -------------------------------------------------


class _Gathering:
    """Which rows of a specs are summed together, and which each by itself.

    Rows of one shape are one matrix when they are concatenated; few of a kind become a flat
    tensor with the others, whose sums are by segment.
    """

    def __init__(self, specs: TensorSpecs) -> None:
        sizes = specs.row_sizes
        one_each = specs.one_row_each
        alike: dict[object, list[int]] = {}
        self.large: list[int] = []
        for index, size in enumerate(sizes):
            if size > total.SMALL:
                self.large.append(index)
            else:
                alike.setdefault(specs.shapes[index] if one_each else (size,), []).append(index)
        matrices: list[tuple[list[int], bool]] = []
        rest: list[int] = []
        for shape, indices in alike.items():
            if len(indices) >= total.ALIKE and shape:  # numbers cannot be concatenated
                size = sizes[indices[0]]
                fits = size >= total.WORTH_LANES and size % total.LANES == 0
                in_lanes = fits and specs.dtypes[0] is not torch.float64
                limit = total.GATHERED_IN_LANES if in_lanes else total.GATHERED
                matrices += [(piece, in_lanes) for piece in total.cut(indices, sizes, limit)]
            else:
                rest += indices
        segments = total.cut(rest, sizes, total.GATHERED)
        self.matrices = [(total.taker(indices), in_lanes) for indices, in_lanes in matrices]
        self.in_lanes = any(in_lanes for _, in_lanes in matrices)
        self.segments = [
            (total.taker(indices), torch.tensor([sizes[index] for index in indices], device="cpu"))
            for indices in segments
        ]
        gathered = [indices for indices, _ in matrices]
        order = [index for indices in (*gathered, *segments, self.large) for index in indices]
        # Where each row is found among the results of all of them.
        placed = order == sorted(order)
        self.places = None if placed else torch.tensor(order, device="cpu").argsort()


def _by_rows(batch: Batch, p: float, large: Callable[[Tensor], float]) -> Tensor:
    """Reduce each row to its sum for p = 1, 2, or its maximum for p = inf: float64 (R,)."""
    if not batch.specs.one_row_each and all(batch.specs.flat):
        return matrices.reduced(batch, p)
    gathering, top = batch.specs.plan(_Gathering), batch.top if p != inf else None
    # Rows of a tensor with gaps are no vectors, and become some only when they are gathered.
    gapped = not batch.specs.one_row_each
    rows = _rows(batch) if gapped else batch.tensors
    buffer = None
    if gathering.in_lanes and p == _EUCLIDEAN:  # one, whose pages are slower to get than to fill
        buffer = torch.empty(total.GATHERED_IN_LANES, dtype=batch.dtype, device="cpu")
    results = []
    for take, in_lanes in gathering.matrices:
        taken = [row.reshape(-1) for row in take(rows)] if gapped else take(rows)
        results.append(_of_matrix(taken, p, top, buffer if in_lanes else None))
    for take, lengths in gathering.segments:
        values = _flatten_dense_tensors(take(rows)).to(torch.float64, copy=True)
        if top is not None:
            blocks.clamp_to_(values, top)
        powers = values.square_() if p == _EUCLIDEAN else values.abs_()
        kind = "max" if p == inf else "sum"
        results.append(
            torch.segment_reduce(powers, kind, lengths=lengths, unsafe=True, initial=0.0)
        )
    if gathering.large:
        found = [large(blocks.flat(rows[i])) for i in gathering.large]
        results.append(torch.tensor(found, dtype=torch.float64, device="cpu"))
    if not results:
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    together = results[0] if len(results) == 1 else torch.cat(results)
    return together if gathering.places is None else together[gathering.places]


def _of_matrix(
    rows: Sequence[Tensor], p: float, top: float | Tensor | None, buffer: Tensor | None
) -> Tensor:
    """Reduce rows of one shape: (R,); in lanes where there is a buffer, and that is right."""
    if buffer is not None and (sums := _lane_sums(rows, buffer, top)) is not None:
        return sums
    together = torch.cat(list(rows))
    if top is not None:
        blocks.clamp_to_(together, top)
    # Maxima are exact in any dtype; torch's norm of order inf takes ten times as long.
    dtype = together.dtype if p == inf else torch.float64
    matrix = together.to(dtype, memory_format=torch.contiguous_format).view(len(rows), -1)
    if matrix.numel() == 0:
        return torch.zeros(len(rows), dtype=torch.float64, device="cpu")
    if p == inf:
        return matrix.abs_().amax(1).to(torch.float64)
    norms: Tensor = torch.linalg.vector_norm(matrix, p, dim=1)
    return norms.square_() if p == _EUCLIDEAN else norms


def _lane_sums(rows: Sequence[Tensor], buffer: Tensor, top: float | Tensor | None) -> Tensor | None:
    """Sum squares by rows of 256 and those in float64: (R,); None where that is not right."""
    count, shape, size = len(rows), rows[0].shape, rows[0].numel()
    flat = buffer[: count * size]
    torch.cat(list(rows), out=flat.view(count * shape[0], *shape[1:]))
    if top is not None:
        blocks.clamp_to_(flat, top)
    if flat.dtype in halves.HALVES and halves.can_sum():
        sums = halves.square_sums(flat, total.LANES).view(count, -1).sum(1, dtype=torch.float64)
    else:
        lanes = flat.to(torch.float32).view(count, -1, total.LANES)
        in_lanes = torch.linalg.vector_norm(lanes, dim=2)
        sums = torch.linalg.vector_norm(in_lanes, dim=1, dtype=torch.float64).square_()
    low = size * total.LOST_FLOAT32_SQUARE
    # Neither NaN, infinities and what overflowed, nor squares that vanished.
    return sums if bool(((sums >= low) & (sums < inf)).all()) else None


def _large_sum(row: Tensor, p: float, top: float | Tensor | None) -> float:
    if p == _EUCLIDEAN and top is None and _is_half(row):
        found = halves.square_sum(row)
    else:
        found = sum(_lane_sum(block, p) for block in _native_blocks(row, p, top))
    lost = _LOST_SQUARE.get(row.dtype, total.LOST_FLOAT32_SQUARE) if p == _EUCLIDEAN else 0.0
    if isfinite(found) and found >= row.numel() * lost:
        return found
    largest = float(blocks.abs_max(row))
    return float(blocks.power_sum(row, p, 0, top)) if largest != 0 else 0.0


def _is_half(row: Tensor) -> bool:
    is_flat = row.dim() == 1 and row.is_contiguous()
    return row.dtype in halves.HALVES and is_flat and halves.can_sum()


def _native_blocks(row: Tensor, p: float, top: float | Tensor | None) -> Iterator[Tensor]:
    """Yield a row in float32 or float64, 1-d: itself where it is that already and p is 2.

    For p = 1 these are moduli. Blocks share their memory.
    """
    native = row.dtype in {torch.float32, torch.float64}
    if native and p == _EUCLIDEAN and top is None and row.dim() == 1:
        yield from blocks.pieces(row, total.SUMMED)
        return
    dtype = row.dtype if native else torch.float32
    size = min(_CONVERTED // dtype.itemsize, row.numel())
    buffer = torch.empty(size, dtype=dtype, device="cpu")
    for piece in blocks.pieces(row, size):
        block = buffer[: piece.numel()]
        there = block if piece.dim() == 1 else block.view(piece.shape)
        if native and top is not None:
            torch.clamp(piece, -top, top, out=there)  # type: ignore[arg-type]
        elif native and p != _EUCLIDEAN:
            torch.abs(piece, out=there)
        else:
            there.copy_(piece)
        if top is not None and not native:
            blocks.clamp_to_(block, top)
        if p != _EUCLIDEAN and not (native and top is None):
            block.abs_()
        yield block


def _lane_sum(values: Tensor, p: float) -> float:
    """Sum squares, or moduli that were taken already, by rows of 256 and those in float64."""
    rest = len(values) % total.LANES
    lanes = values[: len(values) - rest].view(-1, total.LANES)
    if p == _EUCLIDEAN:
        in_lanes = torch.linalg.vector_norm(lanes, dim=1)
        norm = float(torch.linalg.vector_norm(in_lanes, dtype=torch.float64))
        found = norm * norm
    else:
        found = float(lanes.sum(1).sum(dtype=torch.float64))
    if not rest:
        return found
    tail = values[-rest:].double()
    return found + float((tail.square() if p == _EUCLIDEAN else tail).sum())


def _with_range(sums_R: Tensor, batch: Batch, p: float) -> Tensor:
    """Add the sums that keep float64's extremes in range: (R, 3)."""
    wide_RA = blocks.widened(sums_R.unsqueeze(1), p)
    for index, row in enumerate(_rows(batch)):
        if row.numel() and _may_leave_range(sums_R[index], row):
            for column, exponent in ((1, -blocks.SCALE_EXPONENT), (2, blocks.SCALE_EXPONENT)):
                wide_RA[index, column] = blocks.power_sum(row, p, exponent, batch.top)
    return wide_RA


def _may_leave_range(found: Tensor, row: Tensor) -> bool:
    if row.device.type != "cpu":
        return True
    value = float(found)
    return not (isfinite(value) and value >= row.numel() * _LOST_SQUARE[torch.float64])


def _exceeding(batch: Batch, top: float) -> list[Tensor]:
    """Return the tensors that have an element with a modulus above a number."""
    maxima = iter(abs_max(batch)[:, 0].tolist())
    chosen = []
    for tensor, n in zip(batch.tensors, batch.specs.rows, strict=True):
        largest = [next(maxima) for _ in range(n)]
        exceeds = any(m > top for m in largest)
        if not exceeds and any(map(isnan, largest)):  # a NaN hides what else there is
            exceeds = int(blocks.count_beyond(blocks.flat(tensor), top)) > 0
        if exceeds:
            chosen.append(tensor)
    return chosen


def _scaling_together(tensors: list[Tensor], coefficient: float) -> list[Write]:
    """Prepare to multiply tensors of one dtype by one coefficient.

    It is a tensor, since a number is rounded to bfloat16 first, and of their own dtype where that
    is precise, since torch converts another for each of them.
    """
    if coefficient == 1 or not tensors:
        return []
    if coefficient == 0:
        return [Write(torch._foreach_zero_, (tensors,))]
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    steps = [coefficient]
    if coefficient < _COARSE_COEFFICIENT:
        steps = [_COARSE_COEFFICIENT, coefficient / _COARSE_COEFFICIENT]
    factors = [torch.scalar_tensor(step, dtype=dtype, device="cpu") for step in steps]
    return [Write(torch._foreach_mul_, (tensors, [f] * len(tensors))) for f in factors]


def _scaling_rows(tensor: Tensor, factors: Tensor) -> list[Write]:
    """Prepare to multiply the rows of a tensor; a factor of 0 sets zeros, whatever was there."""
    steps = [factors]
    is_coarse = factors < _COARSE_COEFFICIENT
    if tensor.dtype is torch.float32 and bool(is_coarse.any()):
        first = torch.ones_like(factors).masked_fill_(is_coarse, _COARSE_COEFFICIENT)
        steps = [first, factors / first]
    shapes = [shaped(step.to(tensor.dtype), tensor) for step in steps]
    writes = [Write(torch._foreach_mul_, ([tensor], [factor])) for factor in shapes]
    is_zero = shaped(factors == 0, tensor)
    if bool(is_zero.any()):
        writes.append(Write(_fill_zeros, ([tensor], [is_zero])))
    return writes


def _fill_zeros(tensors: list[Tensor], zeros: list[Tensor]) -> None:
    for tensor, is_zero in zip(tensors, zeros, strict=True):
        tensor.masked_fill_(is_zero, 0.0)
