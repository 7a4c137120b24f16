"""What a policy would have done in a run that is over: its norms, without its gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradclip.clipping.apply.coefficients import Coefficients
from gradclip.clipping.collect.gradients import COARSE_GUARD
from gradclip.clipping.flags import all_of, as_known, negated
from gradclip.clipping.kernels import choose
from gradclip.clipping.measure.norm import combine
from gradclip.clipping.measure.scopes import ScopeNames
from gradclip.clipping.measure.step import Measured
from gradclip.clipping.policies import Decision, Policy, PolicyLike, Scopes, as_policy
from gradclip.clipping.policies.checks import check_decision
from gradclip.clipping.state import Histories
from gradclip.errors import ArgumentTypeError, ArgumentValueError

__all__ = ["Replay", "replay"]

_CPU = torch.device("cpu")
_PATTERN = "*"


@dataclass(frozen=True, eq=False, repr=False)
class Replay:
    """What a policy does with the norms of a run.

    Args:
        norms_pre: The norms that were given, float64: of each step (n,), or of each step and scope
            (n, S).
        norms_post: The norms afterwards; 0 where the step is not made.
        thresholds: Norm above which a norm is scaled.
        coefficients: What gradients are multiplied by; 0 where the step is not made.
        skipped: Whether a step is not made, (n,) bool: the policy asks for it, or a norm is not
            finite.
    """

    norms_pre: Tensor
    norms_post: Tensor
    thresholds: Tensor
    coefficients: Tensor
    skipped: Tensor

    @property
    def clip_fraction(self) -> float:
        """The share of steps that are made with any gradient scaled down."""
        below = self.coefficients < 1
        if below.dim() > 1:
            below = below.any(1)
        return _mean(below & ~self.skipped)

    @property
    def lr_factor(self) -> float:
        """The mean coefficient: what the learning rate is multiplied by on average."""
        return _mean(self.coefficients)

    def __repr__(self) -> str:
        return (
            f"Replay(steps={len(self.skipped)}, clip_fraction={self.clip_fraction:.4g}, "
            f"skipped={int(self.skipped.sum())}, lr_factor={self.lr_factor:.4g})"
        )


def replay(norms: Sequence[float] | Tensor | Any, policy: PolicyLike) -> Replay:
    """Return what a policy does with the gradient norms of a run: bit for bit what a clipper does.

    There are no gradients and no device, so a policy can be tried on the log of a run that is over.
    The clipper is one with ``nonfinite="skip"`` and float32 gradients, which goes on whatever is
    skipped.

    Args:
        norms: Norms before clipping: one for each step, or an array (n, S) with one for each step
            and scope. 0 stands for a scope without a gradient.
        policy: A policy, or a number (``max_norm``).

    Raises:
        ArgumentValueError: GC010, for norms of another shape, or below 0, or a policy that norms do
            not tell enough.
        ArgumentTypeError: GC011, for something that is no norms, or no policy.

    >>> replay([1.0, 2.0, float("nan")], 1.0)
    Replay(steps=3, clip_fraction=0.3333, skipped=1, lr_factor=0.5)
    """
    rule = as_policy(policy)
    given = _read(norms)
    _check(rule, given)
    by_scope = given if given.dim() == 2 else given[:, None]  # noqa: PLR2004
    with torch.no_grad():
        run = _Run(rule, by_scope.shape[1])
        steps = [run.step(norms_S) for norms_S in by_scope]
    columns = zip(*steps, strict=True) if steps else [[by_scope.new_empty(0)]] * 4
    thresholds, coefficients, left, skipped = map(torch.stack, map(list, columns))
    shape = given.shape
    return Replay(
        given,
        left.reshape(shape),
        thresholds.reshape(shape),
        coefficients.reshape(shape),
        skipped.reshape(len(given)).to(torch.bool),
    )


class _Run:
    """The steps of a run, one after the other.

    Args:
        policy: What decides.
        scopes: How many norms there are at each step.
    """

    def __init__(self, policy: Policy, scopes: int) -> None:
        self._policy, self._limit = policy, policy.fixed()
        self._backends = choose("auto")
        names = [f"norms[{number}]" for number in range(scopes)]
        of = ScopeNames(policy.scope, _PATTERN, names, [1] * scopes)
        sizes_S = torch.ones(scopes, dtype=torch.int64, device=_CPU)
        self._scopes = Scopes(of, sizes_S, _CPU)
        self._histories = Histories()

    def step(self, norms_S: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return thresholds, coefficients, norms afterwards, and whether the step is skipped."""
        self._histories.prepare(_PATTERN, self._policy, self._scopes, named=True)
        is_sound = bool(norms_S.isfinite().all())
        decision = self._decide(norms_S, is_sound)
        writes = self._policy.writes
        unwanted = as_known(decision.skip) if writes else False
        found = Coefficients(
            self._backends,
            norms_S,
            decision,
            is_sound,
            unwanted,
            guard=COARSE_GUARD,
            skipped_coefficient=0.0 if writes else 1.0,
        )
        made = all_of([is_sound or not writes, negated(unwanted)])
        if self._limit is None:
            new = {_PATTERN: (decision.state, all_of([made, is_sound]))}
            self._histories.commit(new, made, all_of([is_sound, unwanted]))
        values_S = found.values_S
        thresholds_S = torch.as_tensor(
            decision.thresholds, dtype=torch.float64, device=_CPU
        ).expand_as(norms_S)
        left_S = torch.where(values_S == 0, 0.0, norms_S * values_S)
        return thresholds_S, values_S, left_S, torch.as_tensor(negated(made), device=_CPU)

    def _decide(self, norms_S: Tensor, is_sound: bool) -> Decision:
        find_total_norm = partial(combine, norms_S, self._policy.order)
        limit = self._limit
        if limit is not None:
            skip = bool(find_total_norm() > limit.skip_above)
            return Decision(limit.threshold, limit.target, skip=skip)
        seen = Measured(
            self._histories,
            find_total_norm,
            norms_S=norms_S.clone(),
            committed=torch.tensor(is_sound, device=_CPU),
        )
        decision = self._policy.decide(seen, self._histories.of(_PATTERN))
        check_decision(self._policy, decision, norms_S)
        self._histories.check(_PATTERN, self._policy, decision.state)
        return decision


def _read(norms: object) -> Tensor:
    try:
        given = torch.as_tensor(norms, dtype=torch.float64, device=_CPU).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ArgumentTypeError(
            f"norms is a {type(norms).__name__} that cannot be read: expected one number for each "
            f"step, or an array of shape (steps, scopes). {error}"
        ) from error
    if given.dim() not in (1, 2):
        raise ArgumentValueError(
            f"norms has the shape {tuple(given.shape)}: expected (steps,) or (steps, scopes)"
        )
    if bool((given < 0).any()):
        step = int((given < 0).reshape(len(given), -1).any(1).nonzero()[0])
        raise ArgumentValueError(f"norms has a number below 0 at step {step}: no norm is")
    return given


def _check(policy: Policy, norms: Tensor) -> None:
    """Refuse a policy that has to know more than norms."""
    reason = None
    if policy.element_limit is not None:
        reason = "bounds elements, and norms do not tell how large those were"
    elif policy.needs_weight_norms:
        reason = "asks for the norms of the weights, which norms of gradients do not tell"
    elif policy.scope == "group" and norms.dim() > 1 and norms.shape[1] != 1:
        reason = (
            f"has one limit for all gradients, and norms has {norms.shape[1]} at each step: give "
            "the norms of all gradients together, such as numpy.linalg.norm(norms, axis=1)"
        )
    if reason is not None:
        raise ArgumentValueError(f"{policy!r} cannot be replayed: it {reason}")


def _mean(values: Tensor) -> float:
    return float(values.to(torch.float64).mean()) if values.numel() else float("nan")
