"""The one way to keep an optimizer from stepping."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradclip.clipping.flags import Flag
from gradclip.clipping.step.held import held
from gradclip.errors import ArgumentTypeError


@contextmanager
def withhold(optimizer: torch.optim.Optimizer, skipped: Tensor | bool) -> Iterator[None]:
    """Make ``optimizer.step()`` change nothing while the context lasts, if ``skipped`` is true.

    Weights, moments, step counts and gradients stay as they are: ``step`` is not called. A fused
    optimizer of torch's own, which has stepped before and has no step hooks, is called, and told on
    the device not to step (``found_inf``); for any other the host reads the flag when ``step`` is
    called. A closure that ``step`` is given
    runs all the same, before it, and its loss is returned.

    Args:
        optimizer: A torch optimizer, anything else with ``param_groups`` and ``step``, or a
            wrapper of Accelerate, Fabric, Lightning or opacus, which is called: it may have a loss
            scaler to update. Of any other optimizer that wraps one, give the outer one.
        skipped: Whether the update should not happen: 0-d bool tensor, or a bool.

    Raises:
        ArgumentTypeError: GC011, the ``step`` of what was given cannot be replaced, or ``skipped``
            is not one flag.
        ArgumentValueError: GC010, in ``step``: it was taken before the context began, and called
            past it.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> weight.grad = torch.ones(2)
    >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    >>> with withhold(optimizer, torch.tensor(True)):
    ...     optimizer.step()
    >>> weight.tolist(), optimizer.state_dict()["state"]
    ([1.0, 1.0], {})
    """
    flag = _as_flag(skipped)
    if flag is False:
        yield
        return
    with held(optimizer, _Given(flag)):
        yield


def _as_flag(skipped: Any) -> Flag:
    """Return one flag; what is no tensor is asked for its truth, as numpy's bool is.

    Raises:
        ArgumentTypeError: GC011, it is None, or of several elements.
    """
    if isinstance(skipped, bool):
        return skipped
    if isinstance(skipped, Tensor) and skipped.numel() == 1:
        flag = skipped.reshape(())
        return flag if flag.dtype is torch.bool else flag != 0
    is_tensor = isinstance(skipped, Tensor)
    if is_tensor or skipped is None or not hasattr(skipped, "__bool__"):
        what = f"a tensor of shape {tuple(skipped.shape)}" if is_tensor else repr(skipped)
        raise ArgumentTypeError(
            f"skipped is {what}: expected one flag, a bool or a tensor of one element, such as "
            "result.skipped. Nothing was changed."
        )
    return bool(skipped)


class _Given:
    """Withholds every step, or none."""

    label, lasts = "gradclip.withhold", False

    def __init__(self, skipped: Flag) -> None:
        self._skipped = skipped

    def before(self, optimizer: Any, kwargs: dict[str, Any]) -> Flag:  # noqa: ARG002
        return self._skipped

    def after(self, error: BaseException | None) -> None:
        """Nothing was lent."""
