"""One optimizer step that is clipped: unscale, clip, withhold, settle; once, for every way in."""

from collections.abc import Callable
from contextlib import ExitStack
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from gradclip.clipping import ClipResult, GradientClipper
from gradclip.clipping.arguments import ClipOptions, read_options
from gradclip.clipping.collect.sources import ParameterSource
from gradclip.clipping.flags import Flag, negated
from gradclip.clipping.kernels import choose
from gradclip.clipping.policies import any_writes, as_policies
from gradclip.clipping.step.held import Gate, held
from gradclip.clipping.step.ownership import Owner, check_unclaimed, claim, release
from gradclip.clipping.step.wrappers import check_steps_once, unwrapped
from gradclip.errors import DoubleClippingError
from gradclip.integrations.loss_scaling import OverflowWatch, Unscaling

__all__ = ["OwnedStep", "Verdict", "checked_options"]


def checked_options(called: str, policy: Any, options: ClipOptions) -> tuple[Any, ClipOptions]:
    """Check arguments before there is an optimizer; return a policy, and the other keywords.

    Raises:
        ArgumentTypeError: GC011, for an argument of the wrong kind.
        ArgumentValueError: GC010, for one out of range.
    """
    policy, checked = read_options(called, policy, options)
    as_policies(policy)
    choose(checked.backend)
    kept: Any = {key: value for key, value in options.items() if key != "max_norm"}
    return policy, kept


class OwnedStep:
    """The steps of one optimizer, whose gradients are clipped before each of them.

    Args:
        optimizer: A torch optimizer, or a wrapper of one.
        source: Its parameters.
        policy: As ``GradientClipper`` takes it.
        options: The keywords of ``GradientClipper``.
        owner: What clips; it is not kept alive.
        label: What an error calls it.
        claims: Whether the owner keeps the optimizer until ``release``. One that shares it over
            time, as the hooks of two trainers do, only looks for the claims of others.
        admits: Refuses a policy that is assigned during the run, where a framework cannot have it.

    Raises:
        ArgumentTypeError: GC011, its step computes gradients itself, or comes in two halves.
        ArgumentValueError: GC010, it steps parameters that it does not show.
        DoubleClippingError: GC101, something else clips its gradients already.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        source: ParameterSource,
        policy: Any,
        options: ClipOptions,
        *,
        owner: object,
        label: str,
        claims: bool = True,
        admits: Callable[[object], None] | None = None,
    ) -> None:
        check_steps_once(unwrapped(optimizer), label)
        self.optimizer = optimizer
        self._role = Owner(label, self._admit)
        self._admits = admits
        self.clipper = GradientClipper.with_role(self._role, source, policy, options, called=label)
        self.skipped: Flag = False
        """Whether the step after the last ``clip`` should not be made."""
        self._owner, self.label = owner, label
        self._claims = claims
        if claims and self.clipper.writes:
            claim(optimizer, owner, label)
        self._overflows, self._unscale = OverflowWatch(), Unscaling()
        self._clipped: list[tuple[Tensor, TensorWeakRef]] = []
        self._scaled = self._released = False
        self._kept = ExitStack()
        self._taken: ExitStack | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle as one that let the optimizer go: it holds no step of the copy."""
        gone: dict[str, Any] = {
            "_kept": ExitStack(),
            "_taken": None,
            "_clipped": [],
            "_released": True,
            "_admits": None,
        }
        return {**vars(self), **gone}

    def clip(self, scaler: Any = None, *, unscale: bool = True) -> ClipResult:
        """Unscale the gradients, unless the loop did, and clip them.

        Args:
            scaler: A ``GradScaler``, or None.
            unscale: Whether to unscale; otherwise the caller has done so.
        """
        self._begin()
        if unscale:
            self._unscale(scaler, self.optimizer)
        self._scaled = scaler is not None
        result = self.clipper.clip(overflow_expected=self._overflows.expects(scaler))
        self.skipped = result.withheld
        self._clipped = [] if self.skipped is False else _some_gradients(self.optimizer)
        return result

    def clip_scaled(self, grad_scale: Tensor | None, *, overflow_expected: bool) -> ClipResult:
        """Clip gradients that the optimizer divides by a scale, and may multiply by a coefficient.

        Args:
            grad_scale: The scale; None where there is none.
            overflow_expected: A loss scaler answers for an overflow at this step.
        """
        self._begin()
        result = self.clipper.clip(
            grad_scale, overflow_expected=overflow_expected, defer_scaling=grad_scale is not None
        )
        self.skipped = result.withheld
        return result

    def hold(self, gate: Gate) -> None:
        """Ask a gate before each step of the optimizer, until ``release``."""
        try:
            self._kept.enter_context(held(self.optimizer, gate))
        except BaseException:
            self.release()
            raise

    def withhold(self) -> None:
        """Keep the optimizer from stepping until ``settle``, if the step was skipped."""
        if self.skipped is not False:
            self._taken = self._taken or ExitStack()
            self._taken.enter_context(held(self.optimizer, Verdict(self)))

    def verdict(self) -> Flag:
        """Return whether the step should not be made, if its gradients are still those clipped."""
        known = self._clipped
        return self.skipped if not known or any(g() is p.grad for p, g in known) else False

    def settle(self, made: Flag | None = None) -> None:
        """End the step: give back what withholding it took.

        Args:
            made: Whether the step was made, for the loss scaler; None where it is not known.
        """
        if self._taken is not None:
            self._give_back()
        if made is not None and self._scaled:
            self._overflows.settle(negated(made))

    def release(self) -> None:
        """Let the optimizer go; twice is harmless. The clipper stays, with its history."""
        self._released = self._role.released = True
        self._give_back()
        self._kept.close()
        release(self.optimizer, self._owner)

    def _give_back(self) -> None:
        taken, self._taken = self._taken, None
        if taken is not None:
            taken.close()

    def _admit(self, policy: object) -> None:
        """Refuse a policy where it cannot be followed; one that writes claims the optimizer.

        Raises:
            DoubleClippingError: GC101.
        """
        if self._released:
            raise self._gone()
        if self._admits is not None:
            self._admits(policy)
        if self._claims and any_writes(as_policies(policy)[0]):
            claim(self.optimizer, self._owner, self.label)

    def _gone(self) -> DoubleClippingError:
        return DoubleClippingError(
            f"this {self.label} was removed, or another one took its place, so it clips "
            "nothing any more: make a new one. No gradient was changed."
        )

    def _begin(self) -> None:
        if self._released:
            raise self._gone()
        if self._taken is not None:  # the last step may have raised
            self._give_back()
        if not self._claims and self.clipper.writes:
            check_unclaimed(self.optimizer, self._owner, self.label)


def _some_gradients(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, TensorWeakRef]]:
    """Return some parameters that have a gradient, with it; it is not kept alive."""
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    found = (p for p in parameters if p.grad is not None)
    return [(p, TensorWeakRef(p.grad)) for p in islice(found, 4)]


class Verdict:
    """Withholds the one step that follows a ``clip``, where that found that it has to be.

    A loop that was broken off may step on other gradients: the verdict is not of these.

    Args:
        step: What clips.
        lasts: Whether it stays for more than one step.
    """

    def __init__(self, step: OwnedStep, *, lasts: bool = False) -> None:
        self.label, self.lasts = step.label, lasts
        self.is_open = True
        """Whether no step followed yet."""
        self._step = step

    def before(self, optimizer: Any, kwargs: dict[str, Any]) -> Flag:  # noqa: ARG002
        """Return whether the step should not be made."""
        was_open, self.is_open = self.is_open, False
        return self._step.verdict() if was_open else False

    def after(self, error: BaseException | None) -> None:
        """Nothing was lent."""
