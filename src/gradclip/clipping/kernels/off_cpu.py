"""The portable backend on accelerators: as few operations as torch's own functions, no host read.

torch's multi-tensor norm accumulates in float64. A device that has no float64 sums blocks in
float32, and the CPU adds up their sums in float64; a block whose squares left the range of float32
is counted again, divided by its largest modulus. No gradient is copied to the host.
"""

from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor

from gradclip.clipping.kernels import Batch, Write
from gradclip.clipping.kernels.blocks import clamp_to_, pieces, rows_of
from gradclip.clipping.kernels.device import result_device_of
from gradclip.clipping.kernels.rows import shaped
from gradclip.clipping.kernels.writes import run_each

_EUCLIDEAN = 2.0
_BLOCK = 1 << 16
"""Elements that a device without float64 sums at a time."""

_CONVERTED = 1 << 24
"""Elements of a matrix whose rows are reduced together, since torch may convert them all first."""

_LOST = 2.0**-100
"""Below this mean square, squares that float32 lost could be 2^-26 of the sum."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_HALVES = frozenset({torch.bfloat16, torch.float16})
_UNSCALING = frozenset({"cuda", "xpu"})
"""Devices on which torch multiplies all tensors of half precision by one factor of float32."""


def reduced(batch: Batch, p: float) -> Tensor | None:
    """Return each row's sum of powers for p = 1, 2, or its maximum for p = inf: float64 (R,).

    None where no operation takes all rows.
    """
    if batch.dtype.is_complex:
        return None
    if result_device_of((batch.device,)) != batch.device:
        return _in_float32(batch, p) if p in {1.0, _EUCLIDEAN} else None
    if batch.limit is not None:
        return None
    if not batch.specs.one_row_each:
        return _by_tensor(batch, p)
    filled = [index for index, size in enumerate(batch.specs.row_sizes) if size]
    norms = [torch.zeros((), dtype=torch.float64, device=batch.device)] * len(batch.tensors)
    if filled:
        tensors = [batch.tensors[index] for index in filled]
        found = torch._foreach_norm(tensors, p, dtype=torch.float64)  # noqa: SLF001
        for index, norm in zip(filled, found, strict=True):
            norms[index] = norm
    norms_R = torch.stack(norms)
    return norms_R.square() if p == _EUCLIDEAN else norms_R


def _by_tensor(batch: Batch, p: float) -> Tensor:
    """Reduce the rows of each tensor together: an operation for each row would be very many."""
    norms = [torch.zeros(0, dtype=torch.float64, device=batch.device)]
    for tensor, rows in zip(batch.tensors, batch.specs.rows, strict=True):
        if not tensor.numel():
            norms.append(torch.zeros(rows, dtype=torch.float64, device=batch.device))
            continue
        in_rows = (tensor if rows > 1 else tensor[None])[..., None]
        inside = tuple(range(1, in_rows.dim()))
        for some in in_rows.split(max(1, _CONVERTED * rows // tensor.numel())):
            norms += [torch.linalg.vector_norm(some, p, dim=inside, dtype=torch.float64)]
    norms_R = torch.cat(norms)
    return norms_R.square() if p == _EUCLIDEAN else norms_R


def scaled_power_sums(batch: Batch, p: float, scale_R: Tensor) -> Tensor | None:
    """Return the sum of ``|x / scale|**p`` of each row, float64 (R,), on a device without float64.

    None where there is float64, or where quotients count that float32 cannot hold.
    """
    there = result_device_of((batch.device,)) == batch.device
    if there or batch.dtype.is_complex or p < 1:
        return None
    rows, blocks = _blocks(batch)
    if not blocks:
        return torch.zeros_like(scale_R)
    scales = scale_R.tolist()
    each = zip(rows, blocks, strict=True)
    sums = [(_moduli(block, batch.top) / scales[row]).pow(p).sum() for row, block in each]
    return _by_row(batch, rows, _on_host(sums))


def scaling(batch: Batch, coefficients: float | Tensor, zeroes: bool) -> list[Write]:
    """Prepare to multiply rows in the precision of float32 at least, and round once.

    Args:
        batch: On an accelerator.
        coefficients: Of each row, or the one of all.
        zeroes: Whether one may be 0, which sets zeros, whatever was there.
    """
    precise, device = torch.promote_types(batch.dtype, torch.float32), batch.device
    if isinstance(coefficients, Tensor):
        factors = coefficients.reshape(-1).to(device=device, dtype=precise)
    else:
        factors = torch.full((1,), coefficients, dtype=precise, device=device)
    kept = factors != 0
    if len(factors) == 1:
        return [Write(run_each, (_one_factor(batch, factors, kept if zeroes else None),))]
    columns = [
        [shaped(of_one, t) for t, of_one in zip(batch.tensors, each, strict=True)]
        for each in (factors.split(batch.specs.rows), (~kept).split(batch.specs.rows))
    ]
    run = _multiply_or_zero if zeroes else _multiply
    return [Write(run, (list(batch.tensors), *columns))]


def _one_factor(batch: Batch, factor: Tensor, kept: Tensor | None) -> list[Callable[[], Any]]:
    """Return what multiplies all tensors, and sets zeros where ``kept`` is false.

    As integers, NaNs and infinities times 0 are 0, and numbers times 1 stay as they are.
    """
    tensors = list(batch.tensors)
    writes: list[Callable[[], Any]] = []
    if kept is not None:
        integer = _INTEGERS[batch.dtype.itemsize]
        whole, integers = kept[0].to(integer), [tensor.view(integer) for tensor in tensors]
        writes.append(partial(torch._foreach_mul_, integers, whole))
    if batch.dtype not in _HALVES:
        writes.append(partial(torch._foreach_mul_, tensors, factor[0]))
    elif batch.device.type in _UNSCALING:
        found = torch.zeros(1, dtype=torch.float32, device=batch.device)
        unscale = torch._amp_foreach_non_finite_check_and_unscale_
        writes.append(partial(unscale, tensors, found, factor))
    else:  # one dimension keeps torch from rounding the factor first
        each = [tensor if tensor.dim() else tensor.view(1) for tensor in tensors]
        writes += [partial(tensor.mul_, factor) for tensor in each]
    return writes


def _multiply(tensors: list[Tensor], factors: list[Tensor], zeros: list[Tensor]) -> None:  # noqa: ARG001
    for tensor, factor in zip(tensors, factors, strict=True):
        tensor.mul_(factor)


def _multiply_or_zero(tensors: list[Tensor], factors: list[Tensor], zeros: list[Tensor]) -> None:
    for tensor, factor, is_zero in zip(tensors, factors, zeros, strict=True):
        tensor.mul_(factor).masked_fill_(is_zero, 0.0)


def _in_float32(batch: Batch, p: float) -> Tensor:
    """Sum ``|x|**p`` of each row, p = 1, 2, block by block: float64 (R,) on the CPU."""
    rows, blocks = _blocks(batch)
    if not blocks:
        return torch.zeros(len(batch.specs.row_sizes), dtype=torch.float64, device="cpu")
    sums_B = _on_host([_powers(_moduli(block, batch.top), p).sum() for block in blocks])
    sizes_B = torch.tensor([block.numel() for block in blocks], device="cpu")
    lost_B = ~sums_B.isfinite()
    if p == _EUCLIDEAN:
        lost_B |= sums_B < sizes_B * _LOST
    suspects = lost_B.nonzero()[:, 0].tolist()
    if suspects:
        moduli = [_moduli(blocks[index], batch.top) for index in suspects]
        peaks = _on_host([each.amax() for each in moduli]).tolist()
        for index, each, peak in zip(suspects, moduli, peaks, strict=True):
            if 0 < peak < inf:
                sums_B[index] = float(_powers(each / peak, p).sum()) * peak**p
    return _by_row(batch, rows, sums_B)


def _blocks(batch: Batch) -> tuple[list[int], list[Tensor]]:
    """Return small pieces of all rows, and the number of the row of each."""
    every = zip(batch.tensors, batch.specs.rows, strict=True)
    rows = [row for tensor, n in every for row in rows_of(tensor, n)]
    found = [
        (number, block)
        for number, row in enumerate(rows)
        for block in pieces(row, _BLOCK)
        if block.numel()
    ]
    return [number for number, _ in found], [block for _, block in found]


def _moduli(block: Tensor, top: float | Tensor | None) -> Tensor:
    """Return the moduli of a block in float32, as if it were clamped."""
    values = block.to(torch.float32, copy=True)
    return (values if top is None else clamp_to_(values, top)).abs_()


def _powers(moduli: Tensor, p: float) -> Tensor:
    return moduli if p == 1 else moduli.pow(p)


def _on_host(numbers: list[Tensor]) -> Tensor:
    """Bring numbers to the CPU together, float64: its host waits for them there anyway."""
    return torch.stack(numbers).cpu().double()


def _by_row(batch: Batch, rows: list[int], sums_B: Tensor) -> Tensor:
    totals_R = torch.zeros(len(batch.specs.row_sizes), dtype=torch.float64, device="cpu")
    return totals_R.index_add_(0, torch.tensor(rows, device="cpu"), sums_B)
