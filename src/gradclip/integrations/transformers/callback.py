"""The callback for ``transformers.Trainer``, and the mixin that spares a second measurement."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from gradclip.clipping import ClipResult, GradientClipper
from gradclip.clipping.arguments import ClipOptions
from gradclip.clipping.collect.sources import OptimizerParameters
from gradclip.clipping.step.held import lend
from gradclip.clipping.step.ownership import owner_of
from gradclip.clipping.step.wrappers import unwrapped
from gradclip.errors import (
    ArgumentValueError,
    DoubleClippingError,
    MissingDependencyError,
    StateError,
)
from gradclip.integrations.deepspeed import EngineWatch, engine_of, uses_deepspeed
from gradclip.integrations.loss_scaling import begin_anew
from gradclip.integrations.owned_step import OwnedStep, checked_options
from gradclip.integrations.transformers.history import KEY, exported, restore
from gradclip.integrations.transformers.limits import lower_limit, refuse_other_clipping

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingDependencyError(
        "GradientClippingCallback is for transformers.Trainer, which is not installed\n"
        "  pip install 'gradclip[transformers]'"
    ) from error

if TYPE_CHECKING:
    from accelerate import Accelerator

    from gradclip.clipping.clipper import PoliciesLike

__all__ = ["ClippingTrainerMixin", "GradientClippingCallback"]


class GradientClippingCallback(TrainerCallback):  # type: ignore[misc]
    """Clips where an accumulation window ends, right before the trainer steps.

    A step whose gradients hold a NaN or an infinity changes neither weights nor moments nor the
    scheduler. Whether it is one is read from the device once per step; all else when the trainer
    logs: ``clip/norm_pre`` and ``clip/norm_post`` of the last step, ``clip/fraction``, the part of
    the steps since the last log that was clipped, and ``clip/skipped``, how many were not made.

    Args:
        policy: As ``GradientClipper`` takes it; patterns are matched against the model's names.
        nonfinite: Likewise.
        max_consecutive_skips: Likewise; overflows of an active ``GradScaler`` do not count until
            its scale is down to 1.
        partitioned: Likewise.
        duplicated: Likewise.
        backend: Likewise.

    Attributes:
        clipper: What clips, from the begin of training to its end, or to ``remove()``; None else,
            and where DeepSpeed clips.
        last: The result of the last optimizer step; None before the first.

    Raises:
        ArgumentTypeError: GC011, for an argument of the wrong kind.
        ArgumentValueError: GC010, for one out of range; in training, for an optimizer that steps
            inside the backward pass, and at a step of a trainer that did not begin with it.
        DoubleClippingError: GC101, before the first step: ``max_grad_norm`` is set, or something
            else of gradclip clips this optimizer, or DeepSpeed does, or the trainer has this
            callback twice.

    Note:
        The trainer does not tell callbacks that training ended by an error. Training again goes on
        as if it were new; before the optimizer is used in any other way, ``remove()`` releases it.
    """

    def __init__(
        self,
        policy: "PoliciesLike | None" = None,
        **options: Unpack[ClipOptions],
    ) -> None:
        # Mistakes are reported now, and not after the model was loaded.
        self._policy, self._options = checked_options(type(self).__name__, policy, options)
        self.last: ClipResult | None = None
        self._accelerator: Accelerator | None = None
        self._watch: EngineWatch | None = None
        self._training: object = None
        self._step: OwnedStep | None = None
        self._lent = ExitStack()
        self._steps = 0
        self._clipped_and_skipped: Tensor | None = None

    @property
    def clipper(self) -> GradientClipper | None:
        """What clips, from the begin of training to its end, or to ``remove()``; None else."""
        return None if self._step is None else self._step.clipper

    def lower_into(self, accelerator: "Accelerator", max_grad_norm: float | None) -> None:
        """Write the limit into DeepSpeed's configuration, before the engine is made.

        ``ClippingTrainerMixin`` calls it. Without DeepSpeed it does nothing.

        Args:
            accelerator: The trainer's.
            max_grad_norm: Of its arguments; transformers writes it over ``"auto"``.

        Raises:
            DoubleClippingError: GC101, DeepSpeed has another limit, or cannot do what is asked.
        """
        self._accelerator = accelerator if uses_deepspeed(accelerator) else None
        if self._accelerator is not None:
            nonfinite = self._options.get("nonfinite", "skip")
            lower_limit(self._accelerator, self._policy, nonfinite, max_grad_norm)

    def report(self) -> dict[str, float]:
        """Return what is logged of the steps since the last call; empty if there were none."""
        if self.last is None or self._clipped_and_skipped is None:
            return {}
        clipped, skipped = self._clipped_and_skipped.tolist()
        steps, self._steps, self._clipped_and_skipped = self._steps, 0, None
        stats = self.last.to_host()
        return {
            "clip/norm_pre": stats.norm_pre,
            "clip/norm_post": stats.norm_post,
            "clip/fraction": clipped / steps,
            "clip/skipped": skipped,
        }

    def on_train_begin(
        self, args: Any, state: Any, *_: Any, model: Any, optimizer: Any, **__: Any
    ) -> None:
        """Bind to the optimizer that the trainer prepared, and refuse a second clipper."""
        if self._training is state:
            raise DoubleClippingError(
                "the trainer has this GradientClippingCallback twice, which would clip what it "
                "clipped already: take one out (trainer.remove_callback). No gradient was changed."
            )
        self.remove()
        if self._accelerator is not None:
            engine = engine_of(self._accelerator, model)
            self._watch = EngineWatch(engine, self._policy, **self._options)
            self._training = state
            return
        refuse_other_clipping(args.max_grad_norm, optimizer, self._policy)
        other = owner_of(optimizer)
        if isinstance(other, GradientClippingCallback) and other._training is not state:  # noqa: SLF001
            other.remove()  # it was in a training before this one, which ended by an error
        begin_anew(getattr(optimizer, "scaler", None))  # the trainer dropped the gradients
        source = OptimizerParameters(unwrapped(optimizer), module=model)
        label = type(self).__name__
        step = OwnedStep(optimizer, source, self._policy, self._options, owner=self, label=label)
        if (saved := state.stateful_callbacks.get(KEY)) is not None:
            try:
                restore(step.clipper, saved, next((p.device for p in source.tensors()), None))
            except StateError:
                step.release()
                raise
        self._step, self._training = step, state

    def on_pre_optimizer_step(
        self, _args: Any, state: Any, *_: Any, optimizer: Any, **__: Any
    ) -> None:
        """Clip, and keep the optimizer from stepping on a NaN or an infinity."""
        self._lent.close()  # the last step may have raised
        if self._training is not state:
            raise ArgumentValueError(
                "this GradientClippingCallback is not bound to this training: it was added after "
                "training began, or another trainer has it too, and trains now. Add it before "
                "train(), and give each trainer its own. No step was made."
            )
        if self._watch is not None:
            result = self._watch.observe()  # DeepSpeed stepped in the backward pass
            if result is None:
                return
            self.last = result
        else:
            assert self._step is not None  # bound, and without a watch
            self.last = self._step.clip(getattr(optimizer, "scaler", None))
            self._step.skipped = bool(self._step.skipped)  # the one number that is read
            self._step.withhold()
        self._count(self.last)

    def on_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        """Tell Accelerate of a step that was not made, so that the scheduler waits too."""
        if self._step is None:
            return
        self._step.settle(not self._step.skipped)
        if self._step.skipped:
            # What step_was_skipped returns; without a loss scaler nothing else ever sets it.
            self._lent.enter_context(lend(optimizer, "_is_overflow", value=True))

    def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Leave the clipper's history where the next checkpoint has it."""
        self._lent.close()
        if self.clipper is not None:
            state.stateful_callbacks[KEY] = exported(self.clipper)

    def on_log(self, _args: Any, state: Any, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Add the numbers, if the mixin did not, to what the callbacks after this one log."""
        if "loss" in logs and "clip/fraction" not in logs:
            numbers = self.report()
            logs.update(numbers)
            # Callbacks before this one may have logged something themselves.
            for entry in reversed(state.log_history):
                if "loss" in entry:
                    entry.update(numbers)
                    break

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Let the optimizer go: another callback may clip it."""
        self.remove()

    def remove(self) -> None:
        """Let the optimizer go, and undo what a step that raised left; twice is harmless.

        The end of training does it, and the mixin where training raises.
        """
        self._lent.close()
        if self._step is not None:
            self._step.release()
        self._step = self._watch = self._training = None
        self._steps, self._clipped_and_skipped = 0, None

    def _count(self, result: ClipResult) -> None:
        flags = torch.stack((result.clipped, result.skipped)).to(torch.int64)
        before = self._clipped_and_skipped
        self._clipped_and_skipped = flags if before is None else before + flags
        self._steps += 1


class ClippingTrainerMixin:
    """For a trainer with a ``GradientClippingCallback``: one measurement of the gradients, not two.

    With ``max_grad_norm=0`` a Trainer measures by clipping to infinity, which reads and writes
    every gradient again, and turns all of them NaN where one is infinite, before any callback sees
    them. This leaves the measurement to the callback, whose norm is logged as ``grad_norm``. The
    numbers reach every logger (TensorBoard, Weights & Biases), those that come before the
    callback too, and under DeepSpeed the limit is lowered and the engine's norm observed.

    It goes in front: ``class ClippedTrainer(ClippingTrainerMixin, SFTTrainer): pass``.
    """

    callback_handler: Any
    accelerator: Any
    args: Any

    def train(self, *args: Any, **options: Any) -> Any:
        """Train; under DeepSpeed the limit is lowered first."""
        for callback in self._clipping():
            callback.lower_into(self.accelerator, self.args.max_grad_norm)
        try:
            return super().train(*args, **options)  # type: ignore[misc]
        except BaseException:
            for callback in self._clipping():
                callback.remove()
            raise

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log, with the numbers of clipping beside a loss."""
        if "loss" in logs:
            for callback in self._clipping():
                numbers = callback.report()
                logs.update(numbers)
                if numbers:
                    logs["grad_norm"] = numbers["clip/norm_pre"]
        super().log(logs, *args, **options)  # type: ignore[misc]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if any(self._clipping()):
            return grad_norm
        return super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]

    def _clipping(self) -> Iterator[GradientClippingCallback]:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, GradientClippingCallback):
                yield callback
