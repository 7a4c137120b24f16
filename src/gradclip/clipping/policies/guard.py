"""Clip nothing, and let no NaN through: for parameters that need no limit of their own."""

from math import inf
from typing import Literal

from gradclip.clipping.policies.base import (
    Decision,
    FixedLimit,
    Measurement,
    Policy,
    PolicyState,
)


class GuardClip(Policy):
    """Leave gradients as they are, but keep a NaN or an infinity among them from a step.

    In a mapping of name patterns None does not look at its parameters at all: a NaN among them
    reaches the weights.

    >>> GuardClip()
    GuardClip(clip_mode='guard')
    """

    clip_mode: Literal["guard"] = "guard"

    def fixed(self) -> FixedLimit:
        """Return no limit."""
        return FixedLimit(inf, inf)

    def decide(self, seen: Measurement, state: PolicyState) -> Decision:  # noqa: ARG002 - nothing to decide
        """Let every norm pass."""
        return Decision(inf, inf)
