"""Clips inside ``optimizer.step()``: one line for any torch optimizer, with a scaler or without."""

import sys
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias, Unpack

import torch
from torch import Tensor

from gradclip.clipping import ClipResult, GradientClipper, flags
from gradclip.clipping.arguments import ClipOptions
from gradclip.clipping.collect.sources import OptimizerParameters
from gradclip.clipping.kernels.device import copy_to_host
from gradclip.clipping.step.ownership import unwrapped
from gradclip.clipping.step.withhold import lend
from gradclip.errors import ArgumentTypeError, DoubleClippingError
from gradclip.integrations.loss_scaling import SCALE_FLOOR
from gradclip.integrations.owned_step import OwnedStep
from gradclip.record.ring import Ring
from gradclip.record.stats import Stats

if TYPE_CHECKING:
    from gradclip.clipping.clipper import PoliciesLike

__all__ = ["Attachment", "attach"]

_Hook: TypeAlias = Any
_LABEL = "gradclip.attach"


def attach(
    optimizer: torch.optim.Optimizer,
    policy: "PoliciesLike | None" = None,
    **options: Unpack[ClipOptions],
) -> "Attachment":
    """Clip the gradients of an optimizer before each of its steps, from now on.

    Works for plain, foreach, fused and capturable optimizers, with and without ``GradScaler``, and
    behind Accelerate's and Fabric's wrappers. Parameter groups that are added later are clipped
    too. A step whose gradients hold a NaN or an infinity is not made: weights, moments and step
    counts stay as they are.

    Under a ``GradScaler`` a fused optimizer still holds scaled gradients: the norm is that of
    unscaled ones, and where all gradients have one coefficient it is folded into the scale that
    the optimizer divides by, so that no second pass is made.

    Args:
        optimizer: A torch optimizer whose step needs no closure, or a wrapper of one.
        policy: As ``GradientClipper`` takes it. Patterns need names: make the optimizer of
            ``model.named_parameters()``.
        options: The keywords of ``GradientClipper``. Overflows of an active ``GradScaler`` do not
            count towards ``max_consecutive_skips`` until its scale is down to 1.

    Returns:
        What was attached: ``last`` is the result of the last step, ``remove()`` takes it off. As a
        context manager it is removed where the context ends.

    Raises:
        ArgumentTypeError: GC011, something that is no torch optimizer, or needs a closure.
        ArgumentValueError: GC010, an optimizer that steps inside the backward pass.
        DoubleClippingError: GC101, something clips its gradients already.

    Note:
        ``copy.deepcopy(optimizer)`` copies no hooks, so a copy clips nothing: attach it anew.

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


class Attachment:
    """A clipper that is called before each step of an optimizer; made by ``attach``.

    Attributes:
        optimizer: The torch optimizer.
        clipper: What clips; its ``state_dict`` is the history to save.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        policy: "PoliciesLike | None",
        options: ClipOptions,
    ) -> None:
        self.optimizer = optimizer
        source = OptimizerParameters(optimizer)
        self._step = OwnedStep(optimizer, source, policy, options, owner=self, label=_LABEL)
        self._lent_scale = ExitStack()
        self._under_way: FrameType | None = None
        self._given: tuple[Any, Any] = None, None
        self._lent: Tensor | None = None
        self._at_floor = False
        self._scales: Ring[None] = Ring()
        self._hooks: list[_Hook] = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    @property
    def clipper(self) -> GradientClipper:
        """What clips; its ``state_dict`` is the history to save."""
        return self._step.clipper

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
        self._end()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._step.release()

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
        state = "attached to" if self._hooks else "removed from"
        return f"<Attachment {state} {type(self.optimizer).__name__}, last {self.last}>"

    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = sys._getframe(1)  # noqa: SLF001 - nothing else tells one step from another
        if self._under_way is not None:
            if _is_within(step, self._under_way):
                return  # step() calls that of its base class, whose hooks are the same
            self._end()  # the last step raised
        _check_call(args, kwargs)
        scale, found_inf = _attributes(optimizer)
        self._see_floor(scale)
        # A scaler that found an infinity answers for it.
        expected = found_inf is not None and not self._at_floor
        try:
            result = self._step.clip_scaled(scale, overflow_expected=expected)
        except BaseException:
            _forget_scaler(optimizer)
            raise
        self._under_way, self._given = step, (scale, found_inf)
        self._step.withhold(under_way=True)
        if scale is not None and result.deferred:
            self._lent = _divided(scale, result)
            self._lent_scale.enter_context(lend(optimizer, "grad_scale", self._lent))

    def _after(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        if sys._getframe(1) is self._under_way:  # noqa: SLF001
            self._under_way = self._lent = None
            self._give_back()

    def _give_back(self) -> None:
        self._lent_scale.close()
        self._step.settle()

    def _end(self) -> None:
        """End a step that raised: ``GradScaler`` leaves what it gave to the optimizer then."""
        if self._under_way is None:
            return
        self._give_back()
        (old_scale, old_found), during, optimizer = self._given, self._lent, self.optimizer
        self._under_way = self._lent = None
        scale, found_inf = _attributes(optimizer)
        if old_found is None:
            return  # there was no scaler
        if found_inf is old_found:
            _forget_scaler(optimizer)
        elif scale is old_scale:
            optimizer.grad_scale = None  # type: ignore[attr-defined]  # the next was unscaled
        elif scale is not None:
            # The next scale was multiplied with what was there.
            left = old_scale if during is None else during
            optimizer.grad_scale = scale if left is None else scale / left  # type: ignore[attr-defined]

    def _see_floor(self, scale: Tensor | None) -> None:
        """Note whether the scale can still fall: on an accelerator some steps late."""
        if scale is None:
            return
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
        ArgumentTypeError: GC011, there is none, or its step needs a closure.
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
    if isinstance(inner, torch.optim.LBFGS):
        raise ArgumentTypeError(
            "LBFGS computes gradients inside step(closure), after an attachment has clipped: call "
            "GradientClipper.clip() at the end of the closure instead"
        )
    return inner


def _check_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what computes gradients, or scales, after the hook; the first argument is itself.

    Raises:
        ArgumentTypeError: GC011.
    """
    name = type(args[0]).__name__
    if (args[1] if len(args) > 1 else kwargs.get("closure")) is not None:
        raise ArgumentTypeError(
            f"{name}.step was given a closure, which computes gradients after an attachment has "
            "clipped. Call backward() and then step(), or clip at the end of the closure with "
            "GradientClipper.clip(). Lightning's Trainer gives one itself: use "
            "gradclip.integrations.lightning.GradientClippingCallback. No gradient was changed."
        )
    if kwargs.get("grad_scaler") is not None:
        raise ArgumentTypeError(
            f"{name}.step takes the GradScaler itself (torch's contract before grad_scale), so an "
            "attachment does not know what its gradients are multiplied by. Call "
            "scaler.unscale_(optimizer) and GradientClipper.clip() before the step. No gradient "
            "was changed."
        )


def _attributes(optimizer: Any) -> tuple[Any, Any]:
    """Return what a scaler gave to a fused optimizer: its scale, and whether it found infinities.

    Raises:
        ArgumentTypeError: GC011, for a scale that is no tensor.
    """
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None and not isinstance(scale, Tensor):
        raise ArgumentTypeError(
            f"optimizer.grad_scale is {scale!r}: expected a float32 tensor, as GradScaler sets it"
        )
    return scale, getattr(optimizer, "found_inf", None)


def _forget_scaler(optimizer: Any) -> None:
    """Do what ``GradScaler`` does after a step that did not raise."""
    for name in ("grad_scale", "found_inf"):
        if hasattr(optimizer, name):
            delattr(optimizer, name)


def _is_within(frame: FrameType | None, outer: FrameType) -> bool:
    """Return whether a frame was called, however deep, from another one that still runs."""
    while frame is not None:
        if frame is outer:
            return True
        frame = frame.f_back
    return False
