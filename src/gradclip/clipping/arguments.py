"""Checks of what a clipper is given: the kind first, then the range."""

from math import isfinite
from numbers import Real
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from gradclip.errors import ArgumentTypeError, ArgumentValueError

Nonfinite: TypeAlias = Literal["skip", "raise", "propagate"]


def check_nonfinite(nonfinite: object) -> Nonfinite:
    """Check what to do about a NaN or an infinity."""
    if nonfinite in ("skip", "raise", "propagate"):
        return nonfinite
    raise (ArgumentValueError if isinstance(nonfinite, str) else ArgumentTypeError)(
        f"nonfinite={nonfinite!r}: expected 'skip', 'raise' or 'propagate'"
    )


def check_count(count: object) -> int:
    """Check how many skipped steps in a row are tolerated."""
    if isinstance(count, bool) or not isinstance(count, int):
        raise ArgumentTypeError(f"max_consecutive_skips={count!r}: expected an integer >= 0")
    if count < 0:
        raise ArgumentValueError(f"max_consecutive_skips={count}: expected an integer >= 0")
    return count


def check_grad_scale(scale: object) -> float | Tensor | None:
    """Check what gradients are still multiplied by; a tensor becomes 0-d float64."""
    if scale is None:
        return None
    if isinstance(scale, Tensor):
        if scale.numel() != 1 or not scale.is_floating_point():
            raise ArgumentValueError(
                f"grad_scale is a tensor of shape {tuple(scale.shape)} and {scale.dtype}: expected "
                "one positive floating-point number"
            )
        if scale.device.type != "cpu":
            return scale.detach().to(torch.float64).reshape(())  # reading it would wait
        scale = float(scale)
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise ArgumentTypeError(f"grad_scale={scale!r}: expected a positive number")
    number = float(scale)
    if not (isfinite(number) and number > 0):
        raise ArgumentValueError(f"grad_scale={scale!r}: expected a positive finite number")
    return number
