"""Clip by value: each element gets a floor and a ceiling, and the direction may change."""

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
from gradclip.config import Ceiling


class ValueClip(Policy):
    """Clamp each element to [-clip_value, clip_value], infinities included.

    An accelerator clamps as it measures: an error that comes after that leaves gradients clamped.

    >>> ValueClip(clip_value=0.5)
    ValueClip(clip_mode='value', clip_value=0.5)
    """

    clip_mode: Literal["value"] = "value"
    clip_value: Ceiling = Field(description="nothing would bound the elements")
    """Largest modulus of an element, in the units of the gradients; >= 0."""

    @property
    def element_limit(self) -> float:
        """``clip_value``."""
        return self.clip_value

    @property
    def writes(self) -> bool:
        """Whether there is a limit at all."""
        return self.clip_value < inf

    def fixed(self) -> FixedLimit:
        """Return no limit of the norm: elements are clamped to ``element_limit``."""
        return FixedLimit(inf, inf)

    def decide(self, seen: Measurement, state: PolicyState) -> Decision:  # noqa: ARG002 - no norm decides
        """Scale nothing: elements are clamped to ``element_limit``, whatever the norm is."""
        return Decision(inf, inf)
