"""Mistakes of a loop that its norms give away: each is said once."""

import gc
from collections import deque
from collections.abc import Iterator, Mapping
from math import inf, isfinite, isnan
from typing import Any

import torch

from gradclip.clipping.policies import Policy
from gradclip.errors import warn
from gradclip.record.ring import FIRST, StepNumbers

_TOUCHES = 1e-3
"""A norm as near to the limit as this was brought there."""
_AT_LEAST = 5
"""Norms that have to be so near: a few are chance, where a limit is near the largest norm."""
_FAR = 100.0
"""A norm so many times the limit may still be multiplied by a loss scale."""

_LONG, _OFTEN = 100, 95
"""More clipped steps of so many: the limit is no longer one of exceptions."""


class LoopWatch:
    """Looks at the norms of steps before clipping: a reader of a ``StepRing``.

    Something clips first: no norm is ever beyond the limit, and some are just at it. A loop forgot
    to unscale: the first norms are all far beyond the limit, and there is a ``GradScaler`` that
    has a scale and has unscaled nothing. The limit is stuck below the norms: nearly all steps are
    clipped. What only measures lets a NaN through to the weights.

    Args:
        called: What clips, as its user knows it.
        owned: Whether it unscales by itself.
    """

    def __init__(self, called: str, *, owned: bool) -> None:
        self._called, self._owned = called, owned
        self._seen = self._touching = 0
        self._within = self._far = True
        self._limit = inf
        self._last: float | None = None
        self._clipped: deque[bool] | None = deque(maxlen=_LONG)
        self._times = 0
        self._often: tuple[int, float] | None = None
        self._suspects_other = self._suspects_scale = False
        self._let_through: StepNumbers | None = None
        self._warned_of_weights = False

    def add(self, numbers: StepNumbers) -> None:
        """Take the numbers of a step."""
        self._count(numbers)
        self._look_for_damage(numbers)
        if self._seen >= FIRST and not self._within:
            return  # nothing is left to find
        if self._last not in (None, numbers.threshold):
            self._within = False  # a limit that moves may follow the norms, and be just at one
        self._last = numbers.threshold
        if not (isfinite(numbers.norm) and 0 < numbers.threshold < inf):
            return
        ratio, self._limit = numbers.norm / numbers.threshold, numbers.threshold
        self._seen += 1
        self._far = self._far and ratio > _FAR
        self._touching += abs(ratio - 1) <= _TOUCHES
        if self._seen == FIRST and self._far:
            self._suspects_scale = not self._owned
        if self._within and ratio > 1 + _TOUCHES:
            self._within = False
        if self._within and self._seen >= FIRST and self._touching >= _AT_LEAST:
            self._within, self._suspects_other = False, True

    def _look_for_damage(self, numbers: StepNumbers) -> None:
        """Find a step that was made with a NaN, or an infinity that nothing clamped."""
        harmless = isfinite(numbers.norm) or numbers.skipped or numbers.expected
        if harmless or not self._owned or self._warned_of_weights:
            return
        if isnan(numbers.norm) or numbers.threshold == inf:
            self._let_through, self._warned_of_weights = numbers, True

    def _count(self, numbers: StepNumbers) -> None:
        """Find that nearly all of many steps were clipped, where one limit is for all."""
        if self._clipped is None or numbers.skipped or not 0 < numbers.threshold <= inf:
            return
        if len(self._clipped) == _LONG:
            self._times -= self._clipped[0]
        self._clipped.append(numbers.clipped)
        self._times += numbers.clipped
        if self._times > _OFTEN and len(self._clipped) == _LONG:
            self._clipped, self._often = None, (self._times, numbers.threshold)

    def speak(self, *, unscaled: bool) -> None:
        """Warn of what was found: in a call to clip, which comes where a scaler has unscaled.

        Args:
            unscaled: Whether that call was told the scale.
        """
        if self._suspects_other:
            self._suspects_other = False
            warn(
                f"{self._called} measured no norm above its limit {self._limit:g} in "
                f"{self._seen} steps, and {self._touching} that are just at it: something clips "
                "these gradients before it does. Remove that call from the loop: "
                "torch.nn.utils.clip_grad_norm_(...), or one that makes it, such as "
                "accelerator.clip_grad_norm_(...) or fabric.clip_gradients(...)."
            )
        if self._often is not None:
            (clipped, limit), self._often = self._often, None
            warn(
                f"{self._called} clipped {clipped} of {_LONG} steps in a row, at last to a norm of "
                f"{limit:g}: that is below the usual norm, so the limit sets the size of every "
                "update, as a learning rate does. Raise it, or filter this warning if it is meant. "
                "gradclip.ObserveClip() shows which norms are usual."
            )
        if self._let_through is not None:
            numbers, self._let_through = self._let_through, None
            warn(
                f"{self._called} measured a norm of {numbers.norm:g} at step {numbers.step}, and "
                "its policy only measures, so the optimizer made the step: the weights are "
                "probably NaN since then. gradclip.GuardClip() measures too, and does not make "
                "such a step."
            )
        if self._suspects_scale:
            self._suspects_scale = False
            scale = None if unscaled else next(_scales_not_removed(), None)
            if scale is not None:
                warn(
                    f"{self._called}: each of the first {FIRST} norms was more than {_FAR:g} times "
                    f"the limit {self._limit:g}, and a GradScaler with the scale {scale:g} has "
                    "unscaled nothing before this call: the gradients are still multiplied by it. "
                    "Call scaler.unscale_(optimizer) before clip(), or take "
                    "gradclip.attach(optimizer, ...), which needs no such call."
                )


def _scales_not_removed() -> Iterator[float]:
    """Yield the scale of each ``GradScaler`` in use that has unscaled no optimizer yet.

    A loop does not hand its scaler to a clipper, so it is looked for among all objects: once.
    """
    for found in gc.get_objects():
        if not issubclass(type(found), torch.amp.GradScaler) or not found.is_enabled():
            continue
        scaler: Any = found
        states = getattr(scaler, "_per_optimizer_states", {}).values()
        used = getattr(scaler, "_scale", None) is not None
        if used and not any(state["stage"].name == "UNSCALED" for state in states):
            yield scaler.get_scale()


def warn_of_zero(called: str, policies: Mapping[str, Policy | None]) -> None:
    """Warn of a limit of 0: elsewhere it means not to clip, here it sets gradients to zero."""
    for policy in filter(None, policies.values()):
        fixed = policy.fixed()
        limit = fixed.target if fixed is not None and policy.element_limit is None else None
        if 0 in {limit, policy.element_limit}:
            warn(
                f"{called}: a limit of 0 sets every gradient to zero, so nothing is trained "
                f"({policy!r}). To switch clipping off, as 0 does in other libraries, give "
                "max_norm=inf, which only measures, or None for a name pattern."
            )
            return
