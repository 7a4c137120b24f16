"""What an engine needs of other ranks, and the answers of a process that holds all by itself."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from gradclip.clipping.collect.gradients import Gradients
from gradclip.clipping.flags import Flag

_Fact = TypeVar("_Fact")


@dataclass(frozen=True)
class Rule:
    """What ranks have to know of the policy of a pattern.

    Args:
        label: The policy in words: the same on all ranks.
        scope: What has a norm of its own.
        order: The p of its norm.
        clamps: Whether elements are limited, so that norms do not tell what is left.
        is_fixed: Whether numbers say it completely, so that it needs no other norm.
        weighs: Whether it asks for the norms of the weights.
        is_asked: Whether it is asked at each step.
    """

    label: str
    scope: Literal["group", "tensor", "unit"]
    order: float
    clamps: bool
    is_fixed: bool
    weighs: bool
    is_asked: bool

    @property
    def needs_pattern_norm(self) -> bool:
        """Whether the norm of the whole pattern does not follow from that of the scopes here."""
        return self.scope != "group" and not self.is_fixed

    @property
    def exchanged(self) -> tuple[object, ...]:
        """What decides on the numbers that ranks exchange, and how often they do."""
        return self.needs_pattern_norm, self.clamps, self.weighs, self.is_asked


def in_words(rules: Mapping[str, Rule | None], options: str) -> str:
    """Say what is done with gradients, so that ranks can compare it.

    Args:
        rules: By pattern; None leaves it alone.
        options: The other arguments, in words.
    """
    policies = ", ".join(
        f"{pattern!r}: {None if rule is None else rule.label}" for pattern, rule in rules.items()
    )
    return f"{{{policies}}} with {options}"


@dataclass(frozen=True, eq=False)
class PatternShare:
    """What an engine needs to know of how ranks hold the parameters of one pattern.

    Args:
        weights: How much of each parameter is counted here: one over the number of its copies.
        elements: Elements of the pattern on all ranks; None if no policy needs it.
        row_starts: The index of the first row here among all rows, of each parameter.
    """

    weights: Sequence[float]
    elements: int | None = None
    row_starts: Sequence[int] | None = None


@dataclass(frozen=True, eq=False)
class LocalSums:
    """What one rank found in the gradients of one pattern.

    Args:
        gradients: The gradients.
        sums: Sums of powers by name, (S, A) each.
        maxima: Largest moduli by the same names, (S,) each, where p is inf.
        row_sums_RA: Sums of powers of the rows that exist here; of several together, in any order,
            where no other rank has copies.
        tensor_sums_T: Not finite just where a tensor is not, NaN just where it holds a NaN. None
            where all are finite.
        changed: How many elements clamping changes, for a policy that clamps: 0-d float64.
    """

    gradients: Gradients
    sums: Mapping[str, Tensor]
    maxima: Mapping[str, Tensor]
    row_sums_RA: Tensor
    tensor_sums_T: Tensor | None
    changed: Tensor | None = None


@dataclass(frozen=True, eq=False)
class GlobalSums:
    """What all ranks found in the gradients of one pattern.

    Args:
        sums: As in ``LocalSums``.
        maxima: Likewise.
        nonfinite: How many tensors are not finite: 0-d float64.
        unbounded: How many tensors the policy cannot bound, where ranks have scopes of their own.
        changed: As in ``LocalSums``.
    """

    sums: Mapping[str, Tensor]
    maxima: Mapping[str, Tensor]
    nonfinite: Tensor
    unbounded: Tensor | None = None
    changed: Tensor | None = None


class ReplacedError(Exception):
    """Parameters were replaced or added on this rank: all ranks have to look again."""


class Peers(Protocol):
    """The processes that hold gradients together with this one."""

    @property
    def is_single(self) -> bool:
        """Whether this process holds every gradient whole, and exchanges nothing."""
        ...

    @property
    def rank(self) -> int:
        """Which rank this process is; 0 where there is one."""
        ...

    @property
    def result_device(self) -> torch.device | None:
        """Where small results belong, the same at every step; None where that may change."""
        ...

    @property
    def hear_first(self) -> bool:
        """Whether they have to hear that parameters were replaced before this rank looks again."""
        ...

    @property
    def look_again(self) -> bool:
        """Whether parameters were replaced on any rank, as ``combine`` told."""
        ...

    def share(self, pattern: str) -> PatternShare | None:
        """Return how the parameters of a pattern are held; None where all are whole here."""
        ...

    def prepare(self, parameters: Callable[[], list[Tensor]]) -> None:
        """Do what has to be done together before gradients are collected."""
        ...

    def check(self) -> None:
        """Refuse what shows only now that training has begun."""
        ...

    def guarding(self) -> AbstractContextManager[None]:
        """Keep an error that happens on this rank alone until every rank knows of it."""
        ...

    @property
    def owes(self) -> bool:
        """Whether there is an error that the others hear at the next call."""
        ...

    def owing(self, step: int) -> AbstractContextManager[None]:
        """Keep an error that happens on this rank alone for the next call: the others go on."""
        ...

    def forget(self) -> None:
        """Forget what other ranks were to hear at the next call."""
        ...

    def assign(self, policies: str) -> None:
        """Clip by other policies from now on, as all ranks do; their words are compared."""
        ...

    def maximise(self, maxima: Sequence[Tensor]) -> list[Tensor]:
        """Return the maxima of all ranks, where a norm asks for them before it sums powers.

        Args:
            maxima: Those of this rank, (S,) each, in the order of patterns and names; ignored after
                an error.
        """
        ...

    def combine(
        self, found: Sequence[LocalSums], step_tag: str
    ) -> tuple[Flag | None, list[GlobalSums]]:
        """Add up what all ranks found, and see whether anything is wrong on one of them.

        Args:
            found: What this rank found, by pattern; ignored after an error.
            step_tag: At which step this rank stands, in words that are the same on all ranks.

        Returns:
            Whether all is well, None if gradients have to be collected again; and the sums.
        """
        ...

    def confirm(self) -> Flag:
        """Return whether nothing failed on any rank since ``combine``."""
        ...

    def precision(self, gradients: Gradients) -> tuple[torch.dtype, float]:
        """Return the dtype of what is reported, and the margin for rounding."""
        ...

    def compare(
        self,
        gradients: Sequence[Gradients],
        norms: Sequence[Tensor],
        nonfinite: Sequence[Tensor | None],
        states: Mapping[str, Mapping[tuple[str, str], Tensor]],
    ) -> None:
        """Warn of what ``combine`` found; look for copies that differ, if the environment asks."""
        ...

    def gather(self, fact: Callable[[], _Fact]) -> list[_Fact]:
        """Return what every rank gave, in the order of ranks; all of them ask at the same time."""
        ...


class SingleProcess:
    """One process: every gradient is whole."""

    is_single = True
    rank = 0
    result_device = None
    hear_first = False
    owes = False
    look_again = False

    def share(self, pattern: str) -> PatternShare | None:  # noqa: ARG002
        """Return None: all is whole."""
        return None

    def prepare(self, parameters: Callable[[], list[Tensor]]) -> None:
        """Do nothing."""

    def check(self) -> None:
        """Do nothing."""

    def guarding(self) -> AbstractContextManager[None]:
        """Let errors pass."""
        return _NOTHING

    def owing(self, step: int) -> AbstractContextManager[None]:  # noqa: ARG002
        """Let errors pass."""
        return _NOTHING

    def forget(self) -> None:
        """Do nothing."""

    def assign(self, policies: str) -> None:
        """Do nothing."""

    def maximise(self, maxima: Sequence[Tensor]) -> list[Tensor]:
        """Return what was found here."""
        return list(maxima)

    def combine(
        self,
        found: Sequence[LocalSums],  # noqa: ARG002
        step_tag: str,  # noqa: ARG002
    ) -> tuple[Flag | None, list[GlobalSums]]:
        """Return that all is well; there is nothing to add up."""
        return True, []

    def confirm(self) -> Flag:
        """Return that nothing failed: it would have been raised."""
        return True

    def precision(self, gradients: Gradients) -> tuple[torch.dtype, float]:
        """Return what follows from the gradients that exist."""
        return gradients.dtype, gradients.guard

    def compare(
        self,
        gradients: Sequence[Gradients],
        norms: Sequence[Tensor],
        nonfinite: Sequence[Tensor | None],
        states: Mapping[str, Mapping[tuple[str, str], Tensor]],
    ) -> None:
        """Do nothing: there are no copies."""

    def gather(self, fact: Callable[[], _Fact]) -> list[_Fact]:
        """Return what was given."""
        return [fact()]


_NOTHING = nullcontext()
