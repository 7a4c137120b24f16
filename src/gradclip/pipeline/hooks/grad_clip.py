"""Gradient clipping as a hook: the one place that joins the engine to the hooks."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from gradclip.clipping import ClipResult, GradientClipper, NormClip, ValueClip
from gradclip.clipping.arguments import ClipOptions, HasPolicy
from gradclip.clipping.collect.sources import OptimizerParameters
from gradclip.clipping.policies import PoliciesLike, as_given, as_policies
from gradclip.clipping.policies.checks import check_skips
from gradclip.config import Ceiling, ClassType, NormOrder
from gradclip.errors import ArgumentValueError, DoubleClippingError
from gradclip.hook import HookContext
from gradclip.integrations.deepspeed import EngineWatch, engine_of, lower
from gradclip.integrations.deepspeed.limits import refuse_change
from gradclip.integrations.owned_step import OwnedStep
from gradclip.integrations.wrapped import behind_accelerate
from gradclip.pipeline.hooks.mixin import PipelineHookArgs, PipelineHooks, PipelineHooksConfig
from gradclip.pipeline.policy_field import (
    PolicyByGroup,
    PolicyByPattern,
    PolicyField,
    PolicyOrNumber,
)
from gradclip.pipeline.process_groups import GroupsByPattern, resolve_groups
from gradclip.record.stats import Stats

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

__all__ = ["GradientClippingHook", "GradientClippingHookConfig"]


class GradientClippingHook(HasPolicy, PipelineHooks):
    """Clips the gradients of the optimizer's parameters, once per optimizer step.

    It clips after ``on_step``, at its own place, or before ``on_optimizer_step`` if that comes
    first: whether it is registered before or after the optimizer hook makes no difference. Within
    an accumulation window, and after an error, it does nothing.

    Under DeepSpeed, which clips inside its own step, it clips nothing: it checks before a step that
    the engine has its limit, and observes afterwards what the engine did.

    Args:
        cfg: What to clip to.

    Attributes:
        clipper: The clipper that is bound to the optimizer; None before the first step, and where
            DeepSpeed clips.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> arg = PipelineHookArgs(optimizer=torch.optim.SGD([weight]))
    >>> hooks = PipelineHooks.from_hooks(GradientClippingHookConfig(clip_mode="norm", max_norm=1))
    >>> with hooks.begin("on_step", arg):
    ...     weight.grad = torch.tensor([3.0, 4.0])
    >>> arg.clip_result
    ClipResult(norm_pre=5, norm_post=1, threshold=1, coefficient=0.2, \
clipped=True, skipped=False, nonfinite=0)
    """

    def __init__(self, cfg: "GradientClippingHookConfig") -> None:
        super().__init__()
        self._cfg = cfg
        self._policy: Any = cfg.as_policy()
        self._is_lowered = False
        self._step: OwnedStep | None = None
        self._watch: EngineWatch | None = None
        self._state: Mapping[str, Any] | None = None
        self._first = 0
        self._result: ClipResult | None = None
        self._stepped = self._open = False
        self._losses: list[torch.Tensor] = []
        name, each = "clip gradients", HookContext.from_callable
        self.register_hook("on_batch", each(name, after=self._after_batch))
        self.register_hook("on_loop", each(name, after=self._after_loop))
        self.register_hook("on_step", each(name, self._forget, self._after_step))
        step = self._before_optimizer_step, self._after_optimizer_step
        self.register_hook("on_optimizer_step", each(name, *step))

    @property
    def policy(self) -> Any:
        """What bounds the gradients; to be assigned, as ``GradientClipper.policy``.

        Raises:
            ArgumentValueError: GC010, in an assignment here, or to one of the four fields below,
                that cannot be, or would change nothing.
            DoubleClippingError: GC101, likewise, under DeepSpeed.
        """
        return as_given(*as_policies(self._policy))

    @policy.setter
    def policy(self, policy: PoliciesLike) -> None:
        _check_policy(policy, self._cfg.max_consecutive_skips)
        self._assign(self._cfg.with_policy(policy), policy)

    @property
    def clip_mode(self) -> str | None:
        """That of the configuration; to be assigned where ``clip_value`` or ``max_norm`` is set."""
        return self._cfg.clip_mode

    @clip_mode.setter
    def clip_mode(self, mode: Literal["norm", "value"]) -> None:
        self._assign_field("clip_mode", mode)

    @property
    def clip_value(self) -> Any:
        """That of the configuration; to be assigned where ``clip_mode`` is "value"."""
        return self._cfg.clip_value

    @clip_value.setter
    def clip_value(self, value: float) -> None:
        self._assign_field("clip_value", value)

    @property
    def max_norm(self) -> Any:
        """That of the configuration; to be assigned where ``clip_mode`` is "norm"."""
        return self._cfg.max_norm

    @max_norm.setter
    def max_norm(self, value: float) -> None:
        self._assign_field("max_norm", value)

    @property
    def norm_type(self) -> Any:
        """Likewise, before the first step."""
        return self._cfg.norm_type

    @norm_type.setter
    def norm_type(self, value: float) -> None:
        self._assign_field("norm_type", value)

    def _assign_field(self, name: str, value: object) -> None:
        used = {"norm": ("max_norm", "norm_type"), "value": ("clip_value",)}
        mode = self._cfg.clip_mode
        if mode is None or name not in ("clip_mode", *used[mode]):
            raise ArgumentValueError(
                f"to assign {name} would change nothing: this hook clips by {self.policy!r}. "
                "Assign policy. Nothing was changed."
            )
        cfg = self._cfg.replace(**{name: value})
        self._assign(cfg, cfg.as_policy())

    def _assign(self, cfg: "GradientClippingHookConfig", policy: PoliciesLike) -> None:
        if self._is_lowered or self._watch is not None:
            refuse_change(policy)
        if self.clipper is not None:
            self.clipper.policy = policy
        self._cfg, self._policy = cfg, policy

    @property
    def clipper(self) -> GradientClipper | None:
        """What clips; None before the first step, and where DeepSpeed clips."""
        return None if self._step is None else self._step.clipper

    @property
    def stats(self) -> Stats:
        """What all optimizer steps came to; see ``GradientClipper.stats``."""
        counts = self._watch or self.clipper
        return Stats() if counts is None else counts.stats

    def take_back(self) -> None:
        """Take what clipping noted of a step that was not made out of the clipper's history."""
        if self._open and self.clipper is not None:
            self.clipper.take_back()
        self._open = False
        self._losses.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the clipper's history, once there is one."""
        state = self._state if self.clipper is None else self.clipper.state_dict()
        return {} if state is None else dict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the clipper's history, at the first step if no clipper is bound yet."""
        self._state = state
        if self.clipper is not None:
            self.clipper.load_state_dict(state)

    def go_on(self, step: int) -> None:
        """Count from a step on, in a run that goes on from a checkpoint that has no history."""
        if self.clipper is None:
            self._first = step

    def lower_into(self, accelerator: "Accelerator") -> None:
        """Write the limit into DeepSpeed's configuration, before ``accelerator.prepare``.

        Raises:
            DoubleClippingError: GC101, DeepSpeed cannot do what this hook is configured for.
        """
        lower(accelerator, self._cfg)
        self._is_lowered = True

    def record_in(self, folder: str) -> None:
        """Record in a folder, from the first step on; ``RecordHook`` asks for it.

        Raises:
            ArgumentValueError: GC010, it records in another one, or has clipped already.
        """
        if self._cfg.record != folder and (self._cfg.record or self.clipper or self._watch):
            raise ArgumentValueError(
                f"the hook that clips cannot record in {folder!r}: it has begun with "
                f"record={self._cfg.record!r}. Name one folder, before the first step."
            )
        self._cfg = self._cfg.replace(record=folder)

    def _after_batch(self, arg: PipelineHookArgs) -> None:
        if self._cfg.record and arg.exception is None and arg.reduce_loss is not None:
            self._losses.append(arg.reduce_loss)

    def _after_loop(self, arg: PipelineHookArgs) -> None:
        counts = self._watch or self.clipper
        if counts is not None:
            counts.close()
            if arg.is_main_process:
                counts.step_log.say_at_end(type(self).__name__)

    def _forget(self, arg: PipelineHookArgs) -> None:
        arg.clip_result = self._result = None
        self._stepped = False
        engine = engine_of(arg.accelerator, arg.model)
        if engine is not None:  # it steps in the backward pass, so this is checked before
            self._watching(engine).begin()

    def _after_step(self, arg: PipelineHookArgs) -> None:
        if self._result is None:
            self._clip(arg)

    def _before_optimizer_step(self, arg: PipelineHookArgs) -> None:
        # A loop without on_step never forgets, so the next optimizer step must.
        if self._stepped:
            if arg.clip_result is self._result:
                arg.clip_result = None
            self._result = None
            self._stepped = False
        if self._result is None:
            self._clip(arg)

    def _after_optimizer_step(self, arg: PipelineHookArgs) -> None:
        self._stepped = True
        self._open = self._open and not arg.is_optimizer_step_settled
        if self._step is not None:
            self._step.settle(arg.is_optimizer_step_committed)

    def _clip(self, arg: PipelineHookArgs) -> None:
        if arg.exception is not None:
            return
        if arg.optimizer is None:
            raise ArgumentValueError(
                "GradientClippingHook clips the parameters of arg.optimizer, which is None; "
                "nothing was clipped. Give PipelineHookArgs(optimizer=...) to begin()."
            )
        if not arg.is_optimizer_step_boundary:
            return
        if arg.clip_result is not None:
            raise DoubleClippingError(
                "the gradients of this step were already clipped by another hook "
                f"({arg.clip_result!r}); a second limit would silently change what the first one "
                "means. Keep one clipping hook; limits by parameter go into its policy."
            )
        engine = engine_of(arg.accelerator, arg.model)
        if engine is not None:
            arg.clip_result = self._result = self._observe(engine, arg)
            return
        scaler = None if arg.accelerator is None else arg.accelerator.scaler
        step = self._bound(arg, arg.optimizer)
        self._note(step.clipper)
        self._result, self._open = step.clip(scaler), True
        arg.clip_result = self._result

    def _bound(self, arg: PipelineHookArgs, optimizer: "torch.optim.Optimizer") -> OwnedStep:
        """Return the steps of an optimizer; another optimizer's clipper hands on its history."""
        if self._step is not None and optimizer is self._step.optimizer:
            return self._step
        if self.clipper is not None:
            self.clipper.close()
        source = OptimizerParameters(behind_accelerate(optimizer), module=arg.model)
        label = "GradientClippingHook"
        step = OwnedStep(
            optimizer,
            source,
            self._policy,
            self._cfg.options(arg.accelerator),
            owner=self,
            label=label,
            claims=False,  # the hooks of two trainers may share it, one after the other
        )
        state = self._state if self.clipper is None else self.clipper.state_dict()
        if state is None and self._first:
            state = {**step.clipper.state_dict(), "step": self._first}
        if state is not None:
            step.clipper.load_state_dict(state)
        self._step = step
        return step

    def _note(self, noting: GradientClipper | EngineWatch) -> None:
        while self._losses:
            noting.note(loss=self._losses.pop())

    def _watching(self, engine: Any) -> EngineWatch:
        if self._watch is None or self._watch.engine is not engine:
            self._watch = EngineWatch(engine, self._policy, **self._cfg.options(None))
        return self._watch

    def _observe(self, engine: Any, arg: PipelineHookArgs) -> ClipResult | None:
        watch = self._watching(engine)
        self._note(watch)
        result = watch.observe()
        if result is None and arg.accelerator is not None:
            raise ArgumentValueError(
                "an accumulation window ended and DeepSpeed's engine made no step, so nothing was "
                "clipped: run the backward pass with accelerator.backward(loss), inside on_step"
            )
        return result


def _check_policy(policy: PoliciesLike, tolerated: int) -> None:
    """Raise what a clipper would raise, which is made at the first step."""
    policies, _ = as_policies(policy)
    check_skips(policies.values(), tolerated)


class GradientClippingHookConfig(PipelineHooksConfig[GradientClippingHook]):
    """What gradients are clipped to: ``clip_mode`` and its limit, or a ``policy``."""

    class_type: ClassType[GradientClippingHook] = GradientClippingHook
    clip_mode: Literal["norm", "value"] | None = None
    """``"norm"`` scales all gradients together to ``max_norm``; ``"value"`` clamps each element to
    ``clip_value``. Left out with ``policy``; ``max_norm`` alone means ``"norm"``."""
    clip_value: Ceiling | None = None
    """The largest modulus of an element, >= 0; used by ``"value"`` alone."""
    max_norm: Ceiling | None = None
    """The largest norm of all gradients together, >= 0; used by ``"norm"`` alone."""
    norm_type: NormOrder = 2.0
    """p of the p-norm, > 0, or infinity; used by ``"norm"`` alone."""
    policy: PolicyField | None = None
    """What ``GradientClipper`` takes: a number (``max_norm``), a policy, a mapping of name patterns
    to these, or a list of these, one for each ``param_group`` of the optimizer. None (in a file
    ``"none"``) leaves parameters alone."""
    nonfinite: Literal["skip", "raise", "propagate"] = "skip"
    """What to do about a NaN or an infinity in the gradients."""
    max_consecutive_skips: int = Field(default=25, ge=0)
    """Skipped steps in a row that are tolerated."""

    partitioned: GroupsByPattern | None = None
    """Process groups by name pattern, as ``GradientClipper`` takes them; a string is the name of a
    dimension of the accelerator's mesh: ``{"experts.*": "ep"}``. A file can have names only."""
    duplicated: GroupsByPattern | None = None
    """Likewise."""
    backend: Literal["auto", "foreach", "triton", "reference"] = "auto"
    """Which kernels are used."""
    record: str | None = None
    """A folder that every step is written to, with the mean loss of its window."""

    def options(self, accelerator: "Accelerator | None") -> ClipOptions:
        """Return the keywords for ``GradientClipper``.

        Args:
            accelerator: Has the mesh whose dimensions are named.

        Raises:
            ArgumentValueError: GC010, a name that is no dimension of its mesh.
        """
        return ClipOptions(
            nonfinite=self.nonfinite,
            max_consecutive_skips=self.max_consecutive_skips,
            partitioned=resolve_groups("partitioned", self.partitioned, accelerator),
            duplicated=resolve_groups("duplicated", self.duplicated, accelerator),
            backend=self.backend,
            record=self.record,
        )

    @model_validator(mode="before")
    @classmethod
    def _max_norm_alone(cls, data: Any) -> Any:
        """Read ``max_norm`` alone as on every way in: clip by norm."""
        if not isinstance(data, Mapping):
            return data
        given = {name for name, value in data.items() if value is not None}
        if "max_norm" in given and not given & {"clip_mode", "policy", "clip_value"}:
            return {**data, "clip_mode": "norm"}
        return data

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.policy is not None:
            given = {"clip_mode", "clip_value", "max_norm", "norm_type"} & self.model_fields_set
            others = sorted(name for name in given if getattr(self, name) != _default(name))
            if others:
                raise ValueError(
                    f"policy says how to clip, and so does {', '.join(others)}: give one of them. "
                    "A policy such as NormClip has max_norm and norm_type of its own."
                )
            _check_policy(self.policy, self.max_consecutive_skips)
        elif self.clip_mode is None:
            raise ValueError(
                'nothing says how to clip: set clip_mode="norm" with max_norm, clip_mode="value" '
                "with clip_value, or policy"
            )
        elif self.clip_mode == "norm" and self.max_norm is None:
            raise ValueError(
                'max_norm must be specified when clip_mode is "norm": nothing else would bound the '
                "gradients"
            )
        elif self.clip_mode == "value" and self.clip_value is None:
            raise ValueError(
                'clip_value must be specified when clip_mode is "value": nothing else would bound '
                "the gradients"
            )
        return self

    def with_policy(self, policy: PoliciesLike) -> Self:
        """Return a copy that clips by another policy, in the fields that this one has."""
        if self.clip_mode is not None:
            one: Any = as_given(*as_policies(policy))
            fields = {"max_norm", "norm_type", "clip_value", "clip_mode"}
            plain = isinstance(one, NormClip | ValueClip) and one.model_fields_set <= fields
            if plain and isinstance(getattr(one, "max_norm", 0.0), float):
                return self.replace(
                    **{f: getattr(one, f) for f in type(one).model_fields if f in fields}
                )
        others = dict.fromkeys(("clip_mode", "clip_value", "max_norm"))
        return self.replace(policy=policy, norm_type=2.0, **others)

    def as_policy(self) -> "PolicyOrNumber | PolicyByPattern | PolicyByGroup":
        """Return what the hook gives to ``GradientClipper``."""
        if self.policy is not None:
            return self.policy
        if self.clip_mode == "value":
            assert self.clip_value is not None
            return ValueClip(clip_value=self.clip_value)
        assert self.max_norm is not None
        return NormClip(max_norm=self.max_norm, norm_type=self.norm_type)


def _default(name: str) -> object:
    return GradientClippingHookConfig.model_fields[name].default
