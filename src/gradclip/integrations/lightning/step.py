"""One optimizer under Lightning: clipped, and kept from stepping on a NaN."""

from typing import Any

from gradclip.clipping import ClipResult, GradientClipper
from gradclip.clipping.flags import negated
from gradclip.errors import ArgumentValueError
from gradclip.integrations.owned_step import OwnedStep
from gradclip.integrations.tracked import Tracked


class LightningStep:
    """The steps of one optimizer, at the moments at which Lightning makes them.

    Without a loss scaler Lightning calls ``optimizer.step(closure)``, and clipping happens at the
    end of the closure: the step is withheld there and then. With one it calls the closure first
    and then ``scaler.step(optimizer)``, which sets ``found_inf`` anew: there a hook of torch
    withholds, so that what either found counts. Another hook gives everything back after the step.

    Args:
        step: The steps of a torch optimizer.
    """

    def __init__(self, step: OwnedStep) -> None:
        self._step = step
        self.optimizer = step.optimizer
        self._in_batch = False
        self._ready = False
        self._must_withhold = False
        self.since_log = Tracked(self.clipper.step_log)
        """The steps since something was logged."""
        self.in_epoch = Tracked(self.clipper.step_log)
        """The steps since the epoch began."""
        self._hooks: list[Any] = [
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
        ]

    @property
    def clipper(self) -> GradientClipper:
        """What clips."""
        return self._step.clipper

    def clip(self, scaler: Any) -> ClipResult:
        """Clip now, and withhold the step that follows if it has to be.

        Args:
            scaler: The ``GradScaler`` of the precision plugin, if it has one.
        """
        # Lightning leaves it to fused optimizers to unscale. The scaler has to look at the
        # gradients before a NaN is zeroed, or it would step and keep its scale; its own look
        # before the step then falls away, so that this costs no pass.
        fused = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        result = self._step.clip(scaler, unscale=fused)
        self._ready = True
        self._must_withhold = scaler is not None
        if scaler is None:
            self._step.withhold(under_way=True)
        return result

    def begin_batch(self) -> None:
        """Expect steps: those that Lightning makes."""
        self._in_batch = True

    def end_batch(self) -> None:
        """Forget a step that a scaler did not ask for; what steps now does not train."""
        self._in_batch = self._ready = self._must_withhold = False

    def release(self) -> None:
        """Take the hooks off; twice is harmless. The clipper stays, with its history."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._step.release()

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None and self._in_batch and not self._ready:
            raise ArgumentValueError(
                f"this {type(optimizer).__name__} is about to step on gradients that were not "
                "clipped: Lightning was not asked to step it. In manual optimisation take it from "
                "self.optimizers(), and not with use_pl_optimizer=False. No step was made."
            )
        if self._must_withhold:
            self._must_withhold = False
            self._step.withhold(under_way=True)

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        self._step.settle(negated(self._step.skipped))
        self._ready = False
