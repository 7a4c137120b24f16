"""A process that holds its gradients alone, as the clipper sees it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from gradclip.clipping.apply.coefficients import Flag
from gradclip.clipping.collect.gradients import Gradients
from gradclip.clipping.measure.group import Group

if TYPE_CHECKING:
    from gradclip.clipping.ranks.share import Share

_Fact = TypeVar("_Fact")


class Peers(Protocol):
    """Who holds gradients together with this process; ``Alone`` where nobody does."""

    def home(self, groups: Sequence[Group]) -> torch.device | None:
        """Return where small results belong, the same at every step; None where that may change."""
        ...

    def share(self, pattern: str) -> "Share | None":
        """Return what part of a group's scopes is here; None for all of it."""
        ...

    def prepare(self, parameters: Callable[[], list[Tensor]]) -> None:
        """Do what has to be done together before gradients are collected."""
        ...

    def guarding(self) -> AbstractContextManager[None]:
        """Keep an error that happens here alone until every rank knows of it."""
        ...

    def maximise(self, groups: Sequence[Group]) -> None:
        """Replace the maxima of this rank by those of all, where a norm asks for them first."""
        ...

    def combine(self, groups: Sequence[Group], moment: str) -> Flag | None:
        """Replace what this rank found by what all ranks found.

        Args:
            groups: What was read.
            moment: Where this rank stands, in words that are the same on all of them.

        Returns:
            Whether all is well; None if gradients have to be collected again.
        """
        ...

    def precision(self, gradients: Gradients) -> tuple[torch.dtype, float]:
        """Return the dtype of what is reported, and the margin for rounding."""
        ...

    def compare(self, groups: Sequence[Group], states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Look for copies that differ by rank, if the environment asks for it."""
        ...

    def gather(self, fact: _Fact) -> list[_Fact]:
        """Return what every rank gave, in the order of ranks; only where all of them ask."""
        ...

    @property
    def is_alone(self) -> bool:
        """Whether nothing is held together."""
        ...

    @property
    def rank(self) -> int:
        """Which rank this process is; 0 where it is alone."""
        ...


class Alone:
    """Nobody: every gradient is whole, here."""

    is_alone = True
    rank = 0

    def home(self, groups: Sequence[Group]) -> torch.device | None:  # noqa: ARG002
        """Leave it to where the gradients are."""
        return None

    def share(self, pattern: str) -> "Share | None":  # noqa: ARG002
        """Say that all of it is."""
        return None

    def prepare(self, parameters: Callable[[], list[Tensor]]) -> None:
        """Do nothing."""

    def guarding(self) -> AbstractContextManager[None]:
        """Let errors pass."""
        return nullcontext()

    def maximise(self, groups: Sequence[Group]) -> None:
        """Keep what was found."""

    def combine(self, groups: Sequence[Group], moment: str) -> Flag | None:  # noqa: ARG002
        """Keep what was found."""
        return True

    def precision(self, gradients: Gradients) -> tuple[torch.dtype, float]:
        """Return what follows from the gradients that there are."""
        return gradients.dtype, gradients.guard

    def compare(self, groups: Sequence[Group], states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Find nobody to compare with."""

    def gather(self, fact: _Fact) -> list[_Fact]:
        """Return what was given."""
        return [fact]
