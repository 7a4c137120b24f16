"""From a decision to coefficients: ``where(n > threshold, target / n, 1)``, with room to round.

A coefficient is ``(target / n)(1 - guard)``. The guard is just wider than the rounding of the norm,
of the coefficient and of the scaled elements together, so that the norm afterwards does not exceed
the target, and clipping a second time changes nothing.

With float64 gradients a norm may be beyond float64, or a coefficient below its normal numbers. Then
the quotient is formed from mantissas and exponents, and gradients are multiplied by it in steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import frexp, inf, ldexp

import torch
from torch import Tensor

from gradclip.clipping import flags
from gradclip.clipping.flags import Flag, as_flag
from gradclip.clipping.kernels import Backends
from gradclip.clipping.kernels.blocks import LARGEST
from gradclip.clipping.measure.norm import REDUCED
from gradclip.clipping.policies import Decision

_STEP = -1000
"""Smaller powers of two are applied in steps: a number below 2^-1022 has not all its digits."""

_COARSE = 2.0**-80
"""A coefficient below this may not have a loss scale in float32."""

_SMALLEST = 2.0**-1074
"""Reported of a smaller coefficient: 0 would say that gradients were set to zero."""

_BEYOND = 2.0 ** (1024 - REDUCED)
"""A reduced norm from here on is that of a norm beyond float64."""


def quotient(norm: float, threshold: float, target: float, guard: float) -> float:
    """Return what one norm is multiplied by, where float64 has a precise number for it.

    Args:
        norm: The norm.
        threshold: Above this it is scaled.
        target: What it gets.
        guard: Relative margin that keeps rounding from exceeding the target.
    """
    return target / norm * (1 - guard) if norm > threshold and norm > target else 1.0


@dataclass(eq=False)
class OneCoefficient:
    """A coefficient of one scope on the CPU that the host knows, as it knows the norm.

    Args:
        norm: The norm before.
        number: The coefficient.
    """

    norm: float
    number: float

    @property
    def values_S(self) -> Tensor:
        """What the scope is multiplied by, float64 (1,)."""
        return torch.full((1,), self.number, dtype=torch.float64, device="cpu")


@dataclass(eq=False)
class Coefficients:
    """What the scopes of a pattern are multiplied by.

    Args:
        backends: The choice of backend.
        norms_S: Norm of each scope, float64 (S,).
        decision: Thresholds and targets.
        bounded: Whether nothing forbids the step: no NaN, no infinity, no error on any rank.
        unwanted: Whether a policy asks to skip the step; all scopes are zeroed then.
        guard: Relative margin that keeps rounding from exceeding a target.
        skipped_coefficient: The coefficient where ``bounded`` is false: 0 to set zeros, 1 to
            change nothing.
        reduced: Gives the norms times 2^-1100, where one may be beyond float64, or its coefficient
            below float64's normal numbers; None where neither can be.
    """

    backends: Backends
    norms_S: Tensor
    decision: Decision
    bounded: Flag
    unwanted: Flag
    guard: float
    skipped_coefficient: float
    reduced: Callable[[], Tensor] | None = None

    def __post_init__(self) -> None:
        self.left_S: Tensor | None = None
        """The norms afterwards, (S,), where products of norms and coefficients do not tell them."""
        self._steps: list[float] = []
        self.number = self._number()
        """The one coefficient, where there is one and the host can see it for nothing."""

    def _number(self) -> float | None:
        """Compute it on the host: there a dozen operations on one number cost more than a clip."""
        number = self._fixed()
        if number is None and self.norms_S.numel() == 1 and not self._waits:
            number = self._quotient()
        elif number is not None and number != 1:
            self._steps = [number]
        return number

    def _fixed(self) -> float | None:
        """Return the coefficient that is the same whatever the norms are, if it is."""
        if not isinstance(self.bounded, bool) or not isinstance(self.unwanted, bool):
            return None
        if not self.bounded or self.unwanted:
            return 0.0 if self.bounded else self.skipped_coefficient
        if not isinstance(self.decision.thresholds, Tensor) and self.decision.thresholds == inf:
            return 1.0
        return None

    @property
    def may_be_deferred(self) -> bool:
        """Whether a loss scale in float32 can have the one coefficient in it."""
        return self.number is None or not 0 < self.number < _COARSE

    @property
    def _waits(self) -> bool:
        return (
            not isinstance(self.bounded, bool)
            or not isinstance(self.unwanted, bool)
            or flags.host_waits_for(self.norms_S.device)
        )

    def _quotient(self) -> float:
        """Return the one coefficient of one norm, and keep the steps that multiply by it."""
        norm, room = float(self.norms_S), 1 - self.guard
        threshold, target = float(self.decision.thresholds), float(self.decision.targets)
        beyond = norm >= LARGEST and self.reduced is not None and threshold < inf
        number = quotient(norm, threshold, target, self.guard)
        if number == 1 and not beyond:
            return 1.0
        if target == 0 or (number >= 2.0**_STEP and not beyond):
            self._steps = [number]
            return number
        mantissa, exponent = frexp(float(self.reduced()) if beyond and self.reduced else norm)
        top, top_exponent = frexp(target)
        exponent = top_exponent - exponent - (REDUCED if beyond else 0)
        mantissa = top / mantissa * room
        number = max(ldexp(mantissa, exponent), _SMALLEST)
        if number >= 1:  # just below the target
            return 1.0
        while exponent < _STEP:
            self._steps.append(2.0**_STEP)
            exponent -= _STEP
        self._steps.append(ldexp(mantissa, exponent))
        self.left_S = torch.full_like(self.norms_S, target * room)
        return number

    @cached_property
    def values_S(self) -> Tensor:
        """What each scope is multiplied by, float64 (S,)."""
        if self.number is not None:
            return torch.full_like(self.norms_S, self.number)
        first_S, *second_S = self._factors
        if not second_S:
            return first_S
        return torch.where(first_S == 0, 0.0, (first_S * second_S[0]).clamp(min=_SMALLEST))

    @cached_property
    def _factors(self) -> list[Tensor]:
        """What each scope is multiplied by, one after the other: float64 (S,) each."""
        device = self.norms_S.device
        bounded = as_flag(self.bounded, device)
        found_S = self.backends.on(device).coefficients(
            self.norms_S,
            self.decision.thresholds,
            self.decision.targets,
            bounded,
            self.guard,
            self.skipped_coefficient,
        )
        made = bounded
        if self.unwanted is not False:
            unwanted = as_flag(self.unwanted, device)
            found_S = torch.where(unwanted & bounded, 0.0, found_S)
            made = bounded & ~unwanted
        return [found_S] if self.reduced is None else self._exact(found_S, made)

    def _exact(self, found_S: Tensor, made: Tensor) -> list[Tensor]:
        """Return two factors of each scope where float64 has no precise number for one.

        Args:
            found_S: Coefficients as they are where float64 has one.
            made: Whether coefficients are quotients: 0-d bool.
        """
        assert self.reduced is not None
        norms_S, targets = self.norms_S, self.decision.targets
        if not flags.host_waits_for(norms_S.device) and not (
            bool((found_S < 2.0**_STEP).any()) or bool((norms_S >= LARGEST).any())
        ):
            return [found_S]
        reduced_S = self.reduced()
        if not isinstance(targets, Tensor):
            targets = torch.full_like(norms_S, targets)
        beyond_S = (reduced_S >= _BEYOND) & (reduced_S < inf) & (self.decision.thresholds < inf)
        special_S = (beyond_S | (found_S < 2.0**_STEP)) & (targets > 0) & made
        tops_S, exponents_S = torch.frexp(targets)
        mantissas_S, of_norms_S = torch.frexp(torch.where(beyond_S, reduced_S, norms_S))
        exponents_S = exponents_S - of_norms_S - torch.where(beyond_S, REDUCED, 0)
        first_S = exponents_S.clamp(min=_STEP, max=0)
        second_S = tops_S / mantissas_S * (1 - self.guard) * _power(exponents_S - first_S)
        self.left_S = torch.where(special_S, targets * (1 - self.guard), norms_S * found_S)
        return [
            torch.where(special_S, _power(first_S), found_S),
            torch.where(special_S, second_S, 1.0),
        ]

    @property
    def may_be_zero(self) -> bool:
        """Whether a coefficient may be 0, as far as the host knows."""
        targets = self.decision.targets
        scales_to_zero = isinstance(targets, Tensor) or targets == 0
        return scales_to_zero or self.skipped_coefficient == 0 or self.unwanted is not False

    def factors(self) -> Iterator[float | Tensor]:
        """Yield what to multiply by, one after the other: nothing, or one factor, or several."""
        if self.number is None:
            yield from self._factors
        else:
            yield from self._steps


def _power(exponents: Tensor) -> Tensor:
    """Return powers of two, float64, with every digit: from the bits that they have."""
    bits = (exponents.to(torch.int64).clamp(-1022, 1023) + 1023) << 52
    return bits.view(torch.float64)
