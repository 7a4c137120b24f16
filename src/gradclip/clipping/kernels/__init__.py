"""The operations on gradients that every backend has, and the choice between the backends.

A backend is a file of this package with these functions, named in ``_BACKENDS``. Each gets a
batch of tensors of one device and one floating dtype, of any shapes, and sees tensor i as a
matrix of ``(rows[i], -1)``: one row where a whole tensor has one coefficient, its leading
dimension where each unit has its own. ``R`` is the number of all rows.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor

from gradclip.clipping.kernels.fused import FusedStep, Report
from gradclip.clipping.kernels.tensor_specs import Batch, SpecsCache, TensorSpecs
from gradclip.clipping.kernels.writes import Write, carry_out, run_each
from gradclip.errors import ArgumentTypeError, ArgumentValueError, GradClipError

__all__ = [
    "Backends",
    "Batch",
    "Clamped",
    "Kernels",
    "SpecsCache",
    "TensorSpecs",
    "Write",
    "carry_out",
    "choose",
]

Scalar: TypeAlias = float | Tensor


@dataclass(eq=False)
class Clamped:
    """What clamping found.

    Args:
        before_RA: ``power_sums`` for p = 2 of what was there.
        after_RA: The same of what is left.
        changed: Above 0 just where an element is changed: 0-d int64.
    """

    before_RA: Tensor
    after_RA: Tensor
    changed: Tensor


class Kernels(Protocol):
    """One backend: a module with these functions.

    The first three count elements as if they were clamped to the limit of the batch, if it has one.
    Complex numbers count by modulus. No temporary is as large as a tensor.
    """

    power_sums: Callable[[Batch, float], Tensor]
    """``(batch, p)`` for p = 1, 2: the sums of ``|x|**p`` of each row, float64 (R, A).

    A is 1, or for float64 tensors 3: the sums of x, of x * 2^-600 and of x * 2^600, so that one
    of them is in range whatever x is. A NaN in a row makes its sums NaN, an infinity makes them
    infinite.
    """

    abs_max: Callable[[Batch], Tensor]
    """``(batch)``: the largest modulus of each row, float64 (R, A); NaN if there is one.

    A is 1, or for complex128 2: the largest float64 stands for a modulus beyond it, and the second
    number is the modulus times 2^-600.
    """

    scaled_power_sums: Callable[[Batch, float, Tensor], Tensor]
    """``(batch, p, scale_R)`` for any p: the sums of ``|x / scale|**p``, float64 (R, 1)."""

    scaling: Callable[..., list[Write]]
    """``(batch, coefficients, *, zeroes)``: prepare to multiply by coefficients, float64 (R,).

    A shape of (1,), or a number, is one coefficient for all. A coefficient of 1 leaves bits as
    they are, and nothing is written where it is seen in time; 0 sets zeros, whatever was there.
    ``zeroes`` tells whether one may be 0.
    """

    clamping: Callable[[Batch, Scalar], list[Write]]
    """``(batch, limit)``: prepare to clamp to [-limit, limit]; a NaN stays.

    On the CPU nothing is prepared where no element exceeds the limit.
    """

    clamp_: Callable[[Batch, Scalar, bool], Clamped]
    """``(batch, limit, write)``: find out what clamping changes and leaves; clamp in the same pass,
    or write nothing.
    """

    coefficients: Callable[[Tensor, Scalar, Scalar, Tensor, float, float], Tensor]
    """``(norms_S, thresholds, targets, committed, guard, skipped_coefficient)``: what scopes are
    multiplied by.

    ``target / norm * (1 - guard)`` for a norm above its threshold and its target, else 1;
    ``skipped_coefficient`` everywhere if ``committed``, 0-d bool, is false. Thresholds and targets
    are float64 (S,) or numbers. Nothing is read on the host.
    """

    fused: Callable[[FusedStep], Report | None] | None
    """``(step)``: measure, decide and scale in as few launches as can be; None without such a way.

    The answer is None where that cannot be done, or the step does not allow it: nothing was
    written then.
    """


_BACKENDS = ("foreach", "triton", "reference")


class Backends:
    """Which backend serves a device.

    Args:
        name: "auto", or that of a backend.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def are_portable(self) -> bool:
        """Whether torch's own operations serve the CPU."""
        return self.name in {"auto", "foreach"}

    def on(self, device: torch.device) -> Kernels:
        """Return the backend for tensors of that device.

        Raises:
            ArgumentValueError: GC010, where Triton was asked for and cannot run.
        """
        if self.name == "auto":
            return _automatic() if device.type == "cuda" else _load("foreach")
        if self.name == "triton" and device.type != "cuda" and not _interprets():
            raise ArgumentValueError(
                f"backend='triton' runs on CUDA devices, and a gradient is on {device}: use "
                "backend='auto', which takes the fastest that each device has. No gradient was "
                "changed."
            )
        return _load(self.name)


def choose(backend: str) -> Backends:
    """Return the choice of that name.

    "auto" is, for each device, the fastest that is proven there: Triton on NVIDIA GPUs, torch's
    multi-tensor functions elsewhere. The environment variable ``GRADCLIP_BACKEND`` takes the
    place of "auto".

    Raises:
        ArgumentTypeError: GC011, if it is no string.
        ArgumentValueError: GC010, for an unknown name, or "triton" where it is not installed.
    """
    if not isinstance(backend, str):
        raise ArgumentTypeError(f"backend={backend!r}: expected a string")
    label = f"backend={backend!r}"
    if backend == "auto" and os.environ.get("GRADCLIP_BACKEND"):
        backend = os.environ["GRADCLIP_BACKEND"]
        label = f"GRADCLIP_BACKEND={backend!r}"
    if backend not in ("auto", *_BACKENDS):
        raise ArgumentValueError(
            f"{label} is unknown: expected 'auto', {', '.join(map(repr, _BACKENDS))}"
        )
    if backend == "triton" and find_spec("triton") is None:
        raise ArgumentValueError(
            f"{label} needs Triton, which is not installed: pip install triton, or use 'auto'"
        )
    return Backends(backend)


@cache
def _load(name: str) -> Kernels:
    return cast("Kernels", import_module(f"gradclip.clipping.kernels.{name}"))


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _automatic() -> Kernels:
    """Return the backend for CUDA devices: Triton, and torch's functions where Triton fails."""
    # ROCm calls itself CUDA too; there Triton is not proven.
    if torch.version.hip is not None or find_spec("triton") is None:
        return _load("foreach")
    try:
        return cast("Kernels", _WithFallback(_load("triton"), _load("foreach")))
    except ImportError as error:
        _warn(error)
        return _load("foreach")


class _WithFallback:
    """Runs one backend, and from its first failure on another one.

    A kernel that cannot be compiled fails before it is launched, and a batch has one dtype and
    thus one launch: nothing was written then.
    """

    def __init__(self, first: Kernels, second: Kernels) -> None:
        self._active = first
        for name in Kernels.__annotations__:
            setattr(self, name, self._guarded(name, second))
        for name in ("scaling", "clamping"):
            setattr(self, name, self._prepared(name, second))

    def _prepared(self, name: str, second: Kernels) -> Callable[..., list[Write]]:
        prepare: Callable[..., list[Write]] = getattr(self, name)

        def run(writes: list[Write], *arguments: Any, **options: Any) -> None:
            try:
                carry_out(writes)
            except _FATAL:
                raise
            except Exception as error:
                if self._active is second:
                    raise
                self._active = second
                _warn(error)
                carry_out(getattr(second, name)(*arguments, **options))

        @wraps(prepare)
        def prepared(*arguments: Any, **options: Any) -> list[Write]:
            writes = prepare(*arguments, **options)
            again = partial(run, writes, *arguments, **options)
            return [Write(run_each, ([again],))] if writes else []

        return prepared

    def _guarded(self, name: str, second: Kernels) -> Callable[..., Any]:
        other: Callable[..., Any] | None = getattr(second, name)

        def run(*arguments: Any, **options: Any) -> Any:
            if self._active is not second:
                try:
                    return getattr(self._active, name)(*arguments, **options)
                except _FATAL:
                    raise
                except Exception as error:  # noqa: BLE001 - compilers fail in many ways
                    self._active = second
                    _warn(error)
            return None if other is None else other(*arguments, **options)

        return run


_FATAL = (
    GradClipError,
    torch.OutOfMemoryError,
    getattr(torch, "AcceleratorError", torch.OutOfMemoryError),
)
"""What is meant for the caller, and what no other backend would survive either."""


def _warn(error: Exception) -> None:
    reason = " ".join(str(error).split())[:300]
    warnings.warn(
        f"gradclip's Triton kernels do not run here ({type(error).__name__}: {reason}), so torch's "
        "multi-tensor functions clip instead: the same numbers, at a lower speed. "
        "GRADCLIP_BACKEND=foreach asks for that, and says nothing.",
        RuntimeWarning,
        stacklevel=2,
    )
