"""Clipping in a loop on Accelerate: at the end of an accumulation window, on unscaled gradients."""

from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from gradclip.clipping import ClipResult, GradientClipper
from gradclip.clipping.collect.parameters import OptimizerParameters
from gradclip.clipping.step.ownership import unwrapped
from gradclip.errors import ArgumentTypeError
from gradclip.integrations.deepspeed import EngineWatch, engine_of
from gradclip.integrations.loss_scaling import OverflowWatch, Unscaling

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn

    from gradclip.clipping.arguments import Nonfinite
    from gradclip.clipping.policies import PolicyLike
    from gradclip.clipping.ranks.dimension import GroupLike

__all__ = ["AcceleratorClipper"]


class AcceleratorClipper:
    """Clips between ``accelerator.backward`` and ``optimizer.step``, in place of Accelerate's call.

    .. code-block:: python

        clipper = AcceleratorClipper(accelerator, optimizer, 1.0)

        with accelerator.accumulate(model):
            accelerator.backward(loss)
            clipper.clip()                      # was: accelerator.clip_grad_norm_(...)
            optimizer.step()
            if not clipper.step_was_skipped:
                scheduler.step()
            optimizer.zero_grad()

    It needs no ``if accelerator.sync_gradients``: inside an accumulation window it does nothing. A
    step whose gradients hold a NaN or an infinity is not made, since they are dropped (``.grad =
    None``). Under DeepSpeed, which has clipped and stepped by then, it observes; lower the limit
    before ``accelerator.prepare`` (``gradclip.integrations.deepspeed.lower``).

    Args:
        accelerator: The one that prepared the optimizer.
        optimizer: The prepared optimizer.
        policy: As ``GradientClipper`` takes it.
        model: The prepared model: gives names, and is needed under FSDP1 and DeepSpeed.
        nonfinite: As ``GradientClipper`` takes it.
        max_consecutive_skips: Likewise; overflows of an active loss scaler do not count until its
            scale is down to 1.
        partitioned: Likewise.
        duplicated: Likewise.
        backend: Likewise.

    Raises:
        ArgumentTypeError: GC011, ``accelerator`` is none.
        DoubleClippingError: GC101, DeepSpeed clips to something else, or the optimizer is clipped
            by an attachment.

    Note:
        ``accelerator.register_for_checkpointing(clipper)`` saves its history.
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        optimizer: "torch.optim.Optimizer",
        policy: "PolicyLike | Mapping[str, PolicyLike | None]",
        *,
        model: "nn.Module | None" = None,
        nonfinite: "Nonfinite" = "skip",
        max_consecutive_skips: int = 25,
        partitioned: "Mapping[str, GroupLike] | None" = None,
        duplicated: "Mapping[str, GroupLike] | None" = None,
        backend: str = "auto",
    ) -> None:
        if not hasattr(accelerator, "sync_gradients"):
            raise ArgumentTypeError(
                f"accelerator is of type {type(accelerator).__qualname__}: expected an "
                "accelerate.Accelerator"
            )
        self.accelerator = accelerator
        self._optimizer = optimizer
        self._overflows, self._unscale = OverflowWatch(), Unscaling()
        self._last: ClipResult | None = None
        self._watch: EngineWatch | None = None
        engine = engine_of(accelerator, model)
        if engine is not None:
            self._watch = EngineWatch(
                engine, policy, nonfinite=nonfinite, max_consecutive_skips=max_consecutive_skips
            )
            self._watch.check()
        self.clipper = GradientClipper(
            OptimizerParameters(unwrapped(optimizer), module=model),
            policy,
            nonfinite=nonfinite,
            max_consecutive_skips=max_consecutive_skips,
            partitioned=partitioned,
            duplicated=duplicated,
            backend=backend,
        )

    @property
    def last(self) -> ClipResult | None:
        """The result of the last optimizer step; None before the first."""
        return self._last

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last optimizer step was not made, by whoever's doing; reads the device.

        Ask after ``optimizer.step()``. ``accelerator.optimizer_step_was_skipped`` alone does not
        know of a step that clipping skipped, nor of a fused optimizer's overflow.
        """
        if not self.accelerator.sync_gradients or self._last is None:
            return False
        skipped = bool(self._last.withheld)
        if self.accelerator.scaler is not None:  # it skips whatever is not finite
            skipped = skipped or bool(self._last.nonfinite > 0)
            skipped = skipped or getattr(self._optimizer, "step_was_skipped", False)
        self._overflows.settle(skipped)
        return skipped

    def clip(self) -> ClipResult | None:
        """Clip at the end of an accumulation window; one number is read from the device.

        Returns:
            What was done; None inside a window.

        Raises:
            NonFiniteGradientError: GC201, with ``nonfinite="raise"``.
            TooManySkipsError: GC202.
        """
        if not self.accelerator.sync_gradients:
            return None
        if self._watch is not None:
            self._last = self._watch.observe()
            return self._last
        scaler = self.accelerator.scaler
        self._unscale(scaler, self._optimizer)
        self._last = self.clipper.clip(overflow_expected=self._overflows.expects(scaler))
        if bool(self._last.withheld):
            for parameter in chain.from_iterable(
                group["params"] for group in self._optimizer.param_groups
            ):
                parameter.grad = None
        return self._last

    def state_dict(self) -> dict[str, Any]:
        """Return the clipper's history."""
        return self.clipper.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.clipper.load_state_dict(state)
