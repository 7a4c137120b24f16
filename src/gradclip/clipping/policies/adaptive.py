"""What policies share whose limit follows the norms of the run: the frame around their rules.

A rule is told norms and what it remembers, and answers with limits and what it will remember. The
frame keeps from it what would poison a history: a norm that is not finite, or 0, leaves the history
of its scope as it is. 0 is the norm of what has no gradient, and an average that has once become 0
would stay there.
"""

from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from gradclip.clipping import flags
from gradclip.clipping.policies.base import Decision, Measurement, Policy, PolicyState, Scopes
from gradclip.config import Ceiling

History: TypeAlias = dict[str, Tensor]
"""Float64 tensors by name: numbers (S,), or norms that are kept (S, W)."""

_NUMBERS = "numbers"
"""One tensor of how many norms each scope has had, and of the tensors (S,) of a rule."""


@dataclass(frozen=True, eq=False)
class Sight:
    """What a rule is told at a step.

    Args:
        norms_S: Norm of each scope, finite: float64 (S,). Where it is 0 the answer does not count.
        before_S: How many norms above 0 each scope had before: float64 (S,).
        counts_S: The same with this one.
        early_S: Whether this norm is one of warm-up: bool (S,).
        found_S: Whether there is a norm: bool (S,).
        measured: What the policy was told.
    """

    norms_S: Tensor
    before_S: Tensor
    counts_S: Tensor
    early_S: Tensor
    found_S: Tensor
    measured: Measurement

    @cached_property
    def is_early(self) -> bool:
        """Whether any norm is one of warm-up; where to ask would make the host wait, it may be."""
        return _may_be(self.early_S)

    def may_be_above(self, limits_S: Tensor) -> bool:
        """Return whether any norm is above its limit, as ``is_early``."""
        return _may_be(self.norms_S > limits_S)

    def after_warm_up(self, limits_S: Tensor) -> Tensor:
        """Return limits that are infinite during warm-up; they may be the same tensor."""
        return limits_S.masked_fill_(self.early_S, torch.inf) if self.is_early else limits_S


@dataclass(frozen=True, eq=False)
class Limits:
    """What a rule answers.

    Args:
        thresholds_S: Norm above which a scope is scaled: float64 (S,); infinite during warm-up.
        targets_S: Norm that such a scope gets; elsewhere any number: float64 (S,). The thresholds
            themselves, where it is those.
        followed: What is remembered that follows this norm, (S,) each. Where the norm is 0, what
            was remembered before stays.
        pushed: What is written into norms that are kept: by name the places, int64 (S, 1), and the
            numbers, (S, 1), which are those that were there before where the norm is 0.
        early_S: Norm that a scope may have during its warm-up: float64 (S,); None for any.
    """

    thresholds_S: Tensor
    targets_S: Tensor
    followed: History
    pushed: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    early_S: Tensor | None = None


class AdaptiveClip(Policy):
    """A policy whose limit follows the norms of the run: a rule of its own, in the common frame."""

    scope: Literal["group", "tensor"] = "group"  # type: ignore[misc]  # a field here
    """What has a limit of its own: all gradients of a pattern together, or each tensor."""
    cap: Ceiling | None = None
    """A fixed ceiling besides, of the norm of each scope: the smaller coefficient counts."""
    warmup: int = Field(default=25, ge=1)
    """Norms of a scope before its limit counts; until then there is only ``cap``."""
    on_spike: Literal["clip", "skip"] = "clip"
    """What is done about a norm above the limit: "clip", or "skip", which does not make the step.
    With scope "tensor" the norm of all tensors together decides on that, by the same rule."""
    max_spikes: int = Field(default=3, ge=1)
    """Skips in a row, after which a step is clipped and remembered: a level that has changed for
    good is no spike."""

    @property
    @abstractmethod
    def follows(self) -> tuple[str, ...]:
        """The names of what the rule remembers of each scope as a number."""

    @abstractmethod
    def initial_history(self, scopes: int, device: torch.device) -> History:
        """Return what the rule remembers before the first step, of so many scopes."""

    @abstractmethod
    def limits(self, seen: Sight, history: History) -> Limits:
        """Return the limits of this step, and what is remembered after it.

        Args:
            seen: What was measured.
            history: What was remembered. It must not be changed.
        """

    @property
    def skips_in_a_row(self) -> int:
        """``max_spikes``, where it skips."""
        return self.max_spikes if self.on_spike == "skip" else 0

    def initial_state(self, scopes: Scopes) -> PolicyState:
        """Return the history of each scope, and that of their total where it decides on skips."""
        count, device = len(scopes.names), scopes.device
        of_total = {} if self.of_total is None else self.of_total.begun(1, device)
        return PolicyState(self.begun(count, device), of_total)

    def decide(self, seen: Measurement, state: PolicyState) -> Decision:
        """Scale what is above its limit, or ask not to make the step."""
        judged = self.judge(seen.norms_S, seen, state.per_scope)
        above_S, of_total = judged.above_S, History()
        if self.of_total is not None:
            total = self.of_total.judge(seen.total_norm.reshape(1), seen, state.shared)
            above_S, of_total = total.above_S, total.history
            for name, pushed in total.pushed.items():
                of_total[name] = of_total[name].scatter(1, *pushed)
        skip: bool | Tensor = False
        if above_S is not None and self.on_spike == "skip":
            is_above = above_S[0] if len(above_S) == 1 else above_S.any()
            skip = is_above & (seen.skips < self.max_spikes)
        return Decision(
            judged.thresholds_S,
            judged.targets_S,
            PolicyState(judged.history, of_total, judged.pushed),
            skip,
        )

    def judge(self, norms_S: Tensor, measured: Measurement, history: History) -> "Judged":
        """Return what the rule says of some norms, each with a history."""
        numbers_SC = history[_NUMBERS]
        before_S, *followed = numbers_SC.unbind(1)
        if flags.host_waits_for(norms_S.device) or not measured.committed:
            norms_S = finite(norms_S)
        found_S = norms_S > 0.0
        counts_S = before_S + found_S
        early_S = counts_S <= float(self.warmup)
        seen = Sight(norms_S, before_S, counts_S, early_S, found_S, measured)
        before = {**history, **dict(zip(self.follows, followed, strict=True))}
        answer = self.limits(seen, before)
        thresholds_S = targets_S = answer.thresholds_S
        above_S = None
        if self.on_spike == "skip" or answer.targets_S is not thresholds_S:
            above_S = norms_S > thresholds_S
        if above_S is not None and answer.targets_S is not thresholds_S:
            targets_S = torch.where(above_S, answer.targets_S, thresholds_S)
        bounds = [thresholds_S, targets_S]
        if answer.early_S is not None:
            bounds = [torch.where(seen.early_S, answer.early_S, each) for each in bounds]
        if self.cap is not None:
            bounds = [each.clamp(max=self.cap) for each in bounds]
        after_CS = torch.stack([counts_S, *(answer.followed[name] for name in self.follows)])
        after_SC = torch.where(found_S, after_CS, numbers_SC.T).T
        after = {**history, _NUMBERS: after_SC}
        return Judged(bounds[0], bounds[1], above_S, after, answer.pushed)

    def begun(self, scopes: int, device: torch.device) -> History:
        """Return the history before the first step, of so many scopes."""
        kept = self.initial_history(scopes, device)
        zeros_S = torch.zeros(scopes, dtype=torch.float64, device=device)
        numbers = [zeros_S, *(kept.pop(name) for name in self.follows)]
        return {**kept, _NUMBERS: torch.stack(numbers).T}

    @cached_property
    def of_total(self) -> "AdaptiveClip | None":
        """What the norm of all tensors is judged by, where that decides on skips."""
        if self.on_spike == "skip" and self.scope == "tensor":
            return self.model_copy(update={"scope": "group"})
        return None


class Judged(NamedTuple):
    """What is said of some norms.

    Attributes:
        thresholds_S: Norm above which each is scaled.
        targets_S: What it gets then.
        above_S: Whether it is above the limit of the rule; None where nobody asks.
        history: After this step, but for what is pushed into it.
        pushed: That.
    """

    thresholds_S: Tensor
    targets_S: Tensor
    above_S: Tensor | None
    history: History
    pushed: dict[str, tuple[Tensor, Tensor]]


def _may_be(flags_S: Tensor) -> bool:
    # To read a number would be refused on ranks: the answer must not depend on it, and does not.
    return flags.host_waits_for(flags_S.device) or len(flags_S.nonzero()) > 0


def finite(norms: Tensor) -> Tensor:
    """Return norms with 0 for those that are no number: of such a step nothing is remembered."""
    return torch.nan_to_num(norms, nan=0.0, posinf=0.0)
