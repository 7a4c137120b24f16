"""DeepSpeed's engine: the limit is written into its configuration, and its steps are observed."""

import sys
from collections.abc import MutableMapping
from math import inf, isfinite
from typing import TYPE_CHECKING, Any, Unpack
from weakref import WeakSet

import torch

from gradclip.clipping import ClipResult
from gradclip.clipping.arguments import (
    ClipOptions,
    HasPolicy,
    Nonfinite,
    one_policy,
    read_options,
)
from gradclip.clipping.collect.sources import ListedParameters, OptimizerParameters
from gradclip.clipping.policies import as_policies
from gradclip.clipping.step.nonfinite import SkipCounter
from gradclip.clipping.step.recorder import recorder_of
from gradclip.clipping.step.rows import StepLog
from gradclip.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    NonFiniteGradientError,
    TooManySkipsError,
)
from gradclip.integrations.deepspeed.limits import (
    KEY,
    check_able,
    check_engine,
    check_equal,
    check_limits,
    checked_nonfinite,
    limit_of,
    refuse_change,
)
from gradclip.record.stats import Stats

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["EngineWatch", "engine_of", "lower", "observe", "uses_deepspeed"]

_EPSILON = 1e-6
"""What DeepSpeed adds to the norm before it divides."""
_NORMS_KEPT = 4
"""How many finite norms an error quotes."""
_WARNED: "WeakSet[Any]" = WeakSet()
"""Engines whose first skipped step was warned of: ``observe`` has no memory of its own."""


def lower(
    target: "Accelerator | MutableMapping[str, Any]",
    policy: Any = None,
    *,
    max_norm: float | None = None,
) -> None:
    """Write gradclip's limit into DeepSpeed's configuration, before the engine is made.

    An absent ``gradient_clipping`` or ``"auto"`` is set; a number must be the same limit already.
    A policy without a ceiling (``ObserveClip``, infinity) becomes 0, which to DeepSpeed means not
    to clip. Where the engine of an accelerator exists already, its limit must be the same.

    Args:
        target: An ``Accelerator`` with a DeepSpeed plugin, or a configuration for
            ``deepspeed.initialize``.
        policy: What ``GradientClipper`` takes, or a ``GradientClippingHookConfig``.
        max_norm: A number, in place of a policy.

    Raises:
        DoubleClippingError: GC101, DeepSpeed clips to something else, or cannot do what is asked;
            nothing was changed.
        ArgumentValueError: GC010, an accelerator that is not set up for DeepSpeed.
        ArgumentTypeError: GC011, a target or a policy of another kind.
    """
    limit = limit_of(one_policy("lower", policy, max_norm))
    if isinstance(target, MutableMapping):
        check_able(target)
        check_equal(target.get(KEY), limit)
        target[KEY] = limit
        return
    if not hasattr(target, "distributed_type"):
        raise ArgumentTypeError(
            f"target is of type {type(target).__qualname__}: expected an accelerate.Accelerator or "
            "a DeepSpeed configuration, which is a dict"
        )
    if not uses_deepspeed(target):
        raise ArgumentValueError(
            f"the accelerator is set up for {target.distributed_type}, not for DeepSpeed, so "
            "nothing would read the limit. Give Accelerator(deepspeed_plugin=DeepSpeedPlugin(...)) "
            "and run it through a launcher; cpu=True makes Accelerate ignore the plugin."
        )
    if target.deepspeed_engine_wrapped is not None:
        check_engine(target.deepspeed_engine_wrapped.engine, limit)
        return
    plugin = target.deepspeed_plugin
    config = plugin.deepspeed_config
    check_able(config)
    # The plugin drops a 0 on its way to the configuration, where absent means 1.0.
    check_equal(config.get(KEY, plugin.gradient_clipping), limit)
    config[KEY] = plugin.gradient_clipping = limit


def observe(
    engine: Any,
    policy: Any = None,
    *,
    max_norm: float | None = None,
    nonfinite: Nonfinite = "skip",
) -> ClipResult:
    """Return what the engine measured and did in the step that it just made.

    Args:
        engine: A ``DeepSpeedEngine`` that made a step: at the end of an accumulation window.
        policy: What was lowered.
        max_norm: A number, in place of a policy.
        nonfinite: ``"raise"`` raises where the engine skipped a step for a NaN or an infinity.

    Returns:
        A result on the CPU. ``norm_pre`` is the engine's norm: infinite where it skipped the step,
        for DeepSpeed does not tell NaN and infinity apart. ``coefficient`` and ``norm_post``
        follow from it by DeepSpeed's formula, ``max_norm / (norm + 1e-6)``. ``nonfinite`` is 0 or
        1: in how many tensors, DeepSpeed does not tell.

    Raises:
        DoubleClippingError: GC101, the engine's limit is another, or it does not tell the norm.
        NonFiniteGradientError: GC201, with ``nonfinite="raise"``; the weights are those of before.
            Without it too if the engine did step on such gradients.
        ArgumentValueError: GC010, the engine has made no step.
    """
    result = EngineWatch(
        engine, one_policy("observe", policy, max_norm), from_step=0, nonfinite=nonfinite
    ).observe()
    if result is None:
        raise ArgumentValueError(
            "the engine has made no step that could be observed: observe after engine.step(), or "
            "after accelerator.backward(loss), which steps the engine"
        )
    return result


def uses_deepspeed(accelerator: "Accelerator | None") -> bool:
    """Whether an accelerator hands model and optimizer to DeepSpeed."""
    return accelerator is not None and bool(accelerator.distributed_type == "DEEPSPEED")


def engine_of(accelerator: "Accelerator | None", model: object) -> Any:
    """Return the engine that steps a model, or None where DeepSpeed has no part in it.

    Args:
        accelerator: The one of the loop, if it has one.
        model: The model of the loop; without an accelerator it may be an engine itself.

    Raises:
        ArgumentValueError: GC010, the accelerator is set up for DeepSpeed and has no engine yet.
    """
    if uses_deepspeed(accelerator):
        assert accelerator is not None
        wrapped = accelerator.deepspeed_engine_wrapped
        if wrapped is None:
            raise ArgumentValueError(
                "the accelerator is set up for DeepSpeed and has no engine yet. Call "
                "gradclip.integrations.deepspeed.lower(accelerator, ...), then "
                "accelerator.prepare(model, optimizer, ...) with the objects of the loop."
            )
        return wrapped.engine
    deepspeed = sys.modules.get("deepspeed")  # without it there is no engine
    is_engine = deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine)
    return model if is_engine else None


class EngineWatch(HasPolicy):
    """Follows an engine from step to step: a result for each, and errors where they are due.

    Args:
        engine: A ``DeepSpeedEngine``.
        policy: What was lowered.
        from_step: The engine's ``global_steps`` that is known already; that of now by default.
        options: The keywords of ``GradientClipper``. ``nonfinite`` is ``"skip"``: the engine drops
            the step; or ``"raise"``. Where DeepSpeed adapts a loss scale it answers for overflows
            itself, and none count towards ``max_consecutive_skips``.

    Raises:
        DoubleClippingError: GC101, the engine's limit is another, or it cannot be observed.
    """

    def __init__(
        self,
        engine: Any,
        policy: Any = None,
        *,
        from_step: int | None = None,
        **options: Unpack[ClipOptions],
    ) -> None:
        self.engine = engine
        self._policy, checked = read_options(type(self).__name__, policy, options)
        self._limit = limit_of(self._policy)
        self._raises = checked_nonfinite(checked.nonfinite) == "raise"
        self._skips = SkipCounter(checked.max_consecutive_skips)
        self._norms: list[float] = []
        self.step_log = StepLog("DeepSpeed", owned=True)
        """The numbers of all steps."""
        self._seen = engine.global_steps if from_step is None else from_step
        check_engine(engine, self._limit)
        source = OptimizerParameters(engine.optimizer) if checked.folder else ListedParameters([])
        self._recorder = recorder_of(self, checked.folder, "DeepSpeed", source)

    @property
    def policy(self) -> Any:
        """What was lowered.

        Raises:
            DoubleClippingError: GC101, in an assignment: the engine has read its limit.
        """
        return self._policy

    @policy.setter
    def policy(self, policy: object) -> None:
        refuse_change(policy)

    def check(self) -> None:
        """Check that the engine still has the limit: loading a checkpoint brings an old one back.

        Raises:
            DoubleClippingError: GC101, it has another.
        """
        check_limits(self.engine, self._limit)

    def begin(self) -> None:
        """Check, and open the record: before a step, when a checkpoint has been loaded.

        Raises:
            DoubleClippingError: GC101, see ``check``.
            RecordError: GC302, the folder cannot be recorded in.
        """
        self.check()
        self._open(self.engine.global_steps)

    def _open(self, step: int) -> None:
        if not self._recorder.is_open:
            if step:
                self._recorder.resume()  # the engine goes on with an earlier run
            self._recorder.open(step, (), as_policies(self._policy)[0])

    def observe(self) -> ClipResult | None:
        """Return the result of the engine's last step, or None if it made none since.

        Raises:
            NonFiniteGradientError: GC201, see ``observe``.
            TooManySkipsError: GC202, more than ``max_consecutive_skips`` in a row were skipped.
        """
        engine = self.engine
        if engine.global_steps == self._seen:
            return None
        self.check()
        self._seen = engine.global_steps
        applied = engine.was_step_applied()
        norm = float(engine.get_global_grad_norm())
        # DeepSpeed's own mark of a norm that is none is -1.
        finite = isfinite(norm) and norm >= 0
        if finite and applied:
            self._norms = [*self._norms[1 - _NORMS_KEPT :], norm]
        elif applied:
            raise NonFiniteGradientError(
                f"{self._report()}\n  DeepSpeed made the step all the same: the weights are no "
                "longer to be used. Go back to a checkpoint."
            )
        scaled = bool(getattr(engine.optimizer, "dynamic_loss_scale", False))
        if self._raises and not applied and not scaled:
            raise NonFiniteGradientError(
                f"{self._report()}\n  DeepSpeed did not make the step: weights, moments and "
                "scheduler are those of before it. It has dropped the gradients, so which "
                "parameters\n  were at fault cannot be told. "
                'To drop such a step and keep training: nonfinite="skip".'
            )
        result = _result(norm if finite else inf, self._limit, applied=applied)
        self.step_log.push(result, self._seen - 1, expected=scaled)
        self._open(self._seen - 1)
        self._recorder.push(result, self._seen - 1, (), scaled, None)
        describe = None if engine in _WARNED else self._describe
        if self._skips.record(not applied, describe=describe, expected=scaled):
            raise TooManySkipsError(
                f"{self._report()}\n  DeepSpeed skipped more than max_consecutive_skips="
                f"{self._skips.limit} steps in a row: these are not spikes. Lower the learning "
                "rate, or look at the data and the loss."
            )
        return result

    def note(self, *, loss: Any = None, lr: Any = None) -> None:
        """Tell the record the loss and the rate of the next step; see ``GradientClipper.note``."""
        self._recorder.note(loss=loss, lr=lr)

    def note_last(self, loss: float) -> None:
        """Tell the record the loss of the last step; see ``GradientClipper.note_last``."""
        self._recorder.note_last(loss)

    def close(self) -> None:
        """Write to the record whatever is waiting, and close it."""
        self._recorder.close()

    @property
    def stats(self) -> Stats:
        """What the steps that were observed came to."""
        return self.step_log.stats

    def _describe(self, by_policy: bool) -> str:  # noqa: ARG002 - DeepSpeed has no policy
        _WARNED.add(self.engine)
        return (
            f"DeepSpeed skipped step {self._seen - 1}: its gradients hold a NaN or an infinity. It "
            "has dropped them, so which parameters were at fault cannot be told. If it happens "
            "again, lower the learning rate, or look at the data and the loss; "
            'nonfinite="raise" stops at the first one. Later skips are counted in `stats`.'
        )

    def _report(self) -> str:
        norms = "  ".join(f"{norm:.4g}" for norm in self._norms) or "none yet"
        limit = f"{self._limit:g}" if self._limit else "none"
        return (
            "The total norm of order 2.0 for gradients from `parameters` is non-finite at step "
            f"{self.engine.global_steps} (measured by DeepSpeed)\n"
            f"  last finite norms:  {norms}        limit = {limit}"
        )


def _result(norm: float, limit: float, *, applied: bool) -> ClipResult:
    ceiling = limit or inf
    kept = min(1.0, ceiling / (norm + _EPSILON)) if applied else 0.0
    measured_S = torch.tensor([norm], dtype=torch.float64)
    return ClipResult(
        measured_S=measured_S,
        thresholds=ceiling,
        coefficients=torch.tensor([kept], dtype=torch.float64),
        withheld=not applied,
        tensor_sums_T=measured_S,
        norm_type=2.0,
        dtype=torch.float32,
        scopes=("*",),
    )
