"""Clip each unit by the norm of its weights: adaptive gradient clipping."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from gradclip.clipping.policies.base import Decision, Measurement, Policy, PolicyState

_LEAST = 1e-6
"""A gradient is divided by no smaller norm than this, as in the authors' code."""


class AGCClip(Policy):
    """Scale the gradient of each unit to at most ``clip_factor`` times the norm of its weights.

    A unit is what one output is computed from: a row of a linear layer or of an embedding, a
    filter of a convolution. A vector, such as a bias or the scale of a norm, is one unit.

    References:
        Brock et al. 2021, arXiv:2102.06171, equation 3; deepmind-research, nfnets/agc_optax.py.

    >>> AGCClip(units={"experts.*": 2})
    AGCClip(clip_mode='agc', clip_factor=0.01, eps=0.001, units={'experts.*': 2})
    """

    scope: ClassVar[Literal["unit"]] = "unit"
    needs_weight_norms: ClassVar[bool] = True
    clip_mode: Literal["agc"] = "agc"
    clip_factor: float = Field(default=0.01, gt=0)
    """What the norm of a gradient may be, as a part of the norm of its weights; > 0."""
    eps: float = Field(default=1e-3, gt=0)
    """The least norm that weights count with, so that those that begin at 0 can grow; > 0."""
    units: dict[str, Annotated[int, Field(ge=0)] | Literal["tensor"]] = Field(default={})
    """By name pattern the dimension that has a tensor's outputs, where no layer says it, or
    "tensor" for one unit; the first match wins."""

    @property
    def unit_dims(self) -> Mapping[str, int | Literal["tensor"]]:
        """``units``."""
        return self.units

    def decide(self, seen: Measurement, state: PolicyState) -> Decision:  # noqa: ARG002 - no history
        """Bring every unit above its limit down to it."""
        weights_S = seen.weight_norms_S
        assert weights_S is not None
        # A weight that is NaN has the floor too: whether to step on it is for gradients to say.
        limits_S = self.clip_factor * torch.where(weights_S > self.eps, weights_S, self.eps)
        if self.clip_factor * self.eps >= _LEAST:
            return Decision(limits_S, limits_S)
        divided_S = torch.where(seen.norms_S < _LEAST, seen.norms_S / _LEAST, 1.0)
        return Decision(limits_S, limits_S * divided_S)
