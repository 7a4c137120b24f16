"""A limit that changes as training goes on: numbers at some steps, and what holds between them."""

from collections.abc import Mapping
from itertools import pairwise
from math import inf
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Discriminator, Field, Tag
from torch import Tensor

from gradclip.config import Ceiling, Config

_Point: TypeAlias = tuple[Annotated[int, Field(ge=0, lt=2**63)], Ceiling]


class Schedule(Config):
    """A number for each step: given at some steps, and constant or linear between them.

    Steps are those that were made: one that is skipped does not count. Before the first point its
    value holds, and after the last one that of the last.

    >>> Schedule(points=((0, 2.0), (1000, 1.0)), shape="linear").at(torch.tensor(250))
    tensor(1.7500, dtype=torch.float64)
    """

    points: tuple[_Point, ...]
    """Pairs of a step and its value, in the order of steps; values are >= 0, and may be infinite
    where the shape is constant."""
    shape: Literal["constant", "linear"] = "constant"
    """Between two points: the value of the first, or what lies on the line between them."""

    def __post_init__(self) -> None:
        """Check what needs all points."""
        if not self.points:
            raise ValueError("points is empty: expected at least one pair of a step and a value")
        for (before, _), (after, _) in pairwise(self.points):
            if not before < after:
                raise ValueError(
                    f"points has the step {after} behind the step {before}: each step has to be "
                    "larger than the one before it"
                )
        if self.shape == "linear" and len(self.points) > 1 and self.largest == inf:
            raise ValueError(
                'points has an infinite value, and shape="linear" finds no number between it and '
                'another one: use shape="constant"'
            )

    @property
    def largest(self) -> float:
        """The largest value."""
        return max(value for _, value in self.points)

    @property
    def smallest(self) -> float:
        """The smallest value."""
        return min(value for _, value in self.points)

    def at(self, step: Tensor) -> Tensor:
        """Return the value at a step, 0-d float64, on the device of the step.

        Args:
            step: How many steps were made: 0-d integer.
        """
        (_, first), *_ = self.points
        found = torch.full_like(step, first, dtype=torch.float64)
        for (start, value), (end, following) in pairwise(self.points):
            here: float | Tensor = value
            if self.shape == "linear":
                here = value + (following - value) * ((step - start).double() / (end - start))
            found = torch.where(step >= start, here, found)
        last, value = self.points[-1]
        return torch.where(step >= last, value, found)


def _kind(value: Any) -> str:
    return "schedule" if isinstance(value, Schedule | Mapping) else "number"


NumberOrSchedule: TypeAlias = Annotated[
    Annotated[Ceiling, Tag("number")] | Annotated[Schedule, Tag("schedule")],
    Discriminator(_kind),
]
"""A field that is a number >= 0, or a schedule of such numbers."""
