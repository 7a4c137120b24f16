"""Who clips the gradients that an optimizer steps on: one, or an error that names both.

An owner, such as an attachment or a callback, clips before every step of an optimizer. It claims
the optimizer, so that two owners are found before the first step. A guest, such as a
``GradientClipper`` or a function in the loop, cannot know of it. A guest leaves marks on the
gradients that it clipped and never refuses; the owner finds the marks before the step.
"""

from collections.abc import Iterable
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from gradclip.errors import DoubleClippingError

_CLAIMS: "WeakKeyDictionary[torch.optim.Optimizer, tuple[ref[object], str]]" = WeakKeyDictionary()

# Weak: a gradient that is gone was computed anew.
_MARKS: "WeakTensorKeyDictionary" = WeakTensorKeyDictionary()


def wrapped(optimizer: Any) -> Any:
    """Return what a wrapper such as Accelerate's or Fabric's wraps; None for what is none."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if hasattr(inner, "param_groups") else None


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer behind all wrappers."""
    while (inner := wrapped(optimizer)) is not None:
        optimizer = inner
    return optimizer


def claim(optimizer: torch.optim.Optimizer, owner: object, label: str) -> None:
    """Claim an optimizer: its owner clips before every step.

    Args:
        optimizer: A torch optimizer, or a wrapper of one.
        owner: What clips; it is not kept alive.
        label: What an error calls it.

    Raises:
        DoubleClippingError: GC101, something else has claimed it; nothing was changed.
    """
    check_unclaimed(optimizer, owner, label)
    _CLAIMS[unwrapped(optimizer)] = ref(owner), label


def release(optimizer: torch.optim.Optimizer, owner: object) -> None:
    """Give up a claim; harmless where there is none."""
    inner = unwrapped(optimizer)
    known = _CLAIMS.get(inner)
    if known is not None and known[0]() is owner:
        del _CLAIMS[inner]


def owner_of(optimizer: torch.optim.Optimizer) -> object | None:
    """Return what has claimed an optimizer; None if nothing has."""
    known = _CLAIMS.get(unwrapped(optimizer))
    return None if known is None else known[0]()


def check_unclaimed(optimizer: torch.optim.Optimizer, owner: object, label: str) -> None:
    """Refuse to clip what another owner clips before every step.

    Raises:
        DoubleClippingError: GC101, naming both; nothing was changed.
    """
    inner = unwrapped(optimizer)
    # What only looks like an optimizer cannot be attached to.
    known = _CLAIMS.get(inner) if isinstance(inner, torch.optim.Optimizer) else None
    other = None if known is None else known[0]()
    if known is None or other is None or other is owner:
        return
    raise DoubleClippingError(
        f"the gradients of this {type(inner).__name__} are already clipped before "
        f"every step, by {known[1]}; {label} would clip them again, and a second limit silently "
        "changes what the first one means. Keep one of them: remove() takes an attachment or a "
        "callback off, and limits by parameter go into one policy. No gradient was changed."
    )


class Role(Protocol):
    """What an engine is to others that clip the same gradients."""

    def check(self, gradients: Iterable[Tensor]) -> None:
        """Look at gradients that will be clipped, before anything is changed."""
        ...

    def mark(self, gradients: Iterable[Tensor], policy: object) -> None:
        """Note that gradients were clipped, by which policy."""
        ...


class Guest:
    """Clips in a loop that may have an owner: leaves marks, and never refuses.

    Args:
        label: What an error calls it.
    """

    def __init__(self, label: str) -> None:
        self._label = label

    def check(self, gradients: Iterable[Tensor]) -> None:
        """Refuse nothing: to clip twice in a loop is its author's choice."""

    def mark(self, gradients: Iterable[Tensor], policy: object) -> None:
        """Let an owner find out what was clipped before its step."""
        if torch.is_inference_mode_enabled():
            return  # nothing counts changes there
        for gradient in gradients:
            _MARKS[gradient] = (*_version(gradient), self._label, policy)


class Owner:
    """Clips before every step: refuses gradients that a guest clipped.

    Args:
        label: What an error calls it.
    """

    def __init__(self, label: str) -> None:
        self._label = label

    def check(self, gradients: Iterable[Tensor]) -> None:
        """Refuse to clip what a guest clipped, and nothing has changed since.

        Raises:
            DoubleClippingError: GC101, naming both.
        """
        if not _MARKS or torch.is_inference_mode_enabled():
            return
        for gradient in gradients:
            *marked, guest, policy = _MARKS.get(gradient, (None, "", None))
            if tuple(marked) == _version(gradient):
                raise DoubleClippingError(
                    f"the gradients of this step were already clipped by {guest} ({policy!r}); "
                    f"{self._label} would clip them again, and a second limit silently changes "
                    "what the first one means. Keep one of them; limits by parameter go into one "
                    f"policy. No gradient was changed by {self._label}, and no step was made."
                )

    def mark(self, gradients: Iterable[Tensor], policy: object) -> None:
        """Leave none: no other owner has this optimizer."""


def _version(gradient: Tensor) -> tuple[int, int]:
    """Return how often a gradient was written, as autograd counts, and where it lies."""
    address = gradient.data_ptr() if gradient.layout is torch.strided else 0
    return gradient._version, address  # noqa: SLF001 - what autograd itself asks
