"""The object that clips: collect, measure and reduce, decide, apply."""

import warnings
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gradclip.clipping import apply, kernels
from gradclip.clipping.arguments import (
    Nonfinite,
    check_count,
    check_grad_scale,
    check_nonfinite,
)
from gradclip.clipping.gradients import Gradients, collect
from gradclip.clipping.kernels.blocks import home_of
from gradclip.clipping.nonfinite import SkipCounter, nonfinite_error, too_many_skips
from gradclip.clipping.overlap import check_disjoint
from gradclip.clipping.parameters import ParameterGroup, Parameters, ParameterSource, as_source
from gradclip.clipping.policies import Decision, Policy, PolicyLike, as_policies
from gradclip.clipping.reduction import Measured, measure
from gradclip.clipping.result import ClipResult
from gradclip.clipping.state import STATE_VERSION, read_state
from gradclip.errors import NonFiniteGradientError, UnsupportedGradientError

ParametersLike: TypeAlias = (
    nn.Module
    | torch.optim.Optimizer
    | Tensor
    | Iterable[Tensor]
    | Iterable[tuple[str, Tensor]]
    | ParameterSource
)

_EUCLIDEAN = 2.0


@dataclass(eq=False)
class _Group:
    """One name pattern at one call."""

    pattern: str
    policy: Policy
    gradients: Gradients
    rows: list[int]

    @property
    def per_row(self) -> bool:
        return self.policy.scope != "group"

    def scope_names(self) -> tuple[str, ...]:
        if self.policy.scope == "group":
            return (self.pattern,)
        if self.policy.scope == "tensor":
            return tuple(self.gradients.names)
        pairs = zip(self.gradients.names, self.rows, strict=True)
        return tuple(f"{name}[{row}]" for name, rows in pairs for row in range(rows))


class GradientClipper:
    """Bounds the gradients of a set of parameters: bound once, called at each step.

    Args:
        params: Tensors, (name, tensor) pairs, an ``nn.Module``, or a torch ``Optimizer``; a module
            or optimizer is asked again at each call, so parameters that were replaced or added
            are found.
        policy: A number (``max_norm``), a policy, or a mapping of name patterns (``fnmatch``, first
            match wins) to those; None leaves the parameters of a pattern alone.
        nonfinite: What to do when a gradient that would be clipped holds a NaN or an infinity:
            "skip" zeroes the gradients and sets ``ClipResult.skipped``; "raise" raises and changes
            nothing (reads one number per step); "propagate" reports the non-finite norm and
            changes nothing.
        max_consecutive_skips: Skipped steps in a row that are tolerated.
        backend: "auto", "foreach", or "reference" (float64, slow, for comparison).

    Raises:
        ArgumentTypeError: GC011, for an argument of the wrong kind.
        ArgumentValueError: GC010, for one out of range, or patterns that do not fit the names.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> GradientClipper([weight], 1.0).clip()
    ClipResult(norm_pre=5, norm_post=1, threshold=1, coefficient=0.2, \
clipped=True, skipped=False, nonfinite=0)
    """

    def __init__(
        self,
        params: ParametersLike,
        policy: PolicyLike | Mapping[str, PolicyLike | None],
        *,
        nonfinite: Nonfinite = "skip",
        max_consecutive_skips: int = 25,
        backend: str = "auto",
    ) -> None:
        self._policies, by_pattern = as_policies(policy)
        self._nonfinite = check_nonfinite(nonfinite)
        self._skips = SkipCounter(check_count(max_consecutive_skips))
        self._kernels = kernels.choose(backend)
        self._parameters = Parameters(
            as_source(params), list(self._policies) if by_pattern else None
        )
        self._by_pattern = by_pattern
        self._order = _common_order(policy for policy in self._policies.values() if policy)
        self._states: dict[str, dict[str, Tensor]] = {}
        self._recent: deque[ClipResult] = deque(maxlen=32)
        self._warned = False
        self.step = 0
        """How many calls there were."""
        self.last: ClipResult | None = None
        """The result of the last call."""

    @torch.no_grad()
    def clip(
        self, grad_scale: float | Tensor | None = None, *, overflow_expected: bool = False
    ) -> ClipResult:
        """Clip the gradients that exist now, in place.

        Args:
            grad_scale: What the gradients are still multiplied by (a loss scale): a positive
                number or one-element tensor. Limits and norms are those of unscaled gradients.
            overflow_expected: An active loss scaler answers for an overflow at this step, so that
                a skip does not count towards ``max_consecutive_skips``.

        Returns:
            What was measured and done. Nothing waits for the device, unless ``nonfinite="raise"``.

        Raises:
            UnsupportedGradientError: GC020, for integer, float8 or meta gradients, and for
                complex ones that should be clamped.
            OverlappingGradientsError: GC021, for gradients that share bytes.
            NonFiniteGradientError: GC201, with ``nonfinite="raise"``.
            TooManySkipsError: GC202, after ``max_consecutive_skips``.

        All are raised before any gradient is changed.
        """
        scale = check_grad_scale(grad_scale)
        groups = self._collect()
        home = self._home(groups)

        measured = [self._measure(group, group.policy.order, scale, home) for group in groups]
        totals = [
            norms
            if norms.norm_type == self._order
            else self._measure(group, self._order, scale, home)
            for group, norms in zip(groups, measured, strict=True)
        ]
        counts = self._judge(groups, measured, overflow_expected=overflow_expected)

        decisions = [
            self._decide(group, norms, counts)
            for group, norms in zip(groups, measured, strict=True)
        ]
        results = [
            self._apply(group, norms, decision, counts, scale)
            for group, norms, decision in zip(groups, measured, decisions, strict=True)
        ]
        self.step += 1
        self.last = self._summarise(groups, results, totals)
        if counts.device.type != "cpu" or counts:
            self._recent.append(self.last)
        return self.last

    # collect

    def _collect(self) -> list[_Group]:
        """Find and check the gradients of every group that has a policy."""
        groups = []
        for pattern, parameters in self._parameters.groups().items():
            policy = self._policies[pattern]
            if policy is not None:
                groups.append(self._collect_group(parameters, policy))
        check_disjoint([group.gradients for group in groups])
        self._warn_if_none(groups)
        return groups

    @staticmethod
    def _collect_group(parameters: ParameterGroup, policy: Policy) -> _Group:
        gradients = collect(parameters.names, parameters.parameters)
        if policy.element_limit is not None:
            for name, tensor in zip(gradients.names, gradients.tensors, strict=True):
                if tensor.is_complex():
                    raise UnsupportedGradientError(
                        f"the gradient of {name} is {tensor.dtype}, and complex numbers have no "
                        "order to clamp by: use NormClip for it. No gradient was changed."
                    )
        by_unit = policy.scope == "unit"
        rows = [t.shape[0] if by_unit and t.dim() > 1 else 1 for t in gradients.tensors]
        return _Group(parameters.pattern, policy, gradients, rows)

    def _warn_if_none(self, groups: list[_Group]) -> None:
        if self._warned or any(group.gradients.tensors for group in groups):
            return
        if any(group.parameters for group in self._parameters.groups().values()):
            self._warned = True
            warnings.warn(
                "every gradient is None, so nothing was clipped: clip after backward() and before "
                "zero_grad()",
                stacklevel=4,
            )

    def _home(self, groups: list[_Group]) -> torch.device:
        """Return the device of the small results: an accelerator where there is one."""
        devices = {device for group in groups for device in group.gradients.devices}
        if not devices:
            found = self._parameters.groups().values()
            devices = {p.device for group in found for p in group.parameters[:1] if not p.is_meta}
        return home_of(devices)

    # measure and reduce

    def _measure(
        self, group: _Group, order: float, scale: float | Tensor | None, home: torch.device
    ) -> Measured:
        measured = measure(
            self._kernels,
            group.gradients.measured(order),
            group.rows,
            order,
            per_row=group.per_row,
            home=home,
        )
        if scale is None:
            return measured
        return replace(measured, norms_S=measured.norms_S / scale)

    # decide

    def _judge(
        self, groups: list[_Group], measured: list[Measured], *, overflow_expected: bool
    ) -> Tensor:
        """Return whether the update may happen, as far as NaN and infinities go: 0-d bool."""
        finite = [
            ~norms.norms_S.isnan()
            if group.policy.element_limit is not None
            else norms.norms_S < inf
            for group, norms in zip(groups, measured, strict=True)
        ]
        if self._nonfinite == "raise" and not all(bool(flags.all()) for flags in finite):
            raise self._error(groups)
        written = [f.all() for f, group in zip(finite, groups, strict=True) if group.policy.writes]
        if not written:
            counts = torch.ones_like(finite[0].all())
        else:
            counts = written[0] if len(written) == 1 else torch.stack(written).all()
        if self._nonfinite == "skip" and self._skips.record(~counts, expected=overflow_expected):
            raise too_many_skips(self._error(groups), self._skips.limit)
        return counts

    def _error(self, groups: list[_Group]) -> NonFiniteGradientError:
        return nonfinite_error(
            [group.gradients for group in groups],
            norm_type=groups[0].policy.order,
            step=self.step,
            last_norms=[n for n in (float(r.norm_pre) for r in self._recent) if isfinite(n)][-4:],
            ceiling=groups[0].policy.ceiling,
        )

    def _decide(self, group: _Group, norms: Measured, counts: Tensor) -> Decision:
        state = self._states.get(group.pattern)
        if state is None:
            state = group.policy.initial_state(len(norms.norms_S), norms.norms_S.device)
        decision = group.policy.decide(norms.norms_S, counts, state)
        self._states[group.pattern] = decision.state
        return decision

    # apply

    def _apply(
        self,
        group: _Group,
        norms: Measured,
        decision: Decision,
        counts: Tensor,
        scale: float | Tensor | None,
    ) -> ClipResult:
        policy, gradients = group.policy, group.gradients
        coefficients_S = decision.coefficients(norms.norms_S, counts, gradients.guard)
        skips = policy.writes and self._nonfinite == "skip"
        clamped, left_S = None, None
        if policy.element_limit is not None:
            clamped, left_S = self._clamp(group, norms, counts, scale)
        elif policy.writes:
            targets_S, guard = decision.targets_S, gradients.guard
            for step_S in apply.steps(coefficients_S, targets_S, norms.norms_S, guard):
                apply.scale(self._kernels, gradients, group.rows, step_S)
        if skips or policy.ceiling == 0:
            apply.zero(self._kernels, gradients, counts)
        return ClipResult(
            measured_S=norms.norms_S,
            thresholds_S=(
                decision.thresholds_S
                if policy.element_limit is None
                else torch.full_like(norms.norms_S, policy.element_limit)
            ),
            applied_S=coefficients_S,
            skipped=~counts if skips else torch.zeros_like(counts),
            witness_T=norms.witness_T,
            norm_type=norms.norm_type,
            dtype=gradients.dtype,
            scope_names=group.scope_names(),
            clamped=clamped,
            left_S=left_S,
        )

    def _clamp(
        self, group: _Group, norms: Measured, counts: Tensor, scale: float | Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Clamp a group; return whether anything changed, and the norms that are left."""
        limit = group.policy.element_limit
        on_host = counts.device.type == "cpu"
        skipped = on_host and self._nonfinite == "skip" and not counts
        if not group.policy.writes or not group.gradients.tensors or limit is None or skipped:
            return torch.zeros_like(counts), norms.norms_S
        scaled = limit if scale is None else limit * scale
        changed = apply.clamp(self._kernels, group.gradients, scaled)
        if on_host and not changed:
            return changed, norms.norms_S
        left = self._measure(group, group.policy.order, scale, norms.norms_S.device)
        return changed, left.norms_S

    # report

    def _summarise(
        self, groups: list[_Group], results: list[ClipResult], totals: list[Measured]
    ) -> ClipResult:
        """Return the only result, or one over all groups that has each of them."""
        if not self._by_pattern:
            return results[0]  # there is just one
        left = [
            result.remaining_S
            if total.norm_type == result.norm_type
            else torch.where(result.skipped, 0.0, total.norms_S * result.coefficients_S)
            for total, result in zip(totals, results, strict=True)
        ]
        return ClipResult(
            measured_S=torch.cat([total.norms_S for total in totals]),
            thresholds_S=torch.cat([r.thresholds_S for r in results]),
            applied_S=torch.cat([r.coefficients_S for r in results]),
            skipped=_any([r.skipped for r in results]),
            witness_T=torch.cat([r.witness_T for r in results]),
            norm_type=self._order,
            dtype=max((r.dtype for r in results), key=lambda dtype: dtype.itemsize),
            scope_names=tuple(name for result in results for name in result.scope_names),
            groups={group.pattern: r for group, r in zip(groups, results, strict=True)},
            clamped=_any([r.clipped for r in results]),
            left_S=torch.cat(left),
        )

    # state

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on: numbers, strings and tensors."""
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "consecutive_skips": self._skips.in_a_row,
            "clip_modes": {
                pattern: None if policy is None else policy.clip_mode
                for pattern, policy in self._policies.items()
            },
            "states": {
                pattern: {name: tensor.clone() for name, tensor in state.items()}
                for pattern, state in self._states.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            StateError: GC030, if it is damaged, of another version, or of other policies; nothing
                is changed then.
        """
        self.step, self._skips.in_a_row, self._states = read_state(state, self.state_dict())


def _any(flags: list[Tensor]) -> Tensor:
    """Return whether any of some 0-d flags is set: 0-d bool."""
    return flags[0] if len(flags) == 1 else torch.stack(flags).any()


def _common_order(policies: Iterable[Policy]) -> float:
    """Return the p that all policies measure by, or 2: what the norm over all groups is in."""
    orders = {policy.order for policy in policies}
    return orders.pop() if len(orders) == 1 else _EUCLIDEAN
