"""Clip by norm: all gradients together keep their direction, and their norm gets a ceiling."""

from math import inf
from typing import Literal

from pydantic import Field

from gradclip.clipping.policies.base import (
    Decision,
    FixedLimit,
    Measurement,
    Policy,
    PolicyState,
)
from gradclip.clipping.policies.schedule import NumberOrSchedule, Schedule
from gradclip.config import Ceiling, NormOrder


class NormClip(Policy):
    """Scale gradients so that their p-norm is at most ``max_norm``.

    References:
        Pascanu et al. 2013, arXiv:1211.5063, section 3.2.

    >>> NormClip(max_norm=1.0, skip_above=100.0)
    NormClip(clip_mode='norm', max_norm=1.0, norm_type=2.0, skip_above=100.0, scope='group')
    """

    clip_mode: Literal["norm"] = "norm"
    max_norm: NumberOrSchedule = Field(description="nothing would bound the gradient norm")
    """Ceiling, in the units of the gradient norm; >= 0. Infinity never scales, and without
    ``skip_above`` it only measures. A ``Schedule`` gives a ceiling for each step."""
    norm_type: NormOrder = 2.0
    """p of the p-norm, > 0; ``inf`` for the largest modulus."""
    scope: Literal["group", "tensor"] = "group"  # type: ignore[misc] # a field here
    """Whether all gradients together have a norm and a coefficient, or each tensor has its own."""
    skip_above: Ceiling | None = None
    """A second limit, of the norm of all gradients together (each pattern's, if there are several)
    also where ``scope`` is "tensor". Above it the step is not made."""

    @property
    def order(self) -> float:
        """The p of the norm that is measured."""
        return self.norm_type

    @property
    def writes(self) -> bool:
        """Whether there is a limit at all."""
        limit = self.max_norm
        smallest = limit.smallest if isinstance(limit, Schedule) else limit
        return min(smallest, self._skip_above) < inf

    @property
    def _skip_above(self) -> float:
        return inf if self.skip_above is None else self.skip_above

    def fixed(self) -> FixedLimit | None:
        """Return ``max_norm`` as threshold and target, and ``skip_above``; None for a schedule."""
        if isinstance(self.max_norm, Schedule):
            return None
        return FixedLimit(self.max_norm, self.max_norm, self._skip_above)

    def decide(self, seen: Measurement, state: PolicyState) -> Decision:  # noqa: ARG002 - no history
        """Bring every norm above ``max_norm`` down to it; skip the step above ``skip_above``."""
        limit = self.max_norm
        ceiling = limit.at(seen.step) if isinstance(limit, Schedule) else limit
        skip = False if self.skip_above is None else seen.total_norm > self.skip_above
        return Decision(ceiling, ceiling, skip=skip)
