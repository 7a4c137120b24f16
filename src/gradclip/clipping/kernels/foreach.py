"""The portable backend: torch's own operations, arranged so that sums are right.

On the CPU a large tensor is summed as rows of 128 elements in its own precision and those in
float64, which reads at the speed of memory and errs by about 1e-7; small tensors are converted
to float64 together. Where float32 squares may have left their range, a tensor is counted anew in
float64. On an accelerator torch's multi-tensor norm accumulates in float64, and nothing here
reads the host.
"""

from collections.abc import Callable, Iterable, Sequence
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from gradclip.clipping.kernels import blocks

_SMALL = 1024
"""Tensors up to this many elements are gathered and converted to float64 together."""

_EXACT = 8192
"""A tensor up to this many elements is converted to float64, which then needs no second look."""

_GATHERED = 1 << 15
"""Elements of small tensors gathered at a time: they stay in a cache, and start no threads."""

_CONVERTED = 1 << 20
"""Elements of a large tensor converted at a time, so that no temporary grows with the model."""

_LANES = 128
"""Elements that are summed in the tensor's own precision before float64 takes over."""

_LOST_SQUARE = {torch.float64: 2.0**-960}
_LOST_FLOAT32_SQUARE = 2.0**-100
"""Below this mean square, squares that vanished could be 2^-26 of the sum."""

_COARSE_COEFFICIENT = 2.0**-120
"""Smaller coefficients are applied in two steps, since float32 would round them coarsely."""

_EUCLIDEAN = 2.0


def power_sums(tensors: Sequence[Tensor], rows: Sequence[int], p: float) -> Tensor:
    """Sum ``|x|**p`` over each row for p = 1, 2: (R, A); see ``Kernels.power_sums``."""
    if _on_cpu(tensors):
        sums_R = _by_rows(tensors, rows, _small_sums(p), lambda row: _large_sum(row, p))
    else:
        sums_R = _on_device(tensors, rows, p, lambda row: blocks.power_sum(row, p)).pow(p)
    if torch.float64 in {tensor.dtype for tensor in tensors}:
        return _with_range(sums_R, tensors, rows, p)
    return sums_R.unsqueeze(1)


def abs_max(tensors: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """Find the largest modulus of each row: (R, 1)."""
    if _on_cpu(tensors):
        return _by_rows(tensors, rows, _small_maxima, lambda r: float(blocks.abs_max(r)))[:, None]
    return _on_device(tensors, rows, inf, blocks.abs_max)[:, None]


def scaled_power_sums(
    tensors: Sequence[Tensor], rows: Sequence[int], p: float, scale_R: Tensor
) -> Tensor:
    """Sum ``|x / scale|**p`` over each row: (R, 1)."""
    pairs = zip(_each_row(tensors, rows), scale_R, strict=True)
    return torch.stack([blocks.scaled_power_sum(row, p, scale) for row, scale in pairs])[:, None]


def scale_(tensors: Sequence[Tensor], rows: Sequence[int], coefficients: float | Tensor) -> None:
    """Multiply each row by its coefficient, or all by the one that there is."""
    if not _on_cpu(tensors):
        _scale_on_device(tensors, rows, torch.as_tensor(coefficients).reshape(-1))
    elif not isinstance(coefficients, Tensor) or coefficients.numel() == 1:
        _scale_together(list(tensors), float(coefficients))
    else:
        for tensor, factors in zip(tensors, coefficients.split(list(rows)), strict=True):
            if len(factors) == 1:
                _scale_together([tensor], float(factors))
            elif bool((factors != 1).any()):
                tensor.mul_(factors.reshape(-1, *(1,) * (tensor.dim() - 1)))


def clamp_(tensors: Sequence[Tensor], limit: float | Tensor) -> Tensor:
    """Clamp to [-limit, limit]; on the CPU only the tensors that exceed it are written.

    On an accelerator, what is clamped in a tensor that holds a NaN too does not show in the answer.
    """
    tops = [_representable(limit, tensor.dtype) for tensor in tensors]
    maxima = abs_max(tensors, [1] * len(tensors))
    if not _on_cpu(tensors):
        for tensor, top in zip(tensors, tops, strict=True):
            tensor.clamp_(-top, top)
        return (maxima[:, 0] > limit).any()
    changed = False
    for tensor, top, largest in zip(tensors, tops, maxima[:, 0].tolist(), strict=True):
        if not largest <= top:
            changed |= largest > top or bool((tensor.abs() > top).any())
            tensor.clamp_(-top, top)
    return torch.tensor(changed)


def zero_(tensors: Sequence[Tensor], where: Tensor) -> None:
    """Set all elements to zero if the 0-d bool says so."""
    if not _on_cpu(tensors):
        for tensor in tensors:
            tensor.masked_fill_(where, 0.0)
    elif where:
        torch._foreach_zero_(list(tensors))


def _on_cpu(tensors: Sequence[Tensor]) -> bool:
    return tensors[0].device.type == "cpu"


def _each_row(tensors: Sequence[Tensor], rows: Sequence[int]) -> Iterable[Tensor]:
    for tensor, n in zip(tensors, rows, strict=True):
        yield from blocks.rows_of(tensor, n)


def _representable(limit: float | Tensor, dtype: torch.dtype) -> Any:
    if isinstance(limit, Tensor):
        return limit.clamp(max=torch.finfo(dtype).max).to(dtype)
    top = min(limit, torch.finfo(dtype).max)
    return top if dtype is torch.float64 else float(torch.tensor(top, dtype=dtype))


# --- the CPU, where the host reads for nothing -------------------------------------------------

_Small = Callable[[Tensor, Tensor], Tensor]
_Large = Callable[[Tensor], float]


def _by_rows(
    tensors: Sequence[Tensor], rows: Sequence[int], small: _Small, large: _Large
) -> Tensor:
    """Reduce each row to a number: small rows of one dtype together, each large one by itself."""
    if max(rows) > 1:
        tensors = list(_each_row(tensors, rows))
    sizes = [tensor.numel() for tensor in tensors]
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1 and max(sizes) <= _SMALL and sum(sizes) <= _GATHERED:
        return small(_flatten_dense_tensors(tensors), torch.tensor(sizes))
    found = [0.0] * len(sizes)
    gathered: dict[torch.dtype, list[int]] = {}
    for index, size in enumerate(sizes):
        if size > _SMALL:
            found[index] = large(_flat(tensors[index]))
        else:
            gathered.setdefault(tensors[index].dtype, []).append(index)
    results = torch.tensor(found, dtype=torch.float64)
    for indices in gathered.values():
        for batch in _batches(indices, sizes):
            flat = _flatten_dense_tensors([tensors[index] for index in batch])
            results[batch] = small(flat, torch.tensor([sizes[index] for index in batch]))
    return results


def _flat(tensor: Tensor) -> Tensor:
    return tensor.view(-1) if tensor.is_contiguous() else blocks.rows_of(tensor, 1)[0]


def _batches(indices: list[int], sizes: list[int]) -> Iterable[list[int]]:
    """Cut indices so that no batch holds more elements than are gathered at a time."""
    start, total = 0, 0
    for position, index in enumerate(indices):
        if total + sizes[index] > _GATHERED:
            yield indices[start:position]
            start, total = position, 0
        total += sizes[index]
    yield indices[start:]


def _small_sums(p: float) -> _Small:
    def sums(values: Tensor, lengths: Tensor) -> Tensor:
        doubles = values.to(torch.float64, copy=True)
        powers = doubles.square_() if p == _EUCLIDEAN else doubles.abs_()
        return torch.segment_reduce(powers, "sum", lengths=lengths, unsafe=True)

    return sums


def _small_maxima(values: Tensor, lengths: Tensor) -> Tensor:
    moduli = values.to(torch.float64, copy=True).abs_()
    return torch.segment_reduce(moduli, "max", lengths=lengths, unsafe=True, initial=0.0)


def _large_sum(row: Tensor, p: float) -> float:
    if row.numel() <= _EXACT and row.dtype is not torch.float64:
        norm = float(torch.linalg.vector_norm(row.double(), p))
        return norm * norm if p == _EUCLIDEAN else norm
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
    body = values[: len(values) - len(values) % _LANES].view(-1, _LANES)
    tail = values[body.numel() :].double()
    if p != _EUCLIDEAN:
        return float(body.sum(1).double().sum() + tail.sum())
    norms = torch.linalg.vector_norm(body, dim=1).double()
    return float(norms.square_().sum()) + float(tail.square().sum())


def _with_range(sums_R: Tensor, tensors: Sequence[Tensor], rows: Sequence[int], p: float) -> Tensor:
    """Add the sums that keep float64's extremes in range: (R, 3)."""
    wide_RA = blocks.widened(sums_R.unsqueeze(1), p)
    for index, row in enumerate(_each_row(tensors, rows)):
        if row.dtype is torch.float64 and row.numel() and _may_leave_range(sums_R[index], row):
            for column, exponent in ((1, -blocks.SCALE_EXPONENT), (2, blocks.SCALE_EXPONENT)):
                wide_RA[index, column] = blocks.power_sum(row, p, exponent)
    return wide_RA


def _may_leave_range(total: Tensor, row: Tensor) -> bool:
    if row.device.type != "cpu":
        return True
    value = float(total)
    return not (isfinite(value) and value >= row.numel() * _LOST_SQUARE[torch.float64])


def _scale_together(tensors: list[Tensor], coefficient: float) -> None:
    """Multiply by one coefficient; a tensor of it, since a number is rounded to bfloat16 first."""
    if coefficient == 1:
        return
    if 0 < coefficient < _COARSE_COEFFICIENT:
        _scale_together(tensors, _COARSE_COEFFICIENT)
        coefficient /= _COARSE_COEFFICIENT
    torch._foreach_mul_(tensors, torch.tensor(coefficient, dtype=torch.float64))


# --- accelerators, where the host is never read ------------------------------------------------


def _on_device(
    tensors: Sequence[Tensor], rows: Sequence[int], p: float, by_blocks: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return each row's p-norm, float64 (R,), for p = 1, 2, inf."""
    if any(n != 1 for n in rows) or blocks.home_of((tensors[0].device,)) != tensors[0].device:
        sums = torch.stack([by_blocks(row) for row in _each_row(tensors, rows)])
        return sums if p == inf else sums.pow(1 / p)
    zero = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    norms = [zero] * len(tensors)
    filled = [index for index, tensor in enumerate(tensors) if tensor.numel()]
    for dtype in {tensors[index].dtype for index in filled}:
        where = [index for index in filled if tensors[index].dtype is dtype]
        found = torch._foreach_norm([tensors[i] for i in where], p, dtype=torch.float64)  # noqa: SLF001
        for index, norm in zip(where, found, strict=True):
            norms[index] = norm
    return torch.stack(norms)


def _scale_on_device(tensors: Sequence[Tensor], rows: Sequence[int], coefficients: Tensor) -> None:
    """Multiply in the precision of float32 at least: a bfloat16 coefficient would be coarse."""
    per_tensor = (
        [coefficients] * len(tensors) if len(coefficients) == 1 else coefficients.split(list(rows))
    )
    for tensor, factors in zip(tensors, per_tensor, strict=True):
        precise = factors.to(torch.promote_types(tensor.dtype, torch.float32))
        shape = (-1, *(1,) * (tensor.dim() - 1)) if len(factors) > 1 else ()
        tensor.mul_(precise.reshape(shape))
