"""The operations on gradients that every backend has, and the choice between the backends.

A backend is a file of this package with these functions, named in ``_BACKENDS``. Each gets
tensors of one device, of any floating dtypes and shapes, and sees tensor i as a matrix of
``(rows[i], -1)``: one row where a whole tensor has one coefficient, its leading dimension where
each unit has its own. ``R`` is the number of all rows.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Protocol, TypeAlias, cast

import torch
from torch import Tensor

from gradclip.errors import ArgumentTypeError, ArgumentValueError

Scalar: TypeAlias = float | Tensor


class Kernels(Protocol):
    """One backend: a module with these functions."""

    power_sums: Callable[[Sequence[Tensor], Sequence[int], float], Tensor]
    """``(tensors, rows, p)`` for p = 1, 2: the sums of ``|x|**p`` of each row, float64 (R, A).

    A is 1, or with float64 tensors 3: the sums of x, of x * 2^-600 and of x * 2^600, so that one
    of them is in range whatever x is. A NaN in a row makes its sums NaN, an infinity makes them
    infinite.
    """

    abs_max: Callable[[Sequence[Tensor], Sequence[int]], Tensor]
    """``(tensors, rows)``: the largest modulus of each row, float64 (R, 1); NaN if there is one."""

    scaled_power_sums: Callable[[Sequence[Tensor], Sequence[int], float, Tensor], Tensor]
    """``(tensors, rows, p, scale_R)`` for any p: the sums of ``|x / scale|**p``, float64 (R, 1)."""

    scale_: Callable[[Sequence[Tensor], Sequence[int], Scalar], None]
    """``(tensors, rows, coefficients)``: multiply in place by float64 coefficients of shape (R,).

    A shape of (1,), or a number, is one coefficient for all. A coefficient of 1 leaves bits as
    they are, and where the host can see it for nothing, nothing is written; 0 sets zeros.
    """

    clamp_: Callable[[Sequence[Tensor], Scalar], Tensor]
    """``(tensors, limit)``: clamp in place to [-limit, limit]; 0-d bool, whether any changed."""

    zero_: Callable[[Sequence[Tensor], Tensor], None]
    """``(tensors, where)``: set all to zero if the 0-d bool says so, whatever was there."""


_BACKENDS = ("foreach", "reference")


def choose(backend: str) -> Kernels:
    """Return the backend of that name; "auto" is the fastest that runs everywhere here.

    Raises:
        ArgumentTypeError: GC011, if it is no string.
        ArgumentValueError: GC010, for an unknown name.
    """
    if not isinstance(backend, str):
        raise ArgumentTypeError(f"backend={backend!r}: expected a string")
    name = "foreach" if backend == "auto" else backend
    if name not in _BACKENDS:
        raise ArgumentValueError(
            f"backend={backend!r} is unknown: expected 'auto', {', '.join(map(repr, _BACKENDS))}"
        )
    return cast("Kernels", import_module(f"gradclip.clipping.kernels.{name}"))


def by_device(
    tensors: Sequence[Tensor], rows: Sequence[int]
) -> dict[torch.device, tuple[list[int], list[int]]]:
    """Return the indices of the tensors (at least one), and of their rows, on each device."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) == 1:
        return {devices.pop(): (list(range(len(tensors))), list(range(sum(rows))))}
    places: dict[torch.device, tuple[list[int], list[int]]] = {}
    start = 0
    for index, (tensor, n) in enumerate(zip(tensors, rows, strict=True)):
        indices, row_indices = places.setdefault(tensor.device, ([], []))
        indices.append(index)
        row_indices.extend(range(start, start + n))
        start += n
    return places
