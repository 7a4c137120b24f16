"""Gradients as a clipper left them: what clips before every step finds a rival that came first."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from gradclip.errors import DoubleClippingError

# Weak: a gradient that is gone was computed anew. The number counts changes in place.
_LEFT: "WeakTensorKeyDictionary" = WeakTensorKeyDictionary()


def leave(gradients: Iterable[Tensor], said: str, policy: object) -> None:
    """Note that these were clipped, and are now as they should be.

    Args:
        gradients: Those of one call, or some of them.
        said: What clipped them, as an error calls it.
        policy: By which policy.
    """
    if torch.is_inference_mode_enabled():
        return  # nothing counts changes there
    for gradient in gradients:
        _LEFT[gradient] = (*_now(gradient), said, policy)


def check_none(gradients: Iterable[Tensor], said: str) -> None:
    """Refuse to clip what another clipper clipped, and nothing has changed since.

    Args:
        gradients: What would be clipped.
        said: By what.

    Raises:
        DoubleClippingError: GC101, naming both.
    """
    if not _LEFT or torch.is_inference_mode_enabled():
        return
    for gradient in gradients:
        *left, other, policy = _LEFT.get(gradient, (None, "", None))
        if tuple(left) == _now(gradient):
            raise DoubleClippingError(
                f"the gradients of this step were already clipped by {other} ({policy!r}); {said} "
                "would clip them again, and a second limit silently changes what the first one "
                "means. Keep one of them; limits by parameter go into one policy. No gradient was "
                f"changed by {said}, and no step was made."
            )


def _now(gradient: Tensor) -> tuple[int, int]:
    """Return how often it was written, as autograd counts, and where it is."""
    where = gradient.data_ptr() if gradient.layout is torch.strided else 0
    return gradient._version, where  # noqa: SLF001 - what autograd itself asks
