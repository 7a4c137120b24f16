"""Clips in RoboOrchardLab's own trainer: gradclip's hook behind the face of one of its hooks.

Its trainer adds what ``grad_clip`` builds, then its ``OptimizerHook``, which steps optimizer and
scheduler after every batch, whatever happened in it. So the hook here decides before that, and
where nothing may be stepped on it stands in for both, for that one step.
"""

import sys
from contextlib import ExitStack
from dataclasses import dataclass, make_dataclass
from functools import cache
from operator import attrgetter
from typing import Any, TypeAlias
from weakref import ref

from gradclip.clipping import ClipResult, withhold
from gradclip.clipping.arguments import HasPolicy
from gradclip.clipping.step.held import lend
from gradclip.config import ClassType
from gradclip.errors import ArgumentValueError, DoubleClippingError, MissingDependencyError
from gradclip.integrations.loss_scaling import begin_anew
from gradclip.pipeline.hooks import grad_clip, mixin
from gradclip.record.stats import Stats

try:
    from robo_orchard_lab.pipeline.hooks import mixin as theirs
except ImportError as error:
    raise MissingDependencyError(
        f"RoboOrchardLab cannot be imported ({error})\n"
        "  pip install robo-orchard-lab==0.4.0 'transformers<5'"
    ) from error

__all__ = ["GradientClippingHook", "GradientClippingHookConfig", "PipelineHookArgs"]


@dataclass
class PipelineHookArgs(theirs.PipelineHookArgs):  # type: ignore[misc]
    """What their hooks are given around a step, with a place for what clipping did."""

    clip_result: ClipResult | None = None
    """None before clipping, and where nothing was clipped."""


def _of_clipping(name: str) -> property:
    """Return an attribute that is that of gradclip's own hook, also where it is assigned."""

    def assign(hook: "GradientClippingHook", value: object) -> None:
        setattr(hook._clipping, name, value)  # noqa: SLF001 - its own

    return property(
        attrgetter(f"_clipping.{name}"),
        assign,
        doc=getattr(grad_clip.GradientClippingHook, name).__doc__,
    )


class GradientClippingHook(HasPolicy, theirs.PipelineHooks):  # type: ignore[misc]
    """Clips the gradients of the optimizer's parameters before their ``OptimizerHook`` steps.

    What it clips, and when, is as in ``gradclip.pipeline.hooks.GradientClippingHook``. The result
    is on the ``clip_result`` of the ``on_step`` arg. A step on a NaN or an infinity in what the
    policy bounds is not made, nor is one after an error in the batch: weights, moments and the
    scheduler stay as they are. One number is read from the device per step: whether to skip.

    Args:
        cfg: What to clip to.

    Raises:
        ArgumentValueError: GC010, in ``optimizer.step()``: it would come before clipping, because
            this hook was not passed as the trainer's ``grad_clip``. No step is made.
        DoubleClippingError: GC101, before a step: there are two of these hooks.
    """

    def __init__(self, cfg: "GradientClippingHookConfig") -> None:
        super().__init__()
        self._clipping = grad_clip.GradientClippingHook(cfg)
        self._arg = mixin.PipelineHookArgs()
        self._step: Any = None
        self._outer: _Handled = None, None
        self._guard: _Guard | None = None
        self._broken = False
        self.register_hook(
            "on_step",
            theirs.HookContext.from_callable(
                "clip gradients", before=self._before_step, after=self._after_step
            ),
        )
        end = theirs.HookContext.from_callable("clip gradients", after=self._after_loop)
        self.register_hook("on_loop", end)

    policy = _of_clipping("policy")
    clip_mode, clip_value = _of_clipping("clip_mode"), _of_clipping("clip_value")
    max_norm, norm_type = _of_clipping("max_norm"), _of_clipping("norm_type")

    @property
    def stats(self) -> Stats:
        """What all optimizer steps came to; see ``GradientClipper.stats``."""
        return self._clipping.stats

    def _before_step(self, arg: Any) -> None:
        _give_place(arg)
        arg.clip_result = None
        # Their hooks are not told of an error, but run while it is being handled.
        self._outer = _handled()
        self._unguard()
        if self._broken and arg.optimizer is not None:
            arg.optimizer.zero_grad()
            begin_anew(arg.accelerator.scaler)
        self._broken = False
        if arg.optimizer is not None:
            self._guard = _Guard(arg.optimizer, arg)
        self._arg = mixin.PipelineHookArgs(
            accelerator=arg.accelerator, model=arg.model, optimizer=arg.optimizer
        )
        if arg.start_epoch or arg.start_step:  # it goes on from a checkpoint
            self._clipping.go_on(_steps_before(arg))
        self._step = self._clipping.begin("on_step", self._arg)
        self._step.__enter__()

    def _after_step(self, arg: Any) -> None:
        self._unguard()
        now, outer, self._outer = _handled(), self._outer, (None, None)
        try:
            # What is handled around a step was there before, unless it was raised anew since.
            if now[0] is not None and now != outer:
                _hold(arg, "optimizer", "lr_scheduler")
                self._leave_step(now[0])
                return
            self._arg.reduce_loss = arg.reduce_loss
            with self._clipping.begin("on_batch", self._arg):
                pass
            self._leave_step(None)
            arg.clip_result = self._arg.clip_result
            if arg.clip_result is not None:
                self._decide(arg, arg.clip_result)
        except BaseException:
            self._broken = True  # the gradients stay
            raise
        finally:
            # An error that was kept would keep its frames alive, and the tensors in them.
            self._arg = mixin.PipelineHookArgs()

    def _after_loop(self, arg: Any) -> None:
        with self._clipping.begin("on_loop", mixin.PipelineHookArgs(accelerator=arg.accelerator)):
            pass

    def _leave_step(self, error: BaseException | None) -> None:
        step, self._step = self._step, None
        if step is not None:
            step.__exit__(None if error is None else type(error), error, None)

    def _unguard(self) -> None:
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.remove()

    def _decide(self, arg: Any, result: ClipResult) -> None:
        scaled = arg.accelerator.scaler is not None
        skipped = bool(result.skipped | (result.nonfinite > 0) if scaled else result.withheld)
        if skipped:
            _hold(arg, "lr_scheduler")
            # A scaler must learn of the overflow: Accelerate's wrapper is asked to step.
            _hold(arg, "optimizer", asks=scaled)
        self._arg.is_optimizer_step_committed = not skipped
        with self._clipping.begin("on_optimizer_step", self._arg):
            pass


class GradientClippingHookConfig(grad_clip.GradientClippingHookConfig):
    """What RoboOrchardLab's trainer takes as ``grad_clip``; the fields are those of gradclip's."""

    class_type: ClassType[GradientClippingHook] = GradientClippingHook


def _steps_before(arg: Any) -> int:
    """Return how many optimizer steps a run has asked for before this batch."""
    window: int = arg.accelerator.gradient_accumulation_steps
    batches: int = arg.global_step_id
    if not hasattr(arg.dataloader, "__len__"):
        return batches // window
    epochs, inside = divmod(batches, len(arg.dataloader))
    return epochs * -(-len(arg.dataloader) // window) + inside // window  # an epoch ends a window


_Handled: TypeAlias = tuple[BaseException | None, object]


def _handled() -> _Handled:
    """Return the error that is being handled, and where it was raised last."""
    error = sys.exception()
    return error, None if error is None else error.__traceback__


def _give_place(arg: Any) -> None:
    """Give an arg a field for the result: it copies itself from its attributes, all of them."""
    kind: Any = type(arg)
    if not hasattr(arg, "clip_result"):
        arg.__class__ = PipelineHookArgs if kind is theirs.PipelineHookArgs else _with_place(kind)


@cache
def _with_place(kind: Any) -> type:
    """Return the class of a trainer's own args, with a field for the result."""
    field = ("clip_result", ClipResult | None, None)
    made = make_dataclass(kind.__name__, [field], bases=(kind,))
    made.__module__ = kind.__module__
    return made


class _Guard:
    """Stands for the ``step`` of an optimizer until its gradients are clipped.

    Raises:
        DoubleClippingError: GC101, there is one already.
    """

    def __init__(self, optimizer: Any, arg: Any) -> None:
        other = vars(optimizer).get("step")
        if isinstance(other, _Guard):
            other.remove()  # an error kept its hook from it, unless it is of this very step
        if isinstance(other, _Guard) and other.arg() is arg:
            raise DoubleClippingError(
                "there are two of gradclip's GradientClippingHook in this trainer, and a second "
                "limit silently changes what the first one means. Keep the one that is passed as "
                "grad_clip=. No step was made."
            )
        self.arg: ref[Any] = ref(arg)
        self._lent = ExitStack()
        self._lent.enter_context(lend(optimizer, "step", self))

    def remove(self) -> None:
        """Give the optimizer its step back."""
        self._lent.close()

    def __call__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002, whatever step takes
        self.remove()
        raise ArgumentValueError(
            "the optimizer is about to step on gradients that are not clipped yet: gradclip's hook "
            "comes after what steps. RoboOrchardLab's OptimizerHook runs before the hooks of "
            "hooks=: pass the configuration to HookBasedTrainer as grad_clip=, or in hooks of your "
            "own put it in front. No step was made."
        )


class _Held:
    """Stands on an arg for an object whose next ``step`` is not to be made, until that is asked.

    Args:
        arg: Where it stands.
        name: The attribute.
        asks: Whether a wrapper is asked to step all the same; the optimizer behind it does not.
    """

    def __init__(self, arg: Any, name: str, *, asks: bool) -> None:
        self._arg, self._name, self._held = arg, name, getattr(arg, name)
        self._asks = asks

    def step(self, *args: Any, **kwargs: Any) -> None:
        setattr(self._arg, self._name, self._held)
        if self._asks:
            with withhold(self._held, skipped=True):
                self._held.step(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._held, name)


def _hold(arg: Any, *names: str, asks: bool = False) -> None:
    for name in names:
        if getattr(arg, name) is not None:
            setattr(arg, name, _Held(arg, name, asks=asks))
