"""Clipping in a loop on Accelerate: at the end of an accumulation window, on unscaled gradients."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack

from gradclip.clipping import ClipResult, GradientClipper
from gradclip.clipping.arguments import ClipOptions, HasPolicy
from gradclip.clipping.collect.sources import OptimizerParameters
from gradclip.clipping.step.ownership import owner_of
from gradclip.clipping.step.wrappers import unwrapped
from gradclip.errors import ArgumentTypeError
from gradclip.integrations.deepspeed import EngineWatch, engine_of
from gradclip.integrations.deepspeed.limits import refuse_change
from gradclip.integrations.owned_step import OwnedStep, Verdict

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn

    from gradclip.clipping.policies import PoliciesLike
    from gradclip.record.stats import Stats

__all__ = ["AcceleratorClipper"]


class AcceleratorClipper(HasPolicy):
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

    It needs no ``if accelerator.sync_gradients``: inside an accumulation window it does nothing.
    After a ``clip`` that found a NaN or an infinity the next ``optimizer.step()`` is not made:
    weights, moments and step counts stay as they are. Under DeepSpeed, which has clipped and
    stepped by then, it observes; lower the limit before ``accelerator.prepare``
    (``gradclip.integrations.deepspeed.lower``).

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
        record: Likewise.
        backend: Likewise.

    Raises:
        ArgumentTypeError: GC011, ``accelerator`` is none, or ``optimizer`` is none, or computes
            gradients in its step (LBFGS), or steps in two halves (SAM).
        ArgumentValueError: GC010, the optimizer steps parameters that it does not show.
        DoubleClippingError: GC101, DeepSpeed clips to something else, or the optimizer is clipped
            by an attachment.

    Note:
        ``accelerator.register_for_checkpointing(clipper)`` saves its history.
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        optimizer: "torch.optim.Optimizer",
        policy: "PoliciesLike | None" = None,
        *,
        model: "nn.Module | None" = None,
        **options: Unpack[ClipOptions],
    ) -> None:
        if not hasattr(accelerator, "sync_gradients"):
            raise ArgumentTypeError(
                f"accelerator is of type {type(accelerator).__qualname__}: expected an "
                "accelerate.Accelerator"
            )
        if not hasattr(optimizer, "param_groups"):
            raise ArgumentTypeError(
                f"optimizer is of type {type(optimizer).__qualname__}: expected a torch optimizer, "
                "prepared or not; a model goes into model="
            )
        self.accelerator = accelerator
        self._optimizer = optimizer
        self._last: ClipResult | None = None
        self._watch: EngineWatch | None = None
        engine = engine_of(accelerator, model)
        if engine is not None:
            self._watch = EngineWatch(engine, policy, **options)
            self._watch.check()
        other = owner_of(optimizer)
        if isinstance(other, AcceleratorClipper):
            other.remove()  # a cell of a notebook ran again: the new one takes its place
        source = OptimizerParameters(unwrapped(optimizer), module=model)
        label = type(self).__name__
        admits = None if engine is None else refuse_change
        if engine is not None:
            options.pop("record", None)  # the engine's steps are recorded
        self._step = OwnedStep(
            optimizer, source, policy, options, owner=self, label=label, admits=admits
        )
        self._verdict = Verdict(self._step, lasts=True)
        if engine is None:
            self._step.hold(self._verdict)

    @property
    def clipper(self) -> "GradientClipper":
        """What clips; its ``state_dict`` is the history."""
        return self._step.clipper

    @property
    def policy(self) -> Any:
        """What bounds the gradients; to be assigned, as ``GradientClipper.policy``."""
        return self.clipper.policy

    @policy.setter
    def policy(self, policy: "PoliciesLike") -> None:
        self.clipper.policy = policy

    @property
    def last(self) -> ClipResult | None:
        """The result of the last optimizer step; None before the first."""
        return self._last

    @property
    def stats(self) -> "Stats":
        """What all optimizer steps came to; see ``GradientClipper.stats``."""
        return (self.clipper if self._watch is None else self._watch).stats

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last optimizer step was not made, for any reason; reads the device.

        Ask after ``optimizer.step()``. ``accelerator.optimizer_step_was_skipped`` alone does not
        know of a step that clipping skipped, nor of a fused optimizer's overflow.
        """
        if not self.accelerator.sync_gradients or self._last is None:
            return False
        skipped = bool(self._last.withheld)
        if self.accelerator.scaler is not None:  # it skips whatever is not finite
            skipped = skipped or bool(self._last.nonfinite > 0)
            skipped = skipped or getattr(self._optimizer, "step_was_skipped", False)
        self._step.settle(not skipped)
        return skipped

    def note(self, *, loss: Any = None, lr: Any = None) -> None:
        """Tell the record the loss and the rate of the next step; see ``GradientClipper.note``."""
        (self._watch or self.clipper).note(loss=loss, lr=lr)

    def clip(self) -> ClipResult | None:
        """Clip at the end of an accumulation window.

        The host reads one number when ``optimizer.step()`` is called, whether to make it; for a
        fused optimizer of torch's own that has no step hooks, none.

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
        self._last = self._step.clip(self.accelerator.scaler)
        self._verdict.is_open = True
        return self._last

    def remove(self) -> None:
        """Let the optimizer go: something else may clip it; twice is harmless."""
        if self._watch is not None:
            self._watch.close()
        self._step.release()

    def state_dict(self) -> dict[str, Any]:
        """Return the clipper's history."""
        return self.clipper.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.clipper.load_state_dict(state)
