"""The one way to keep an optimizer from stepping."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gradclip.clipping.step.ownership import unwrapped, wrapped

_UNSET = object()


@contextmanager
def withhold(optimizer: torch.optim.Optimizer, skipped: Tensor | bool) -> Iterator[None]:
    """Make ``optimizer.step()`` change nothing while the context lasts, if ``skipped`` is true.

    Weights, moments and step counts stay as they are. A fused optimizer whose state exists is
    told through ``found_inf``, on the device; for any other the flag is read, the gradients are
    dropped (``.grad = None``), so that there is nothing to step on, and ``step`` does nothing.
    Until its state exists a fused optimizer is treated so too: torch's fused SGD would leave its
    first momentum uninitialised.

    Args:
        optimizer: A torch optimizer, or a wrapper with ``param_groups`` and ``step``.
        skipped: Whether the update should not happen: 0-d bool tensor, or a bool.

    Note:
        Of an optimizer that steps another one the inner one is withheld; the outer one is called.
        A ``step(closure)`` computes gradients anew, which nothing here withholds: do not call it.
        A ``GradScaler`` that steps a fused optimizer sets ``found_inf`` itself: pass a bool there.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> weight.grad = torch.ones(2)
    >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    >>> with withhold(optimizer, torch.tensor(True)):
    ...     optimizer.step()
    >>> weight.tolist(), optimizer.state_dict()["state"]
    ([1.0, 1.0], {})
    """
    if isinstance(skipped, Tensor) and not _takes_found_inf(unwrapped(optimizer)):
        skipped = bool(skipped)
    with withhold_within(optimizer, skipped), ExitStack() as stack:
        if skipped is True:
            # Some count their steps themselves, whether there are gradients or not. An outermost
            # wrapper is called all the same: Accelerate's has a loss scaler to update.
            for each in list(_chain(optimizer))[1:] or [optimizer]:
                if isinstance(each, torch.optim.Optimizer):
                    stack.enter_context(lend(each, "step", _NoStep(each)))
        yield


@contextmanager
def withhold_within(optimizer: torch.optim.Optimizer, skipped: Tensor | bool) -> Iterator[None]:
    """Do the same within a step that is under way, as in a hook of it.

    What an optimizer counts without gradients, as schedule-free ones do, goes on there.
    """
    inner = unwrapped(optimizer)
    if isinstance(skipped, Tensor) and _takes_found_inf(inner):
        with _found_inf(inner, skipped):
            yield
        return
    if skipped:
        for parameter in _parameters(optimizer):
            parameter.grad = None
    yield


def _chain(optimizer: Any) -> Iterator[Any]:
    """Yield an optimizer and those that it wraps, outermost first."""
    yield optimizer
    while (inner := wrapped(optimizer)) is not None:
        yield inner
        optimizer = inner


class _NoStep:
    """Stands for the step of an optimizer whose gradients were dropped; with others it steps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer, self._step = optimizer, optimizer.step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(parameter.grad is not None for parameter in _parameters(self._optimizer)):
            return self._step(*args, **kwargs)
        if hasattr(self._step, "_wrapped_by_lr_sched"):
            self._optimizer._opt_called = True  # type: ignore[attr-defined]  # noqa: SLF001 - or schedulers warn
        return None

    def __getattr__(self, name: str) -> Any:
        if name == "_step":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._step, name)  # schedulers look at it, and wrap it


def _parameters(optimizer: torch.optim.Optimizer) -> chain[Tensor]:
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)


def _takes_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    fused = all(group.get("fused") for group in optimizer.param_groups)
    # Of an optimizer that steps another one, only the inner one has it.
    if not (fused and getattr(optimizer, "_step_supports_amp_scaling", False)):
        return False
    with_gradients = [p for p in _parameters(optimizer) if p.grad is not None]
    return bool(with_gradients) and all(optimizer.state.get(p) for p in with_gradients)


@contextmanager
def _found_inf(optimizer: Any, skipped: Tensor) -> Iterator[None]:
    """Set ``found_inf`` to exactly 0 or 1, and put back what was there."""
    before = getattr(optimizer, "found_inf", None)
    flag = skipped.to(torch.float32).reshape(())
    if isinstance(before, Tensor):
        flag = torch.maximum(flag, before.to(flag.device).clamp(max=1.0).reshape(()))
    with lend(optimizer, "found_inf", flag):
        yield


@contextmanager
def lend(optimizer: Any, name: str, value: object) -> Iterator[None]:
    """Give an optimizer an attribute, and put back what was there, unless it was set since."""
    before = getattr(optimizer, "__dict__", {}).get(name, _UNSET)
    setattr(optimizer, name, value)
    try:
        yield
    finally:
        if getattr(optimizer, name, None) is value:
            if before is _UNSET:
                delattr(optimizer, name)
            else:
                setattr(optimizer, name, before)
