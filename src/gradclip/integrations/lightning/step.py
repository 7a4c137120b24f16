"""One optimizer under Lightning: clipped, and kept from stepping on a NaN."""

from typing import Any

import torch
from torch import Tensor

from gradclip.clipping import ClipResult, GradientClipper
from gradclip.clipping.flags import Flag, negated
from gradclip.errors import ArgumentValueError
from gradclip.integrations.owned_step import OwnedStep


class LightningStep:
    """The steps of one optimizer, at the moments at which Lightning makes them.

    Lightning clips inside the closure that it gives to ``optimizer.step``, or, with a loss scaler,
    before it calls ``scaler.step(optimizer)``. Either way the optimizer's own step comes after.

    Args:
        step: The steps of a torch optimizer.
    """

    lasts = True

    def __init__(self, step: OwnedStep) -> None:
        self.label = step.label
        self._step = step
        self.optimizer = step.optimizer
        self._in_batch = False
        self._ready = False
        self._count = 0
        self._clipped = self._skipped = torch.zeros((), dtype=torch.int64)
        step.hold(self)

    @property
    def clipper(self) -> GradientClipper:
        """What clips."""
        return self._step.clipper

    def clip(self, scaler: Any) -> ClipResult:
        """Clip now; the step that follows is withheld if it has to be.

        Args:
            scaler: The ``GradScaler`` of the precision plugin, if it has one.
        """
        # Lightning leaves it to fused optimizers to unscale. The scaler has to look at the
        # gradients before a NaN is zeroed, or it would step and keep its scale; its own look
        # before the step then falls away, so that this costs no pass.
        fused = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        result = self._step.clip(scaler, unscale=fused)
        self._ready = True
        self._count += 1
        self._clipped = result.clipped + self._clipped  # a host's zero goes to any device
        self._skipped = result.skipped + self._skipped
        return result

    def begin_batch(self) -> None:
        """Expect steps: those that Lightning makes."""
        self._in_batch = True

    def end_batch(self) -> None:
        """Forget a step that a scaler did not ask for; what steps now does not train."""
        self._in_batch = self._ready = False

    def tally(self) -> tuple[int, Tensor, Tensor]:
        """Return how many steps there were since it was last asked, clipped, and skipped."""
        counts = self._count, self._clipped, self._skipped
        self._count = 0
        self._clipped = self._skipped = torch.zeros((), dtype=torch.int64)
        return counts

    def release(self) -> None:
        """Let the optimizer go; twice is harmless. The clipper stays, with its history."""
        self._step.release()

    # What the held step of the optimizer calls; see ``clipping.step.held.Gate``.

    def before(self, optimizer: Any, kwargs: dict[str, Any]) -> Flag:  # noqa: ARG002
        """Return whether the step should not be made."""
        if not self._ready:
            if not self._in_batch:
                return False
            raise ArgumentValueError(
                f"this {type(optimizer).__name__} is about to step on gradients that were not "
                "clipped: Lightning was not asked to step it. In manual optimisation take it from "
                "self.optimizers(), and not with use_pl_optimizer=False. No step was made."
            )
        return self._step.skipped

    def after(self, error: BaseException | None) -> None:
        """Note that the step is over."""
        self._step.settle(None if error is not None else negated(self._step.skipped))
        self._ready = False
