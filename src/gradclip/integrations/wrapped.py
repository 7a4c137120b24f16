"""What Accelerate's wrapper of an optimizer calls."""

from typing import Any

import torch

__all__ = ["behind_accelerate"]


def behind_accelerate(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer behind Accelerate's wrapper, which is the one that is stepped.

    No other wrapper is looked behind; ``clipping.step.wrappers`` does where it holds a step.
    """
    inner: Any = optimizer
    while any(kind.__module__.startswith("accelerate.") for kind in type(inner).__mro__):
        inner = inner.optimizer
    return inner  # type: ignore[no-any-return]
