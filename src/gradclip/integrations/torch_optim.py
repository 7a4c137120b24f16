"""Clips inside ``optimizer.step()``: one line for any torch optimizer, with a scaler or without."""

from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

import torch
from torch import Tensor

from gradclip.clipping import ClipResult, GradientClipper, flags
from gradclip.clipping.arguments import ClipOptions, HasPolicy
from gradclip.clipping.collect.sources import OptimizerParameters
from gradclip.clipping.flags import Flag
from gradclip.clipping.kernels.device import copy_to_host
from gradclip.clipping.step.held import gates_of, hooks_before, lend
from gradclip.clipping.step.wrappers import unwrapped
from gradclip.errors import ArgumentTypeError, DoubleClippingError, warn
from gradclip.integrations.loss_scaling import SCALE_FLOOR
from gradclip.integrations.owned_step import OwnedStep
from gradclip.record.ring import Ring
from gradclip.record.stats import Stats

if TYPE_CHECKING:
    from gradclip.clipping.policies import PoliciesLike

__all__ = ["Attachment", "attach", "attached"]

_LABEL = "gradclip.attach"


def attach(
    optimizer: torch.optim.Optimizer,
    policy: "PoliciesLike | None" = None,
    **options: Unpack[ClipOptions],
) -> "Attachment":
    """Clip the gradients of an optimizer before each of its steps, from now on.

    Works for plain, foreach, fused and capturable optimizers, for those of other libraries, with
    and without ``GradScaler``, and behind the wrappers of Accelerate, Fabric, Lightning and
    opacus. Parameter groups that are added later are clipped too. A step whose gradients hold a
    NaN or an infinity is not made: weights, moments, step counts, and whatever else the optimizer
    has, stay as they are.

    The optimizer gets a ``step`` of its own, which clips, and then steps or does not. A closure
    runs once, before clipping.

    Under a ``GradScaler`` a fused optimizer still holds scaled gradients: the norm is that of
    unscaled ones, and where all gradients have one coefficient it is folded into the scale that
    the optimizer divides by, so that no second pass is made.

    Args:
        optimizer: A torch optimizer, or a wrapper of one.
        policy: As ``GradientClipper`` takes it. Patterns need names: make the optimizer of
            ``model.named_parameters()``. A list has one entry for each ``param_group``, and needs
            no names; a group that is added later needs one too.
        options: The keywords of ``GradientClipper``. Overflows of an active ``GradScaler`` do not
            count towards ``max_consecutive_skips`` until its scale is down to 1.

    Returns:
        What was attached: ``last`` is the result of the last step, ``remove()`` takes it off. As a
        context manager it is removed where the context ends. ``attached`` finds one that was lost.

    Raises:
        ArgumentTypeError: GC011, something that is no torch optimizer, or whose step computes
            gradients several times (LBFGS), or comes in two halves (SAM).
        ArgumentValueError: GC010, an optimizer that steps inside the backward pass, or that steps
            parameters which are not in its ``param_groups``; in ``step``, a call that comes past
            the attachment, because ``optimizer.step`` was taken before.
        DoubleClippingError: GC101, something clips its gradients already.

    Note:
        A copy or a pickle of the optimizer clips nothing, and to make one warns: attach it anew.
        Step hooks of others run after clipping, and not for a step that is not made.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> handle = attach(optimizer, max_norm=1.0)
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> optimizer.step()
    >>> handle.last
    ClipResult(norm_pre=5, norm_post=1, threshold=1, coefficient=0.2, \
clipped=True, skipped=False, nonfinite=0)
    """
    return Attachment(_checked(optimizer), policy, options)


def attached(optimizer: torch.optim.Optimizer) -> "tuple[Attachment, ...]":
    """Return what is attached to an optimizer, oldest first: where a handle was lost.

    .. code-block:: python

        for handle in gradclip.attached(optimizer):
            handle.remove()

    Args:
        optimizer: A torch optimizer, or a wrapper of one.
    """
    return tuple(each for each in gates_of(optimizer) if isinstance(each, Attachment))


class Attachment(HasPolicy):
    """A clipper that is called before each step of an optimizer; made by ``attach``.

    Attributes:
        optimizer: The torch optimizer.
        clipper: What clips; its ``state_dict`` is the history to save.
    """

    label, lasts = _LABEL, True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        policy: "PoliciesLike | None",
        options: ClipOptions,
    ) -> None:
        self.optimizer = unwrapped(optimizer)
        _warn_of_hooks(self.optimizer)
        source = OptimizerParameters(self.optimizer)
        self._step = OwnedStep(optimizer, source, policy, options, owner=self, label=_LABEL)
        self._lent: ExitStack | None = None
        self._scaled = False
        self._at_floor = False
        self._scales: Ring[None] = Ring()
        self._removed = False
        self._step.hold(self)

    @property
    def clipper(self) -> GradientClipper:
        """What clips; its ``state_dict`` is the history to save."""
        return self._step.clipper

    @property
    def policy(self) -> Any:
        """What bounds the gradients; to be assigned, as ``GradientClipper.policy``."""
        return self.clipper.policy

    @policy.setter
    def policy(self, policy: "PoliciesLike") -> None:
        self.clipper.policy = policy

    @property
    def stats(self) -> Stats:
        """What all steps that were asked for came to; see ``GradientClipper.stats``."""
        return self.clipper.stats

    @property
    def last(self) -> ClipResult | None:
        """The result of the last step that was asked for; None before the first.

        A ``GradScaler`` that finds an overflow does not ask an optimizer that is not fused.
        """
        return self.clipper.last

    def remove(self) -> None:
        """Take it off: the optimizer is as it was before; twice is harmless."""
        self._removed = True
        self._step.release()

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle as one that was removed: a copy of the optimizer is not clipped."""
        return {**vars(self), "_lent": None, "_removed": True}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "removed from" if self._removed else "attached to"
        return f"<Attachment {state} {type(self.optimizer).__name__}, last {self.last}>"

    # What the held step of the optimizer calls; see ``clipping.step.held.Gate``.

    def before(self, optimizer: Any, kwargs: dict[str, Any]) -> Flag:
        """Clip, and return whether the step should not be made; its ``step`` calls this."""
        self._scaled = getattr(optimizer, "found_inf", None) is not None
        if kwargs:
            _check_call(optimizer, kwargs)
        scale = _scale(optimizer)
        if scale is not None:
            self._see_floor(scale)
        # A scaler that found an infinity answers for it.
        expected = self._scaled and not self._at_floor
        result = self._step.clip_scaled(scale, overflow_expected=expected)
        if scale is not None and result.deferred:
            self._lent = self._lent or ExitStack()
            self._lent.enter_context(lend(optimizer, "grad_scale", _divided(scale, result)))
        return self._step.skipped

    def after(self, error: BaseException | None) -> None:
        """Give back what was lent for the step; its ``step`` calls this."""
        if self._lent is not None:
            lent, self._lent = self._lent, None
            lent.close()
        if error is not None and self._scaled:
            # It would have done so, had nothing been raised: what it leaves counts twice.
            _forget_scaler(self.optimizer)

    def _see_floor(self, scale: Tensor) -> None:
        """Note whether the scale can still fall: on an accelerator some steps late."""
        if not flags.host_waits_for(scale.device):
            self._at_floor = float(scale) <= SCALE_FLOOR
        elif (late := self._scales.push(copy_to_host(scale), None)) is not None:
            self._at_floor = late[0][0] <= SCALE_FLOOR


def _divided(scale: Tensor, result: ClipResult) -> Tensor:
    """Return the scale that makes the optimizer multiply by a coefficient as well: float32, 0-d.

    The optimizer divides gradients by the scale s. With s / c in its place it divides by s and
    multiplies by c. Where the step is withheld the coefficient is 0, and the scale stays.
    """
    coefficients = result.coefficients
    number = None if isinstance(coefficients, Tensor) else coefficients.number
    if number is not None:
        return (scale / (1.0 if result.withheld else number)).to(torch.float32)
    coefficient = torch.where(result.skipped, 1.0, result.coefficients_S[0])
    return (scale / coefficient.to(scale.device)).to(torch.float32)


def _checked(optimizer: object) -> Any:
    """Return the torch optimizer whose steps can be hooked.

    Raises:
        ArgumentTypeError: GC011, there is none.
        DoubleClippingError: GC101, it is DeepSpeed's.
    """
    inner = unwrapped(optimizer)
    if "deepspeed" in type(optimizer).__module__ or "deepspeed" in type(inner).__module__:
        raise DoubleClippingError(
            "this optimizer is DeepSpeed's, which clips inside engine.step() (at 1.0 where "
            "gradient_clipping is not set). Tell it the limit before the engine is made: "
            "gradclip.integrations.deepspeed.lower(accelerator, policy). Nothing was attached."
        )
    if not isinstance(inner, torch.optim.Optimizer):
        raise ArgumentTypeError(
            f"optimizer is of type {type(optimizer).__qualname__}: expected a torch optimizer"
        )
    return optimizer


def _warn_of_hooks(optimizer: Any) -> None:
    """Warn of step hooks, its own and those of all optimizers, that see clipped gradients now."""
    hooks = hooks_before(optimizer)
    if hooks:
        names = ", ".join(getattr(hook, "__qualname__", repr(hook)) for hook in hooks)
        warn(
            f"{type(optimizer).__name__} has step hooks ({names}), which run after {_LABEL} has "
            "clipped: what they change in the gradients is not clipped, and they do not run for a "
            "step that is not made."
        )


def _check_call(optimizer: object, kwargs: dict[str, Any]) -> None:
    """Refuse what unscales gradients after they were clipped.

    Raises:
        ArgumentTypeError: GC011.
    """
    if kwargs.get("grad_scaler") is not None:
        raise ArgumentTypeError(
            f"{type(optimizer).__name__}.step takes the GradScaler itself (torch's contract before "
            "grad_scale), so an attachment does not know what its gradients are multiplied by. "
            "Call scaler.unscale_(optimizer) and GradientClipper.clip() before the step. No "
            "gradient was changed."
        )


def _scale(optimizer: Any) -> Tensor | None:
    """Return the scale that a scaler gave to a fused optimizer.

    Raises:
        ArgumentTypeError: GC011, for a scale that is no tensor.
    """
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None and not isinstance(scale, Tensor):
        raise ArgumentTypeError(
            f"optimizer.grad_scale is {scale!r}: expected a float32 tensor, as GradScaler sets it"
        )
    return scale


def _forget_scaler(optimizer: Any) -> None:
    """Do what ``GradScaler`` does after a step that did not raise."""
    for name in ("grad_scale", "found_inf"):
        if hasattr(optimizer, name):
            delattr(optimizer, name)
