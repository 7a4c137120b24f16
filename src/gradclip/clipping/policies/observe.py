"""Clip nothing: measure, to find a threshold or to watch a run."""

from math import inf
from typing import Literal

from gradclip.clipping.policies.base import (
    Decision,
    FixedLimit,
    Measurement,
    Policy,
    PolicyState,
    Scope,
)
from gradclip.config import NormOrder


class ObserveClip(Policy):
    """Measure the p-norm and never write, whatever is found.

    >>> ObserveClip()
    ObserveClip(clip_mode='observe', norm_type=2.0, scope='group')
    """

    clip_mode: Literal["observe"] = "observe"
    norm_type: NormOrder = 2.0
    """p of the p-norm, > 0; ``inf`` for the largest modulus."""
    scope: Scope = "group"  # type: ignore[misc] # a field here
    """What has a norm of its own: "group" is all gradients together."""

    @property
    def order(self) -> float:
        """The p of the norm that is measured."""
        return self.norm_type

    @property
    def writes(self) -> bool:
        """Never."""
        return False

    def fixed(self) -> FixedLimit:
        """Return no limit."""
        return FixedLimit(inf, inf)

    def decide(self, seen: Measurement, state: PolicyState) -> Decision:  # noqa: ARG002 - nothing to decide
        """Let every norm pass."""
        return Decision(inf, inf)
