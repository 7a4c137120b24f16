"""The truth that the tests of the engine compare with; it knows NumPy and torch, never gradclip."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

BACKENDS = ("foreach", "reference")
ORDERS = (0.5, 1.0, 2.0, 3.0, math.inf)
CHUNK = 1 << 22


def magnitudes(tensor: torch.Tensor) -> np.ndarray:
    """Absolute values, flat, without rounding: longdouble for 64-bit elements, else float64."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        parts = torch.view_as_real(tensor.resolve_conj()).double().numpy().reshape(-1, 2)
        wide = parts.astype(np.longdouble) if tensor.dtype == torch.complex128 else parts
        return np.hypot(wide[:, 0], wide[:, 1])
    tensor = tensor.resolve_neg()
    if tensor.dtype == torch.float64:
        return np.abs(tensor.numpy().reshape(-1).astype(np.longdouble))
    return np.abs(tensor.double().numpy().reshape(-1))


def norm(tensors: Iterable[torch.Tensor], p: float = 2.0) -> float:
    """The p-norm of all elements together.

    Elements are divided by a power of two near the largest, which is exact, so nothing overflows;
    a square of a float32 is exact in float64; and the partial sums are added with ``math.fsum``.
    """
    arrays = [m for m in map(magnitudes, tensors) if m.size]
    largest = max((m.max() for m in arrays), default=np.float64(0))
    if not largest > 0 or not np.isfinite(largest) or p == math.inf:
        return float(largest)
    exponent = int(np.frexp(largest)[1])
    partial = []
    for array in arrays:
        for start in range(0, array.size, CHUNK):
            part = np.ldexp(array[start : start + CHUNK], -exponent)
            powers = part if p == 1 else part * part if p == 2 else part**p
            partial.append(float(powers.sum()))
    return math.ldexp(math.fsum(partial) ** (1.0 / p), exponent)


def relative(value: float | torch.Tensor, truth: float) -> float:
    """How far ``value`` is from ``truth``, relative to it; 0 where both are 0."""
    value = float(value)
    return 0.0 if value == truth else abs(value - truth) / abs(truth) if truth else math.inf


def accuracy(tensors: Iterable[torch.Tensor]) -> float:
    """The relative error that a norm of these gradients may have."""
    wide = all(t.dtype in {torch.float64, torch.complex128} for t in tensors)
    return 1e-13 if wide else 1e-6


def parameter(grad: torch.Tensor | None, shape: Sequence[int] = (2,)) -> torch.Tensor:
    """A leaf that holds ``grad`` itself as its gradient."""
    if grad is None:
        return torch.zeros(shape, requires_grad=True)
    leaf = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    leaf.grad = grad
    return leaf


def parameters(*grads: torch.Tensor | None) -> list[torch.Tensor]:
    """One leaf for each gradient."""
    return [parameter(grad) for grad in grads]


def gradients(params: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients that exist."""
    return [p.grad for p in params if p.grad is not None]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers that are the same in every run."""
    generator = torch.Generator().manual_seed(seed + 7919 * len(shape) + sum(shape))
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, dtype=wide, generator=generator).to(dtype)


def ragged(seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[torch.Tensor]:
    """Tensors of awkward shapes: scalars, empties, sizes around powers of two."""
    shapes = [(), (0,), (1,), (7,), (127,), (128,), (129,), (3, 0, 2), (40, 25), (2, 3, 5, 7)]
    return [scale * randn(*s, seed=seed + i, dtype=dtype) for i, s in enumerate(shapes)]


def bits(tensor: torch.Tensor) -> bytes:
    """The stored bits of all elements (and the indices of a sparse tensor)."""
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        return bits(tensor._indices()) + bits(tensor._values())
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class Seen:
    """A gradient as it was at one moment."""

    grad: torch.Tensor
    bits: bytes
    version: int
    copy: torch.Tensor


def look(params: Iterable[torch.Tensor]) -> list[Seen | None]:
    """Remember every gradient: which object it is, its bits, and how often it was written."""
    return [
        None
        if p.grad is None
        else Seen(p.grad, b"", p.grad._version, p.grad)
        if p.grad.is_meta
        else Seen(p.grad, bits(p.grad), p.grad._version, p.grad.detach().clone())
        for p in params
    ]


def assert_untouched(params: Iterable[torch.Tensor], before: Sequence[Seen | None]) -> None:
    """Every gradient is the same object, with the same bits, and has not been written."""
    for number, (p, seen) in enumerate(zip(params, before, strict=True)):
        if seen is None:
            assert p.grad is None, f"gradient {number} appeared"
            continue
        assert p.grad is seen.grad, f"gradient {number} was replaced"
        assert p.grad.is_meta or bits(p.grad) == seen.bits, f"gradient {number} changed"
        assert p.grad._version == seen.version, f"gradient {number} was written"


# Relative rounding of one multiplication, the bound's slack, and the smallest normal number.
ROUNDING = {
    torch.float16: (2.0**-11, 5e-4, 2.0**-14),
    torch.bfloat16: (2.0**-8, 4e-3, 2.0**-126),
    torch.float32: (2.0**-23, 0.0, 2.0**-126),
    torch.complex64: (2.0**-22, 0.0, 2.0**-126),
    torch.float64: (2.0**-52, 0.0, 2.0**-1022),
    torch.complex128: (2.0**-51, 0.0, 2.0**-1022),
}


def assert_scaled(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor], c: float) -> None:
    """Every element was multiplied by ``c``, give or take the rounding of its own type."""
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        old, new = (t.to_dense() if t.layout != torch.strided else t for t in (old, new))  # noqa: PLW2901
        rounding, _, tiny = ROUNDING[old.dtype]
        wide = torch.complex128 if old.is_complex() else torch.float64
        expected = old.to(wide) * c
        error = (new.to(wide) - expected).abs()
        # a step of the result's type (16-bit ones go through float32), and of its subnormals
        allowed = rounding * ((1 + 2.0**-11) * expected.abs() + tiny)
        assert bool((error <= allowed).all()), f"tensor {number} was not multiplied by {c}"


def assert_bounded(tensors: Sequence[torch.Tensor], max_norm: float, p: float = 2.0) -> float:
    """The norm is at most ``max_norm``, give or take what 16-bit types round; returns it."""
    slack = max((ROUNDING[t.dtype][1] for t in tensors), default=0.0)
    after = norm(tensors, p)
    assert after <= max_norm * (1 + slack), f"{after!r} exceeds {max_norm!r} by {after / max_norm}"
    return after
