"""Rows of one tensor that have a factor each: multiplied without a copy of the tensor."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gradclip.clipping.kernels.blocks import BLOCK, pieces
from gradclip.clipping.kernels.writes import Write, multiply_in_blocks


def shaped(factors: Tensor, tensor: Tensor) -> Tensor:
    """Return one factor, or one for each index of the leading dimension, as it broadcasts."""
    return factors[0] if len(factors) == 1 else factors.reshape(-1, *(1,) * (tensor.dim() - 1))


def in_blocks(chosen: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> list[Write]:
    """Prepare to multiply tensors in another precision than theirs, block by block.

    Args:
        chosen: Tensors of one device, each with one factor, or with one for each row.
        dtype: What is computed in.
    """
    columns: tuple[list[Any], ...] = [], [], [], []
    largest = min(BLOCK, max((tensor.numel() for tensor, _ in chosen), default=0))
    if not largest:
        return []
    buffer = torch.empty(largest, dtype=dtype, device=chosen[0][0].device)
    for tensor, factors in chosen:
        has_zeros = bool((factors == 0).any())
        for piece, factor in _cut(tensor, factors.to(dtype)):
            if piece.numel():
                block = buffer[: piece.numel()].view(piece.shape)
                filled = (piece, factor, factor == 0 if has_zeros else None, block)
                for column, each in zip(columns, filled, strict=True):
                    column.append(each)
    return [Write(multiply_in_blocks, columns)]


def _cut(tensor: Tensor, factors: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pieces of at most ``BLOCK`` elements, each with its factor, or those of its rows."""
    if len(factors) == 1:
        yield from ((piece, factors[0]) for piece in pieces(tensor, BLOCK))
        return
    size = tensor.numel() // len(factors)
    if size <= BLOCK:
        whole = BLOCK // max(size, 1)
        parts: Iterable[tuple[Tensor, Tensor]] = zip(
            tensor.split(whole), factors.split(whole), strict=True
        )
        yield from ((part, shaped(of_part, part)) for part, of_part in parts)
    else:
        for row, factor in zip(tensor.unbind(), factors.unbind(), strict=True):
            yield from ((piece, factor) for piece in pieces(row, BLOCK))
