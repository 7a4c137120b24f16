"""What a ``GradScaler`` means for clipping: unscaled first, and overflows that it answers for."""

from operator import is_
from typing import Any

import torch
from torch import Tensor

from gradclip.clipping import flags
from gradclip.clipping.flags import Flag
from gradclip.clipping.kernels.device import copy_to_host
from gradclip.integrations.wrapped import behind_accelerate
from gradclip.record.ring import Ring

__all__ = ["SCALE_FLOOR", "OverflowWatch", "Unscaling", "begin_anew"]

SCALE_FLOOR = 1.0
"""A loss scale at or below this does not explain an overflow."""


class OverflowWatch:
    """Tells whether a loss scaler would explain an overflow: while its scale can still fall.

    The scale is read, on the host, only after a step that was skipped, or not seen to be made.
    """

    def __init__(self) -> None:
        self._at_floor = False
        self._unsettled = False
        self._skips: Ring[None] = Ring()

    def expects(self, scaler: Any) -> bool:
        """Return whether an overflow at this step would be the scaler's doing."""
        if scaler is None or not scaler.is_enabled():
            return False
        if self._unsettled:
            self._at_floor = scaler.get_scale() <= SCALE_FLOOR
        self._unsettled = True
        return not self._at_floor

    def settle(self, skipped: Flag) -> None:
        """Note whether the step was skipped; a flag on an accelerator is read some steps late."""
        if isinstance(skipped, Tensor) and flags.host_waits_for(skipped.device):
            late = self._skips.push(copy_to_host(skipped), None)
            skipped = late is not None and bool(late[0][0])
        self._unsettled = bool(skipped)
        if not skipped:
            self._at_floor = False  # it may grow again


def begin_anew(scaler: Any) -> None:
    """Let a scaler forget a step that was broken off after unscaling; its scale stays.

    For a loop that drops the gradients of such a step: a scaler refuses to unscale the next ones.

    Args:
        scaler: A ``GradScaler``, or None.
    """
    if scaler is not None and getattr(scaler, "_per_optimizer_states", None):
        scaler.update(scaler.get_scale())


class Unscaling:
    """Unscales the gradients of an optimizer, unless the loop did earlier in this step."""

    def __init__(self) -> None:
        self._ours: tuple[object, object] | None = None

    def __call__(self, scaler: Any, optimizer: torch.optim.Optimizer) -> None:
        """Unscale.

        Args:
            scaler: A ``GradScaler``; None does nothing.
            optimizer: A torch optimizer, or Accelerate's wrapper of one.

        Raises:
            RuntimeError: torch's own, where there was no step since the last call: what was added
                to the gradients since then is still scaled.
        """
        if scaler is None:
            return
        inner = behind_accelerate(optimizer)
        # A scaler begins a new record of what was unscaled at each update.
        now = getattr(scaler, "_per_optimizer_states", None), inner
        try:
            scaler.unscale_(inner)
        except RuntimeError as error:
            ours = self._ours is not None and all(map(is_, now, self._ours))
            if ours or "already been called" not in str(error):
                raise
        else:
            self._ours = now
