"""Clips inside ``optimizer.step()``: one line for any torch optimizer, with a scaler or without."""

import sys
from contextlib import ExitStack
from functools import partial
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import torch
from torch import Tensor

from gradclip.clipping import ClipResult
from gradclip.clipping.apply.coefficients import Response, host_waits_for
from gradclip.clipping.measure.group import Group
from gradclip.clipping.step.ownership import disowned, owned, unwrapped
from gradclip.clipping.step.withhold import lent, withhold_within
from gradclip.errors import ArgumentTypeError, DoubleClippingError
from gradclip.integrations.loss_scaling import SCALE_FLOOR
from gradclip.integrations.owned import OwnedClipper
from gradclip.record.ring import Lagged

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradclip.clipping.arguments import Nonfinite
    from gradclip.clipping.policies import PolicyLike
    from gradclip.clipping.ranks.dimension import GroupLike

__all__ = ["Attachment", "attach"]

_Hook: TypeAlias = Any
_SAID = "gradclip.attach"
_COARSE = 2.0**-80
"""A coefficient below this may not have a scale in float32."""


def attach(
    optimizer: torch.optim.Optimizer,
    policy: "PolicyLike | Mapping[str, PolicyLike | None]",
    *,
    nonfinite: "Nonfinite" = "skip",
    max_consecutive_skips: int = 25,
    partitioned: "Mapping[str, GroupLike] | None" = None,
    duplicated: "Mapping[str, GroupLike] | None" = None,
    backend: str = "auto",
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
        nonfinite: Likewise.
        max_consecutive_skips: Likewise; overflows of an active ``GradScaler`` do not count until
            its scale is down to 1.
        partitioned: Likewise.
        duplicated: Likewise.
        backend: Likewise.

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
    >>> handle = attach(optimizer, 1.0)
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> optimizer.step()
    >>> handle.last
    ClipResult(norm_pre=5, norm_post=1, threshold=1, coefficient=0.2, \
clipped=True, skipped=False, nonfinite=0)
    """
    inner = _checked(optimizer)
    make = partial(
        _Folding,
        inner,
        policy,
        owner=_SAID,
        nonfinite=nonfinite,
        max_consecutive_skips=max_consecutive_skips,
        partitioned=partitioned,
        duplicated=duplicated,
        backend=backend,
    )
    return Attachment(inner, make)


class Attachment:
    """A clipper that is called before each step of an optimizer; made by ``attach``.

    Attributes:
        optimizer: The torch optimizer.
        clipper: What clips; its ``state_dict`` is the history to save.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, make: Any) -> None:
        self.optimizer = optimizer
        self.clipper: _Folding = make()
        if self.clipper.writes:
            owned(optimizer, self, _SAID)
        self._step = ExitStack()
        self._under_way: FrameType | None = None
        self._given: tuple[Any, Any] = None, None
        self._lent: Tensor | None = None
        self._at_floor = False
        self._scales: Lagged[None] = Lagged()
        self._hooks: list[_Hook] = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

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
        disowned(self.optimizer, self)

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
            self._end()  # the last step raised, so nobody did
        _check_call(args, kwargs)
        scale, found_inf = _attributes(optimizer)
        self._see_floor(scale)
        # A scaler that found an infinity answers for it.
        expected = found_inf is not None and not self._at_floor
        try:
            self.clipper.fold = scale is not None
            result = self.clipper.clip(scale, overflow_expected=expected)
        except BaseException:
            _forget_scaler(optimizer)
            raise
        finally:
            self.clipper.fold = False
        self._under_way, self._given = step, (scale, found_inf)
        self._step.enter_context(withhold_within(optimizer, result.withheld))
        if scale is not None and self.clipper.folded is not None:
            self._lent = _divided(scale, self.clipper.folded, result)
            self._step.enter_context(lent(optimizer, "grad_scale", self._lent))

    def _after(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        if sys._getframe(1) is self._under_way:  # noqa: SLF001
            self._under_way = self._lent = None
            self._step.close()

    def _end(self) -> None:
        """End a step that raised: ``GradScaler`` leaves what it gave to the optimizer then."""
        if self._under_way is None:
            return
        self._step.close()
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
        if not host_waits_for(scale.device):
            self._at_floor = float(scale) <= SCALE_FLOOR
        elif (late := self._scales.push(scale, None)) is not None:
            self._at_floor = late[0][0] <= SCALE_FLOOR


class _Folding(OwnedClipper):
    """A clipper that can leave it to the optimizer to multiply by the one coefficient there is."""

    fold = False
    """Whether the optimizer divides by a scale, and so can."""
    folded: Response | None = None
    """What it has to multiply by in this step; None where that was done here."""

    def _scale(self, group: Group, response: Response) -> None:
        self.folded = None
        if self.fold and self._can_fold(group, response):
            self.folded = response
        else:
            super()._scale(group, response)

    def _can_fold(self, group: Group, response: Response) -> bool:
        """Return whether there is one coefficient, and a float32 scale is precise enough for it."""
        if self._by_pattern or group.policy.scope != "group":
            return False
        if group.policy.element_limit is not None:
            return False
        single = self._peers.precision(group.gradients)[0] is torch.float32
        return single and (response.number is None or not 0 < response.number < _COARSE)


def _divided(scale: Tensor, response: Response, result: ClipResult) -> Tensor:
    """Return the scale that makes the optimizer multiply by a coefficient as well: float32, 0-d.

    Where the step is withheld the coefficient is 0, and the scale stays.
    """
    if response.number is not None:
        return (scale / (1.0 if result.withheld else response.number)).to(torch.float32)
    coefficient = torch.where(result.skipped, 1.0, response.coefficients_S[0])
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
