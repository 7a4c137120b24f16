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
from gradclip.config import Ceiling, NormOrder


class NormClip(Policy):
    """Scale gradients so that their p-norm is at most ``max_norm``.

    References:
        Pascanu et al. 2013, arXiv:1211.5063, section 3.2.

    >>> NormClip(max_norm=1.0)
    NormClip(clip_mode='norm', max_norm=1.0, norm_type=2.0)
    """

    clip_mode: Literal["norm"] = "norm"
    max_norm: Ceiling = Field(description="nothing would bound the gradient norm")
    """Ceiling, in the units of the gradient norm; >= 0. Infinity measures and never writes."""
    norm_type: NormOrder = 2.0
    """p of the p-norm, > 0; ``inf`` for the largest modulus."""

    @property
    def order(self) -> float:
        """The p of the norm that is measured."""
        return self.norm_type

    @property
    def writes(self) -> bool:
        """Whether there is a ceiling at all."""
        return self.max_norm < inf

    def fixed(self) -> FixedLimit:
        """Return ``max_norm`` as threshold and target."""
        return FixedLimit(self.max_norm, self.max_norm)

    def decide(self, seen: Measurement, state: PolicyState) -> Decision:  # noqa: ARG002 - no history
        """Bring every norm above ``max_norm`` down to it."""
        return Decision(self.max_norm, self.max_norm)
