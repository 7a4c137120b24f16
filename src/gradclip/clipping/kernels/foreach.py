"""The portable backend: torch's own operations, arranged so that sums are right.

On the CPU a large tensor is summed as rows of 128 elements in its own precision and those in
float64, which reads at the speed of memory and errs by about 1e-7; small tensors are converted
to float64 together. Where float32 squares may have left their range, a tensor is counted anew in
float64. On an accelerator torch's multi-tensor norm accumulates in float64, and nothing here
reads the host.
"""

from collections.abc import Callable, Iterable, Sequence
from math import inf, isfinite
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from gradclip.clipping.kernels import Batch, Clamped, TensorSpecs, blocks
from gradclip.clipping.kernels.device import result_device_of

_SMALL = 8192
"""Rows up to this many elements are gathered and converted to float64 together."""

_GATHERED = 1 << 15
"""Elements gathered at a time: they stay in a cache, and start no threads."""

_WORTH_LANES = 1024
"""Rows from this many elements on are summed as those of large tensors are, if they are alike."""

_GATHERED_IN_LANES = 1 << 18
"""Elements gathered at a time for that, which is worth threads."""

_ALIKE = 4
"""Rows of one shape that are worth a gathering of their own, which is cheaper for each."""

_CONVERTED = 1 << 21
"""Elements of a large tensor converted at a time, so that no temporary grows with the model."""

_LANES = 128
"""Elements that are summed in the tensor's own precision before float64 takes over."""

_LOST_SQUARE = {torch.float64: 2.0**-960}
_LOST_FLOAT32_SQUARE = 2.0**-100
"""Below this mean square, squares that vanished could be 2^-26 of the sum."""

_COARSE_COEFFICIENT = 2.0**-120
"""Smaller coefficients are applied in two steps, since float32 would round them coarsely."""

_EUCLIDEAN = 2.0

coefficients = blocks.coefficients


def power_sums(batch: Batch, p: float) -> Tensor:
    """Sum ``|x|**p`` over each row for p = 1, 2: (R, A); see ``Kernels.power_sums``."""
    if _on_cpu(batch):
        sums_R = _by_rows(batch, p, lambda row: _large_sum(row, p))
    else:
        sums_R = _norms_on_device(batch, p, lambda row: blocks.power_sum(row, p)).pow(p)
    if batch.dtype is torch.float64:
        return _with_range(sums_R, batch, p)
    return sums_R.unsqueeze(1)


def abs_max(batch: Batch) -> Tensor:
    """Find the largest modulus of each row: (R, 1)."""
    if _on_cpu(batch):
        return _by_rows(batch, inf, lambda row: float(blocks.abs_max(row))).unsqueeze(1)
    return _norms_on_device(batch, inf, blocks.abs_max).unsqueeze(1)


def scaled_power_sums(batch: Batch, p: float, scale_R: Tensor) -> Tensor:
    """Sum ``|x / scale|**p`` over each row: (R, 1)."""
    if not batch.specs.row_sizes:
        return torch.zeros(0, 1, dtype=torch.float64, device=scale_R.device)
    pairs = zip(_rows(batch), scale_R, strict=True)
    return torch.stack([blocks.scaled_power_sum(row, p, scale) for row, scale in pairs])[:, None]


def scale_(batch: Batch, coefficients: float | Tensor) -> None:
    """Multiply each row by its coefficient, or all by the one that there is."""
    if not _on_cpu(batch):
        _scale_on_device(batch, torch.as_tensor(coefficients).reshape(-1))
    elif not isinstance(coefficients, Tensor) or coefficients.numel() == 1:
        _scale_together(list(batch.tensors), float(coefficients))
    else:
        per_tensor = coefficients.split(batch.specs.rows)
        for tensor, factors in zip(batch.tensors, per_tensor, strict=True):
            if len(factors) == 1:
                _scale_together([tensor], float(factors))
            elif bool((factors != 1).any()):
                _scale_rows(tensor, factors)


def clamp_(batch: Batch, limit: float | Tensor, before: bool = True) -> Clamped:
    """Clamp to [-limit, limit]; on the CPU only the tensors that exceed it are written."""
    before_RA = power_sums(batch, _EUCLIDEAN) if before else None
    top = blocks.representable(limit, batch.dtype)
    exceeding: Iterable[Tensor] = batch.tensors
    if _on_cpu(batch):
        one_row_each = Batch.of(batch.tensors)
        largest = abs_max(one_row_each)[:, 0].tolist()
        exceeding = [t for t, m in zip(batch.tensors, largest, strict=True) if not m <= top]
    changed = [_clamp_one(tensor, top) for tensor in exceeding]
    if not changed:
        return Clamped(before_RA, before_RA, torch.zeros((), dtype=torch.int64))
    return Clamped(before_RA, power_sums(batch, _EUCLIDEAN), torch.stack(changed).sum())


def _on_cpu(batch: Batch) -> bool:
    return batch.device.type == "cpu"


def _rows(batch: Batch) -> list[Tensor]:
    """Return every row of a batch, 1-d."""
    pairs = zip(batch.tensors, batch.specs.rows, strict=True)
    return [row for tensor, n in pairs for row in blocks.rows_of(tensor, n)]


def _flat(row: Tensor) -> Tensor:
    return row.view(-1) if row.is_contiguous() else blocks.rows_of(row, 1)[0]


def _clamp_one(tensor: Tensor, top: Any) -> Tensor:
    changed: Tensor = (tensor.abs() > top).sum()
    tensor.clamp_(-top, top)
    return changed


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
            if size > _SMALL:
                self.large.append(index)
            else:
                alike.setdefault(specs.shapes[index] if one_each else (size,), []).append(index)
        matrices: list[tuple[list[int], bool]] = []
        rest: list[int] = []
        for shape, indices in alike.items():
            if len(indices) >= _ALIKE and shape:  # numbers cannot be concatenated
                size = sizes[indices[0]]
                fits = size >= _WORTH_LANES and size % _LANES == 0
                in_lanes = fits and specs.dtypes[0] is not torch.float64
                limit = _GATHERED_IN_LANES if in_lanes else _GATHERED
                matrices += [(cut, in_lanes) for cut in _cut(indices, sizes, limit)]
            else:
                rest += indices
        segments = _cut(rest, sizes, _GATHERED)
        self.matrices = [
            (_taker(indices), len(indices), in_lanes) for indices, in_lanes in matrices
        ]
        self.segments = [
            (_taker(indices), torch.tensor([sizes[index] for index in indices]))
            for indices in segments
        ]
        gathered = [indices for indices, _ in matrices]
        order = [index for indices in (*gathered, *segments, self.large) for index in indices]
        # Where each row is found among the results of all of them.
        self.places = torch.tensor(order).argsort() if order != sorted(order) else None


def _taker(indices: list[int]) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
    """Return what takes the elements of a sequence at some indices."""
    if len(indices) == 1:
        return lambda rows: (rows[indices[0]],)
    return itemgetter(*indices)


def _cut(indices: list[int], sizes: list[int], limit: int) -> list[list[int]]:
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


def _by_rows(batch: Batch, p: float, large: Callable[[Tensor], float]) -> Tensor:
    """Reduce each row to its sum for p = 1, 2, or its maximum for p = inf: float64 (R,)."""
    gathering = batch.specs.plan(_Gathering)
    rows = batch.tensors if batch.specs.one_row_each else _rows(batch)
    results = []
    buffer = None
    for take, count, in_lanes in gathering.matrices:
        if in_lanes and p == _EUCLIDEAN:
            if buffer is None:  # one for all, since its pages are slower to get than to fill
                buffer = torch.empty(_GATHERED_IN_LANES, dtype=batch.dtype)
            sums = _lane_sums(take(rows), buffer)
            if sums is not None:
                results.append(sums)
                continue
        together = torch.cat(take(rows))
        # Maxima are exact in any dtype; torch's norm of order inf takes ten times as long.
        dtype = batch.dtype if p == inf else torch.float64
        matrix = together.to(dtype, memory_format=torch.contiguous_format).view(count, -1)
        if matrix.numel() == 0:
            results.append(torch.zeros(count, dtype=torch.float64))
        elif p == inf:
            results.append(matrix.abs_().amax(1).to(torch.float64))
        else:
            norms = torch.linalg.vector_norm(matrix, p, dim=1)
            results.append(norms.square_() if p == _EUCLIDEAN else norms)
    for take, lengths in gathering.segments:
        values = _flatten_dense_tensors(take(rows)).to(torch.float64, copy=True)
        powers = values.square_() if p == _EUCLIDEAN else values.abs_()
        kind = "max" if p == inf else "sum"
        results.append(
            torch.segment_reduce(powers, kind, lengths=lengths, unsafe=True, initial=0.0)
        )
    if gathering.large:
        found = [large(_flat(rows[i])) for i in gathering.large]
        results.append(torch.tensor(found, dtype=torch.float64))
    if not results:
        return torch.zeros(0, dtype=torch.float64)
    together = results[0] if len(results) == 1 else torch.cat(results)
    return together if gathering.places is None else together[gathering.places]


def _lane_sums(rows: tuple[Tensor, ...], buffer: Tensor) -> Tensor | None:
    """Sum squares by rows of 128 and those in float64: (R,); None where that is not right."""
    count, shape, size = len(rows), rows[0].shape, rows[0].numel()
    flat = buffer[: count * size]
    torch.cat(rows, out=flat.view(count * shape[0], *shape[1:]))
    in_lanes = torch.linalg.vector_norm(flat.to(torch.float32).view(count, -1, _LANES), dim=2)
    sums = torch.linalg.vector_norm(in_lanes, dim=1, dtype=torch.float64).square_()
    low = size * _LOST_FLOAT32_SQUARE
    # Neither NaN, infinities and what overflowed, nor squares that vanished.
    return sums if bool(((sums >= low) & (sums < inf)).all()) else None


def _large_sum(row: Tensor, p: float) -> float:
    total = sum(_lane_sum(block, p) for block in _native_blocks(row, p))
    lost = _LOST_SQUARE.get(row.dtype, _LOST_FLOAT32_SQUARE) if p == _EUCLIDEAN else 0.0
    if isfinite(total) and total >= row.numel() * lost:
        return total
    largest = float(blocks.abs_max(row))
    return float(blocks.power_sum(row, p)) if largest != 0 else 0.0


def _native_blocks(row: Tensor, p: float) -> Iterable[Tensor]:
    """Yield a row in float32 or float64: itself where it is that already and p is 2."""
    native = row.dtype in {torch.float32, torch.float64}
    if native and p == _EUCLIDEAN:
        yield row
        return
    buffer = torch.empty(min(_CONVERTED, row.numel()), dtype=row.dtype if native else torch.float32)
    for piece in row.split(_CONVERTED):
        block = buffer[: len(piece)]
        if native:
            yield torch.abs(piece, out=block)
        else:
            yield block.copy_(piece) if p == _EUCLIDEAN else block.copy_(piece).abs_()


def _lane_sum(values: Tensor, p: float) -> float:
    """Sum squares, or moduli that were taken already, by rows of 128 and those in float64."""
    rest = len(values) % _LANES
    lanes = values[: len(values) - rest].view(-1, _LANES)
    if p == _EUCLIDEAN:
        in_lanes = torch.linalg.vector_norm(lanes, dim=1)
        norm = float(torch.linalg.vector_norm(in_lanes, dtype=torch.float64))
        total = norm * norm
    else:
        total = float(lanes.sum(1).sum(dtype=torch.float64))
    if not rest:
        return total
    tail = values[-rest:].double()
    return total + float((tail.square() if p == _EUCLIDEAN else tail).sum())


def _with_range(sums_R: Tensor, batch: Batch, p: float) -> Tensor:
    """Add the sums that keep float64's extremes in range: (R, 3)."""
    wide_RA = blocks.widened(sums_R.unsqueeze(1), p)
    for index, row in enumerate(_rows(batch)):
        if row.numel() and _may_leave_range(sums_R[index], row):
            for column, exponent in ((1, -blocks.SCALE_EXPONENT), (2, blocks.SCALE_EXPONENT)):
                wide_RA[index, column] = blocks.power_sum(row, p, exponent)
    return wide_RA


def _may_leave_range(total: Tensor, row: Tensor) -> bool:
    if row.device.type != "cpu":
        return True
    value = float(total)
    return not (isfinite(value) and value >= row.numel() * _LOST_SQUARE[torch.float64])


def _scale_together(tensors: list[Tensor], coefficient: float) -> None:
    """Multiply tensors of one dtype by one coefficient.

    It is a tensor, since a number is rounded to bfloat16 first, and of their own dtype where that
    is precise, since torch converts another for each of them.
    """
    if coefficient == 1 or not tensors:
        return
    if coefficient == 0:
        torch._foreach_zero_(tensors)
        return
    if coefficient < _COARSE_COEFFICIENT:
        _scale_together(tensors, _COARSE_COEFFICIENT)
        coefficient /= _COARSE_COEFFICIENT
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    torch._foreach_mul_(tensors, torch.tensor(coefficient, dtype=dtype))


def _scale_rows(tensor: Tensor, factors: Tensor) -> None:
    """Multiply the rows of one tensor; where a factor is 0, what was there does not matter."""
    if not len(factors):
        return
    per_row = factors.reshape(-1, *(1,) * (tensor.dim() - 1)) if len(factors) > 1 else factors[0]
    tensor.mul_(per_row).masked_fill_(per_row == 0, 0.0)


# --- accelerators, where the host is never read ------------------------------------------------


def _norms_on_device(batch: Batch, p: float, by_blocks: Callable[[Tensor], Tensor]) -> Tensor:
    """Return each row's p-norm, float64 (R,), for p = 1, 2, inf."""
    if not batch.specs.one_row_each or result_device_of((batch.device,)) != batch.device:
        if not batch.specs.row_sizes:
            return torch.zeros(0, dtype=torch.float64, device=result_device_of((batch.device,)))
        sums = torch.stack([by_blocks(row) for row in _rows(batch)])
        return sums if p == inf else sums.pow(1 / p)
    filled = [index for index, size in enumerate(batch.specs.row_sizes) if size]
    norms = [torch.zeros((), dtype=torch.float64, device=batch.device)] * len(batch.tensors)
    if filled:
        tensors = [batch.tensors[index] for index in filled]
        found = torch._foreach_norm(tensors, p, dtype=torch.float64)  # noqa: SLF001
        for index, norm in zip(filled, found, strict=True):
            norms[index] = norm
    return torch.stack(norms)


def _scale_on_device(batch: Batch, coefficients: Tensor) -> None:
    """Multiply in the precision of float32 at least: a bfloat16 coefficient would be coarse."""
    precise = coefficients.to(torch.promote_types(batch.dtype, torch.float32))
    if len(precise) == 1:
        for tensor in batch.tensors:
            tensor.mul_(precise[0]).masked_fill_(precise[0] == 0, 0.0)
        return
    for tensor, factors in zip(batch.tensors, precise.split(batch.specs.rows), strict=True):
        _scale_rows(tensor, factors)
