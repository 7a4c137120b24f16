"""One optimizer under Lightning: clipped, and kept from stepping on a NaN."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from gradclip.clipping import ClipResult
from gradclip.clipping.apply.coefficients import Flag
from gradclip.clipping.step.ownership import disowned, owned
from gradclip.clipping.step.withhold import withhold_within
from gradclip.errors import ArgumentValueError
from gradclip.integrations.loss_scaling import OverflowWatch, Unscaling
from gradclip.integrations.owned import OwnedClipper


class LightningStep:
    """The clipper of one optimizer, and the step that it may withhold.

    Without a loss scaler Lightning calls ``optimizer.step(closure)``, and clipping happens at the
    end of the closure: the step is withheld there and then. With one it calls the closure first
    and then ``scaler.step(optimizer)``, which sets ``found_inf`` anew: there a hook of torch
    withholds, so that what either found counts. Another hook gives everything back after the step.

    Args:
        optimizer: A torch optimizer.
        make: Makes its clipper.
        owner: What clips, by name of its class in errors.

    Raises:
        DoubleClippingError: GC101, something clips its gradients already.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        make: Callable[[], OwnedClipper],
        *,
        owner: object,
    ) -> None:
        self.optimizer = optimizer
        self._owner = owner
        self.clipper = make()
        if self.clipper.writes:
            owned(optimizer, owner, type(owner).__name__)
        self._in_batch = False
        self._ready = False
        self._withheld: Flag | None = None
        self._kept = ExitStack()
        self._overflows, self._unscale = OverflowWatch(), Unscaling()
        self._count = 0
        self._clipped = self._skipped = torch.zeros((), dtype=torch.int64)
        self._hooks: list[Any] = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def clip(self, scaler: Any) -> ClipResult:
        """Clip now, and withhold the step that follows if it has to be.

        Args:
            scaler: The ``GradScaler`` of the precision plugin, if it has one.
        """
        if scaler is not None and getattr(self.optimizer, "_step_supports_amp_scaling", False):
            # Lightning leaves it to fused optimizers. The scaler has to look at the gradients
            # before a NaN is zeroed, or it would step and keep its scale; its own look before the
            # step then falls away, so that this costs no pass.
            self._unscale(scaler, self.optimizer)
        result = self.clipper.clip(overflow_expected=self._overflows.expects(scaler))
        self._kept.close()  # where the last step was not made, or raised, nobody did
        self._ready = True
        if scaler is None:
            self._keep(result.withheld)
        else:
            self._withheld = result.withheld
            self._overflows.settle(result.withheld)
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
        self._withheld = None

    def tally(self) -> tuple[int, Tensor, Tensor]:
        """Return how many steps there were since it was last asked, clipped, and skipped."""
        counts = self._count, self._clipped, self._skipped
        self._count = 0
        self._clipped = self._skipped = torch.zeros((), dtype=torch.int64)
        return counts

    def release(self) -> None:
        """Take the hooks off; twice is harmless. The clipper stays, with its history."""
        self._kept.close()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        disowned(self.optimizer, self._owner)

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None and self._in_batch and not self._ready:
            raise ArgumentValueError(
                f"this {type(optimizer).__name__} is about to step on gradients that were not "
                "clipped: Lightning was not asked to step it. In manual optimisation take it from "
                "self.optimizers(), and not with use_pl_optimizer=False. No step was made."
            )
        withheld, self._withheld = self._withheld, None
        if withheld is not None:
            self._keep(withheld)

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        self._kept.close()
        self._ready = False

    def _keep(self, withheld: Flag) -> None:
        self._kept.enter_context(withhold_within(self.optimizer, withheld))
