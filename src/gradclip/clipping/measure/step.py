"""What one call of a clipper works on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from gradclip.clipping.measure.group import Found, Group
from gradclip.clipping.measure.norm import Sums, combine
from gradclip.clipping.policies import Measurement

_SMALL_SCALE = 2.0**-700
"""Divided by less than this, the norm of float32 gradients may be beyond float64."""


@dataclass(frozen=True, eq=False)
class Step:
    """The gradients of one call.

    Args:
        groups: Those of each pattern.
        device: That of the results.
        scale: What the gradients are still multiplied by.
        tag: At which step this rank stands, in words that are the same on all ranks.
        wide: Whether norms may be beyond float64, or coefficients below its normal numbers.
    """

    groups: list[Group]
    device: torch.device
    scale: float | Tensor | None
    tag: str
    wide: bool

    def unscaled(self, sums: Sums) -> Tensor:
        """Return norms, (S,), as if gradients were not multiplied by the scale."""
        return sums.norms(self.scale, wide=self.wide)

    def totals(self, found: list[Found], norms: list[Tensor]) -> list[Tensor]:
        """Return the norms of each pattern with the p of all together, unscaled."""
        return [
            norms_S if each.total is each.norm else self.unscaled(each.total)
            for each, norms_S in zip(found, norms, strict=True)
        ]

    def pattern_norm(self, group: Group, found: Found, norms_S: Tensor) -> Tensor:
        """Return the norm of all parameters of a pattern, on all ranks: 0-d."""
        if found.pattern_norm is not None:
            return self.unscaled(found.pattern_norm)[0]
        return combine(norms_S, group.of.order)


def is_small(scale: float | Tensor | None) -> bool:
    """Return whether norms without a scale may be beyond float64."""
    return isinstance(scale, float) and scale < _SMALL_SCALE


class Counts(Protocol):
    """How many steps there were."""

    @property
    def step(self) -> Tensor:
        """How many were made: a copy, 0-d int64."""
        ...

    @property
    def skips(self) -> Tensor:
        """How many in a row policies kept from being made: a copy, 0-d int64."""
        ...


class Measured(Measurement):
    """What a policy is told, of which some is found when it is read: few policies do.

    Args:
        counts: Of steps, before this one.
        find_total_norm: Returns the total norm.
        known: Everything else.
    """

    _counts: Counts
    _find_total_norm: Callable[[], Tensor]

    def __init__(
        self, counts: Counts, find_total_norm: Callable[[], Tensor], **known: Tensor | None
    ) -> None:
        vars(self).update(known, _counts=counts, _find_total_norm=find_total_norm)

    @cached_property
    def total_norm(self) -> Tensor:
        """Norm of all parameters of the pattern, on all ranks: 0-d float64."""
        return self._find_total_norm().clone()

    @cached_property
    def step(self) -> Tensor:
        """How many steps were made before this one: 0-d int64."""
        return self._counts.step

    @cached_property
    def skips(self) -> Tensor:
        """How many steps in a row were not made because a policy asked for it: 0-d int64."""
        return self._counts.skips
