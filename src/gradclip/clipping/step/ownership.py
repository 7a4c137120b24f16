"""Who clips the gradients that an optimizer steps on: one, or an error that names both."""

from typing import Any
from weakref import WeakKeyDictionary, ref

import torch

from gradclip.errors import DoubleClippingError

_OWNERS: "WeakKeyDictionary[torch.optim.Optimizer, tuple[ref[object], str]]" = WeakKeyDictionary()


def wrapped(optimizer: Any) -> Any:
    """Return what a wrapper such as Accelerate's or Fabric's wraps; None for what is none."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if hasattr(inner, "param_groups") else None


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer behind all wrappers."""
    while (inner := wrapped(optimizer)) is not None:
        optimizer = inner
    return optimizer


def owned(optimizer: torch.optim.Optimizer, owner: object, said: str) -> None:
    """Note that something clips before every step of an optimizer.

    Args:
        optimizer: A torch optimizer, or a wrapper of one.
        owner: What clips; it is not kept alive.
        said: What it is called in an error.

    Raises:
        DoubleClippingError: GC101, something else does already.
    """
    check_unowned(optimizer, owner, said)
    _OWNERS[unwrapped(optimizer)] = ref(owner), said


def disowned(optimizer: torch.optim.Optimizer, owner: object) -> None:
    """Forget an owner; harmless where it is none."""
    inner = unwrapped(optimizer)
    known = _OWNERS.get(inner)
    if known is not None and known[0]() is owner:
        del _OWNERS[inner]


def owner_of(optimizer: torch.optim.Optimizer) -> object | None:
    """Return what clips before every step of an optimizer; None if nothing is known to."""
    known = _OWNERS.get(unwrapped(optimizer))
    return None if known is None else known[0]()


def check_unowned(optimizer: torch.optim.Optimizer, owner: object, said: str) -> None:
    """Refuse to clip what something else clips before every step.

    Raises:
        DoubleClippingError: GC101, naming both; nothing was changed.
    """
    inner = unwrapped(optimizer)
    # What only looks like an optimizer cannot be attached to.
    known = _OWNERS.get(inner) if isinstance(inner, torch.optim.Optimizer) else None
    other = None if known is None else known[0]()
    if known is None or other is None or other is owner:
        return
    raise DoubleClippingError(
        f"the gradients of this {type(inner).__name__} are already clipped before "
        f"every step, by {known[1]}; {said} would clip them again, and a second limit silently "
        "changes what the first one means. Keep one of them: remove() takes an attachment or a "
        "callback off, and limits by parameter go into one policy. No gradient was changed."
    )
