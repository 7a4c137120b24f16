"""The callback for ``transformers.Trainer``, and the mixin that spares a second measurement."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Unpack

from gradclip.clipping import ClipResult, GradientClipper
from gradclip.clipping.arguments import ClipOptions, HasPolicy
from gradclip.clipping.collect.sources import OptimizerParameters
from gradclip.clipping.policies import as_given, as_policies
from gradclip.clipping.step.held import lend
from gradclip.clipping.step.ownership import owner_of
from gradclip.clipping.step.rows import StepLog
from gradclip.clipping.step.wrappers import unwrapped
from gradclip.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    DoubleClippingError,
    MissingDependencyError,
    StateError,
)
from gradclip.integrations.deepspeed import EngineWatch, engine_of, uses_deepspeed
from gradclip.integrations.deepspeed.limits import refuse_change
from gradclip.integrations.loss_scaling import begin_anew
from gradclip.integrations.owned_step import OwnedStep, checked_options
from gradclip.integrations.tracked import Tracked, numbers_of
from gradclip.integrations.transformers.history import KEY, exported, restore
from gradclip.integrations.transformers.limits import lower_limit, refuse_other_clipping
from gradclip.integrations.transformers.order import handler_of_caller, log_first, log_in_order
from gradclip.record.stats import Stats

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingDependencyError(
        "GradientClippingCallback is for transformers.Trainer, which is not installed\n"
        "  pip install 'gradclip[transformers]'"
    ) from error

if TYPE_CHECKING:
    from accelerate import Accelerator

    from gradclip.clipping.policies import PoliciesLike

__all__ = ["ClippingTrainerMixin", "GradientClippingCallback"]


class GradientClippingCallback(HasPolicy, TrainerCallback):  # type: ignore[misc]
    """Clips where an accumulation window ends, right before the trainer steps.

    A step whose gradients hold a NaN or an infinity changes neither weights nor moments nor the
    scheduler. Whether it is one is read from the device once per step; all else when the trainer
    logs, beside a loss: ``gradclip/norm_pre`` and ``gradclip/norm_post`` of the last step, and of
    the steps since the last log ``gradclip/norm_max``, the largest norm,
    ``gradclip/clip_fraction``, the share that was clipped, and ``gradclip/skipped``, how many were
    not made. With limits by name pattern ``gradclip/<pattern>/norm_pre`` too. Every callback and
    logger of the trainer gets them, in whatever order they stand.

    Args:
        policy: As ``GradientClipper`` takes it; patterns are matched against the model's names.
        nonfinite: Likewise.
        max_consecutive_skips: Likewise; overflows of an active ``GradScaler`` do not count until
            its scale is down to 1.
        partitioned: Likewise.
        duplicated: Likewise.
        record: Likewise.
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
        self._log: StepLog | None = None
        self._since: Tracked | None = None
        self._handler: Any = None

    @property
    def stats(self) -> Stats:
        """What the steps of this training came to, or of the last one; waits for the device."""
        return Stats() if self._log is None else self._log.stats

    @property
    def policy(self) -> Any:
        """What bounds the gradients, in this training and the next; see ``GradientClipper.policy``.

        Raises:
            DoubleClippingError: GC101, in an assignment, under DeepSpeed.
        """
        return as_given(*as_policies(self._policy))

    @policy.setter
    def policy(self, policy: "PoliciesLike") -> None:
        if self._accelerator is not None:
            refuse_change(policy)
        as_policies(policy)
        if self.clipper is not None:
            self.clipper.policy = policy
        self._policy = policy

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
        since = None if self._since is None else self._since.take()
        if self.last is None or since is None or not since.steps:
            return {}
        return numbers_of(self.last, since)

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
            self._watch.begin()
            self._follow(self._watch.step_log)
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
        self._follow(step.clipper.step_log)

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
        """Add the numbers to what is logged, unless that has happened, and record the loss."""
        clips = self.clipper or self._watch
        if clips is not None and isinstance(loss := logs.get("loss"), float):
            clips.note_last(loss)
        if "loss" in logs and "gradclip/norm_pre" not in logs:
            numbers = self.report()
            logs.update(numbers)
            # Callbacks before this one may have logged something themselves.
            for entry in reversed(state.log_history):
                if "loss" in entry:
                    entry.update(numbers)
                    break

    def on_train_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Say whether steps were not made, and let the optimizer go: another may clip it."""
        if self._log is not None and state.is_world_process_zero:
            self._log.say_at_end(type(self).__name__)
        self.remove()

    def remove(self) -> None:
        """Let the optimizer go, and undo what a step that raised left; twice is harmless.

        The end of training does it, and the mixin where training raises.
        """
        self._lent.close()
        if self._step is not None:
            self._step.release()
        if self._watch is not None:
            self._watch.close()
        self._step = self._watch = self._training = self._since = None
        log_in_order(self._handler, self)
        self._handler = None

    def _follow(self, log: StepLog) -> None:
        """Count steps from now on, for what is logged, and log before all other callbacks."""
        self._log, self._since = log, Tracked(log)
        self._handler = handler_of_caller()
        log_first(self._handler, self)


class ClippingTrainerMixin:
    """For a trainer with a ``GradientClippingCallback``: one measurement of the gradients, not two.

    With ``max_grad_norm=0`` a Trainer measures by clipping to infinity, which reads and writes
    every gradient again, and turns all of them NaN where one is infinite, before any callback sees
    them. This leaves the measurement to the callback, whose norm is logged as ``grad_norm``. The
    numbers reach every logger (TensorBoard, Weights & Biases), those that come before the
    callback too, and under DeepSpeed the limit is lowered and the engine's norm observed.

    It goes in front: ``class ClippedTrainer(ClippingTrainerMixin, SFTTrainer): pass``.

    Raises:
        ArgumentTypeError: GC011, when such a class is defined with the trainer in front.
        ArgumentValueError: GC010, in ``train()``, where there is no ``GradientClippingCallback``,
            and ``max_grad_norm`` is 0: nothing would clip.
    """

    callback_handler: Any
    accelerator: Any
    args: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for base in cls.__mro__[: cls.__mro__.index(ClippingTrainerMixin)]:
            if hasattr(base, "train") and not issubclass(base, ClippingTrainerMixin):
                raise ArgumentTypeError(
                    f"{cls.__name__} has {base.__name__} in front of ClippingTrainerMixin, whose "
                    "methods would never be called. Put the mixin first: "
                    f"class {cls.__name__}(ClippingTrainerMixin, {base.__name__})."
                )

    def train(self, *args: Any, **options: Any) -> Any:
        """Train; under DeepSpeed the limit is lowered first."""
        own = self.args.max_grad_norm
        if not any(self._clipping()) and not (own and own > 0):
            raise ArgumentValueError(
                f"{type(self).__name__} has ClippingTrainerMixin and no GradientClippingCallback, "
                f"and max_grad_norm={own!r} switches the trainer's own clipping off: nothing would "
                "be clipped. Give callbacks=[GradientClippingCallback(1.0)], or max_grad_norm=1.0, "
                "or take the trainer without the mixin. No step was made."
            )
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
                    logs["grad_norm"] = numbers["gradclip/norm_pre"]
        super().log(logs, *args, **options)  # type: ignore[misc]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if any(self._clipping()):
            return grad_norm
        return super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]

    def _clipping(self) -> Iterator[GradientClippingCallback]:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, GradientClippingCallback):
                yield callback
