"""From a decision to coefficients: ``where(n > threshold, target / n, 1)``, with room to round.

A coefficient is ``(target / n)(1 - guard)``. The guard is just wider than the rounding of the norm,
of the coefficient and of the scaled elements together, so that the norm afterwards does not exceed
the target, and clipping a second time changes nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import inf

import torch
from torch import Tensor

from gradclip.clipping import flags
from gradclip.clipping.flags import Flag, as_flag
from gradclip.clipping.kernels import Backends
from gradclip.clipping.policies import Decision

_SUBNORMAL = 2.0**-1000
_STEP = 2.0**-600


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
    """

    backends: Backends
    norms_S: Tensor
    decision: Decision
    bounded: Flag
    unwanted: Flag
    guard: float
    skipped_coefficient: float

    def __post_init__(self) -> None:
        self.number = self._number()
        """The one coefficient, where there is one and the host can see it for nothing."""

    def _number(self) -> float | None:
        """Compute it on the host: there a dozen operations on one number cost more than a clip."""
        if not isinstance(self.bounded, bool) or not isinstance(self.unwanted, bool):
            return None
        if not self.bounded or self.unwanted:
            return 0.0 if self.bounded else self.skipped_coefficient
        if not isinstance(self.decision.thresholds, Tensor) and self.decision.thresholds == inf:
            return 1.0
        if self.norms_S.numel() != 1 or flags.host_waits_for(self.norms_S.device):
            return None
        norm, target = float(self.norms_S), float(self.decision.targets)
        if not (norm > float(self.decision.thresholds) and norm > target):
            return 1.0
        return target / norm * (1 - self.guard)

    @cached_property
    def values_S(self) -> Tensor:
        """What each scope is multiplied by, float64 (S,)."""
        if self.number is not None:
            return torch.full_like(self.norms_S, self.number)
        device = self.norms_S.device
        found_S = self.backends.on(device).coefficients(
            self.norms_S,
            self.decision.thresholds,
            self.decision.targets,
            as_flag(self.bounded, device),
            self.guard,
            self.skipped_coefficient,
        )
        if self.unwanted is False:
            return found_S
        zeroed = as_flag(self.unwanted, device) & as_flag(self.bounded, device)
        return torch.where(zeroed, 0.0, found_S)

    @property
    def _is_quotient(self) -> bool:
        return bool(self.bounded) and not self.unwanted

    def factors(self) -> Iterator[float | Tensor]:
        """Yield what to multiply by, one after the other: nothing, one factor, or two.

        Two where float64 has no precise number for their product: a norm of 1e300 and a target of
        1e-20 have a subnormal quotient.
        """
        if self.number is None:
            yield self.values_S
        elif self._is_quotient and self.number < _SUBNORMAL and float(self.decision.targets) > 0:
            yield _STEP
            norm = float(self.norms_S) * _STEP
            yield float(self.decision.targets) / norm * (1 - self.guard)
        elif self.number != 1:
            yield self.number
