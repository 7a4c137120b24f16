"""The engine: collect, measure, decide, apply. What varies between its users is given to it."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from gradclip.clipping import flags
from gradclip.clipping.apply.clamping import Clamping
from gradclip.clipping.apply.coefficients import Coefficients
from gradclip.clipping.apply.scaling import scale as scale_gradients
from gradclip.clipping.arguments import Options, check_grad_scale
from gradclip.clipping.collect.overlap import DisjointCheck
from gradclip.clipping.collect.parameters import ParameterGroup, Parameters
from gradclip.clipping.collect.sources import ParameterSource
from gradclip.clipping.flags import Flag, all_of, any_of, as_flag, as_known, negated
from gradclip.clipping.kernels import SpecsCache, choose
from gradclip.clipping.kernels.device import is_capturing, result_device_of
from gradclip.clipping.measure.group import Found, Group, read, read_again
from gradclip.clipping.measure.norm import Sums, combine, reads_twice
from gradclip.clipping.measure.pattern import Pattern, rule_of
from gradclip.clipping.policies import Decision, Measurement, Policy
from gradclip.clipping.policies.checks import check_decision, check_skip_is_shared
from gradclip.clipping.ranks import Meet, find_peers
from gradclip.clipping.ranks.peers import LocalSums, Peers, SingleProcess
from gradclip.clipping.result import ClipResult, over_all
from gradclip.clipping.state import STATE_VERSION, Histories, read_state
from gradclip.clipping.step.nonfinite import (
    Faults,
    SkipCounter,
    nonfinite_error,
    nonfinite_report,
    skip_report,
    too_many_skips,
)
from gradclip.clipping.step.ownership import Role
from gradclip.errors import UnsupportedGradientError, warn

_EUCLIDEAN = 2.0
_COARSE = 2.0**-80
"""A coefficient below this may not have a loss scale in float32."""


@dataclass(frozen=True, eq=False)
class _Step:
    """What one call works on.

    Args:
        groups: The gradients of each pattern.
        device: That of the results.
        scale: What the gradients are still multiplied by.
    """

    groups: list[Group]
    device: torch.device
    scale: float | Tensor | None

    def unscaled(self, sums: Sums) -> Tensor:
        """Return norms, (S,), as if gradients were not multiplied by the scale."""
        norms_S = sums.norms()
        return norms_S if self.scale is None else norms_S / self.scale


class Engine:
    """Bounds the gradients of a source of parameters.

    Args:
        source: Where parameters and gradients come from.
        policies: What bounds them, by name pattern; None leaves a pattern alone.
        options: The checked keywords.
        role: Whether this is a guest or an owner, for others that clip the same gradients.
        by_pattern: Whether patterns were given; otherwise there is one result for all.
        once: Whether this engine serves one call, so that nothing changes before it.
        known: Recognises gradients, for all engines that share it; None for one per pattern.
        meet: Finds the ranks of parameters; None to agree with them anew.
    """

    def __init__(
        self,
        source: ParameterSource,
        policies: Mapping[str, Policy | None],
        options: Options,
        role: Role,
        *,
        by_pattern: bool = False,
        once: bool = False,
        known: SpecsCache | None = None,
        meet: "Meet | None" = None,
    ) -> None:
        self.source, self.policies, self.options = source, policies, options
        self._role = role
        self._by_pattern = by_pattern
        self._known, self._meet = known, meet
        self._backends = choose(options.backend)
        self._parameters = Parameters(source, list(policies) if by_pattern else None)
        orders = {policy.order for policy in policies.values() if policy}
        self._total_order = orders.pop() if len(orders) == 1 else _EUCLIDEAN
        self._rules = {
            name: None if policy is None else rule_of(policy) for name, policy in policies.items()
        }
        self._check_disjoint = DisjointCheck()
        self._clamping = Clamping(self._backends, options.nonfinite, together=by_pattern)
        self._skips = SkipCounter(options.max_consecutive_skips)
        self._histories = Histories()
        self._recent: deque[Tensor] = deque(maxlen=32)
        self._groups: dict[str, ParameterGroup] | None = None
        self._patterns: list[Pattern] = []
        self._peers: Peers = SingleProcess()
        self._settled = once
        self._warned = False
        self._asked: set[str] = set()
        self.step = 0
        """How many calls there were."""
        self.last: ClipResult | None = None
        """The result of the last call."""
        self._find()

    def clip(
        self,
        grad_scale: float | Tensor | None = None,
        *,
        overflow_expected: bool = False,
        defer_scaling: bool = False,
    ) -> ClipResult:
        """Clip the gradients that exist now; see ``GradientClipper.clip``."""
        peers = self._find()
        sound: Flag | None = None
        while sound is None:  # again where ranks had to agree on placements first
            step = self._collect(grad_scale, peers)
            found = self._measure(step, peers)
            sound, found = self._exchange(step, found, peers)
        norms = [step.unscaled(each.norm) for each in found]
        peers.compare([g.gradients for g in step.groups], norms, self._histories.tensors())

        bounded = [
            each.is_bounded(group.policy, norms_S)
            for group, each, norms_S in zip(step.groups, found, norms, strict=True)
        ]
        writing = [b for group, b in zip(step.groups, bounded, strict=True) if group.policy.writes]
        committed = all_of([sound, *writing])
        decisions = self._decide(step, found, norms, committed)
        unwanted = any_of([as_known(decision.skip) for decision in decisions])
        self._judge(step, bounded, committed, unwanted, decisions, expected=overflow_expected)
        made = self._commit(step, bounded, committed, unwanted, decisions)

        results = [
            self._apply(group, each, norms_S, decision, step, committed, unwanted, defer_scaling)
            for group, each, norms_S, decision in zip(
                step.groups, found, norms, decisions, strict=True
            )
        ]
        self._mark(step)
        self._settled = True
        self.step += 1
        self.last = self._summed_up(step, found, norms, results)
        if is_capturing(step.device):
            self.last.compute()
        if made is not False:
            self._recent.append(self.last.measured_S)
        return self.last

    # find: whose gradients, and on which ranks

    def _find(self) -> Peers:
        """Find who holds the parameters together with this process; anew if they were replaced."""
        groups = self._parameters.groups()
        # Since the engine was made, FSDP1 may have put the same parameters into shards.
        if groups is not self._groups or not (self._settled or not self._peers.is_single):
            options = self.options
            if not (options.partitioned or options.duplicated):
                self._parameters.require_matches()
            self._peers = find_peers(
                self.source,
                groups,
                self._rules,
                options=options.in_words,
                total_order=self._total_order,
                partitioned=options.partitioned,
                duplicated=options.duplicated,
                meet=self._meet,
            )
            self._bind(groups)
        elif any(pattern.is_outdated for pattern in self._patterns):
            self._bind(groups)
        return self._peers

    def _bind(self, groups: dict[str, ParameterGroup]) -> None:
        known = {pattern.name: pattern.known for pattern in self._patterns}
        self._groups = groups
        self._patterns = [
            Pattern(
                policy,
                groups[name],
                self._peers.share(name),
                self._known or known.get(name) or SpecsCache(),
            )
            for name, policy in self.policies.items()
            if policy is not None
        ]

    def _bounded_parameters(self) -> list[Tensor]:
        """Return the parameters that have a policy, in the order that all ranks have."""
        return [tensor for pattern in self._patterns for tensor in pattern.parameters.parameters]

    # collect

    def _collect(self, grad_scale: float | Tensor | None, peers: Peers) -> _Step:
        """Find and check the gradients of every pattern. What fails here fails on every rank."""
        peers.prepare(self._bounded_parameters)
        device, groups = peers.result_device, list[Group]()
        scale: float | Tensor | None = None
        with peers.guarding():
            scale = check_grad_scale(grad_scale)
            collected = [Group.collect(pattern, self._total_order) for pattern in self._patterns]
            self._check(collected)
            devices = {device for group in collected for device in group.gradients.devices}
            for each in devices:
                self._backends.on(each)  # refuses what it cannot serve, before any is written
            device = device or result_device_of(devices or self._parameter_devices())
            if isinstance(scale, Tensor):
                scale = scale.to(device)
            self._prepare_histories(device)
            groups = collected
        assert device is not None
        return _Step(groups, device, scale)

    def _check(self, groups: list[Group]) -> None:
        """Refuse gradients that cannot be clipped together, before any is written."""
        self._check_disjoint([group.gradients for group in groups])
        for group in groups:
            if group.policy.element_limit is not None:
                _check_real(group)
            if group.policy.writes:
                self._role.check(self._marked(group))
        if self._warned or any(group.gradients.tensors for group in groups):
            return
        if any(group.parameters for group in self._parameters.groups().values()):
            self._warned = True
            warn(
                "every gradient is None, so nothing was clipped: clip after backward() and "
                "before zero_grad()"
            )

    def _parameter_devices(self) -> set[torch.device]:
        found = self._parameters.groups().values()
        return {p.device for group in found for p in group.parameters[:1] if not p.is_meta}

    def _prepare_histories(self, device: torch.device) -> None:
        for pattern in self._patterns:
            if pattern.limit is None:
                named = pattern.policy.scope == "group" or pattern.parameters.is_named
                told = pattern.told(device)
                self._histories.prepare(pattern.name, pattern.policy, told, named=named)

    def _marked(self, group: Group) -> list[Tensor]:
        """Return gradients to mark: all at the first call, later one that stands for the rest."""
        tensors = group.gradients.tensors
        return tensors[:1] if self._settled else tensors

    def _mark(self, step: _Step) -> None:
        for group in step.groups:
            if group.policy.writes:
                self._role.mark(self._marked(group), group.policy)

    # measure

    def _measure(self, step: _Step, peers: Peers) -> list[Found]:
        """Read all gradients; clamp them on the way where no host can wait for a verdict."""
        found: list[Found] = []
        with peers.guarding():
            for group in step.groups:
                clamped = None
                if self._clamping.goes_first(step.device):
                    clamped = self._clamping.clamp(group, step.scale, step.device, before=True)
                each = read(group, self._backends, step.device, clamped)
                if not peers.is_single:
                    each = self._clamping.foresee(group, each, step.scale, step.device)
                found.append(each)
        maxima = peers.maximise(_maxima(found))
        with peers.guarding():
            return [
                read_again(group, each, self._backends)
                for group, each in zip(step.groups, _with_maxima(found, maxima), strict=True)
            ]
        return []  # an error, of which the other ranks hear next

    def _exchange(
        self, step: _Step, found: list[Found], peers: Peers
    ) -> tuple[Flag | None, list[Found]]:
        """Replace what this process found by what all ranks found."""
        if peers.is_single:
            return True, found
        local = [
            LocalSums(
                group.gradients,
                {name: sums.sums_SA for name, sums in each.sums.items()},
                {n: sums.maxima_S for n, sums in each.sums.items() if sums.maxima_S is not None},
                each.norm.rows_RA,
                each.tensor_sums_T,
                each.changed,
            )
            for group, each in zip(step.groups, found, strict=True)
        ]
        sound, totals = peers.combine(local, self._step_tag(step))
        if sound is None:
            return None, found
        return sound, [
            replace(
                each.with_sums(
                    {
                        name: replace(
                            sums,
                            sums_SA=total.sums[name],
                            maxima_S=total.maxima.get(name, sums.maxima_S),
                        )
                        for name, sums in each.sums.items()
                    }
                ),
                changed=total.changed,
                nonfinite=total.nonfinite,
                unbounded=total.unbounded,
            )
            for each, total in zip(found, totals, strict=True)
        ]

    def _step_tag(self, step: _Step) -> str:
        """Say at which step this rank stands, if its host knows: on an accelerator it is behind."""
        if flags.host_waits_for(step.device):
            return ""
        scale = step.scale
        known = "" if scale is None or isinstance(scale, Tensor) else f", grad_scale {scale:g}"
        return f"step {self.step}, {self._skips.in_a_row} skips in a row{known}"

    # decide

    def _decide(
        self, step: _Step, found: list[Found], norms: list[Tensor], committed: Flag
    ) -> list[Decision]:
        """Ask each policy, but for those that numbers say completely."""
        decisions = []
        for group, each, norms_S in zip(step.groups, found, norms, strict=True):
            pattern, limit = group.of, group.of.limit
            if limit is None:
                decisions.append(self._ask(step, group, each, norms_S, committed))
            elif pattern.may_skip:
                total = _pattern_norm(step, group, each, norms_S)
                skip = as_known(total > limit.skip_above)
                decisions.append(Decision(limit.threshold, limit.target, skip=skip))
            else:
                assert pattern.decision is not None
                decisions.append(pattern.decision)
        return decisions

    def _ask(
        self, step: _Step, group: Group, found: Found, norms_S: Tensor, committed: Flag
    ) -> Decision:
        pattern = group.of
        seen = Measurement(
            norms_S=norms_S,
            total_norm=_pattern_norm(step, group, found, norms_S),
            committed=as_flag(committed, norms_S.device),
            step=self._histories.step,
            weight_norms_S=None if found.weights is None else found.weights.norms(),
        )
        state = self._histories.of(pattern.name)
        if pattern.name not in self._asked:
            if not self._peers.is_single:
                check_skip_is_shared(pattern.policy, seen, state)
            decision = pattern.policy.decide(seen, state)
            check_decision(pattern.policy, decision, norms_S)
            self._asked.add(pattern.name)
        else:
            decision = pattern.policy.decide(seen, state)
        self._histories.check(pattern.name, pattern.policy, decision.state)
        return decision

    def _judge(
        self,
        step: _Step,
        bounded: list[Flag],
        committed: Flag,
        unwanted: Flag,
        decisions: list[Decision],
        *,
        expected: bool,
    ) -> None:
        """Raise where errors are due; count a skipped step.

        The verdicts are those of all ranks, so what one raises, all raise.
        """
        nonfinite = self.options.nonfinite
        if nonfinite == "raise" and not all(map(bool, bounded)):
            raise nonfinite_error(self._report(step, decisions))
        if nonfinite != "skip" and not any(pattern.may_skip for pattern in self._patterns):
            return
        skipped = any_of([negated(committed), unwanted]) if nonfinite == "skip" else unwanted
        if self._skips.record(skipped, unwanted, expected=expected):
            finite = committed is True and unwanted is not False
            report = skip_report(self.step) if finite else self._report(step, decisions)
            raise too_many_skips(report, self._skips.limit)

    def _report(self, step: _Step, decisions: list[Decision]) -> str:
        recent = [float(combine(norms_S, self._total_order)) for norms_S in self._recent]
        mine = Faults.of([group.gradients for group in step.groups], self._peers.rank)
        policy, threshold = step.groups[0].policy, decisions[0].thresholds
        return nonfinite_report(
            self._peers.gather(mine),
            norm_type=policy.order,
            step=self.step,
            last_norms=[norm for norm in recent if isfinite(norm)][-4:],
            limit=policy.element_limit if policy.element_limit is not None else threshold,
        )

    def _commit(
        self,
        step: _Step,
        bounded: list[Flag],
        committed: Flag,
        unwanted: Flag,
        decisions: list[Decision],
    ) -> Flag:
        """Write the histories where the step is made; return whether it is."""
        made = all_of([committed, negated(unwanted)])
        new = {
            # What only measures does not forbid a step, and its history sees no NaN either.
            group.of.name: (
                decision.state,
                made if group.policy.writes else all_of([made, each]),
            )
            for group, each, decision in zip(step.groups, bounded, decisions, strict=True)
            if group.of.limit is None
        }
        self._histories.commit(new, made)
        return made

    # apply

    def _apply(
        self,
        group: Group,
        found: Found,
        norms_S: Tensor,
        decision: Decision,
        step: _Step,
        committed: Flag,
        unwanted: Flag,
        defer_scaling: bool,
    ) -> ClipResult:
        """Scale or clamp the gradients of a pattern, and say what was done."""
        policy, skips = group.policy, self.options.nonfinite == "skip"
        dtype, guard = self._peers.precision(group.gradients)
        to_zero = not self._by_pattern and _is_zero(decision.targets, policy.element_limit)
        coefficients = Coefficients(
            self._backends,
            norms_S,
            decision,
            committed,
            unwanted if policy.writes else False,
            guard=guard,
            skipped_coefficient=0.0 if (skips or to_zero) and policy.writes else 1.0,
        )
        thresholds, clamped, left_S = decision.thresholds, None, None
        if policy.element_limit is not None:
            thresholds = policy.element_limit
            clamped, left_S = self._clamping.finish(
                group, found, norms_S, step.scale, bounded=committed, unwanted=unwanted
            )
        deferred = defer_scaling and self._can_defer(group, coefficients, dtype)
        if policy.writes and not deferred:
            scale_gradients(self._backends, group.gradients, coefficients, group.rows)
        withheld: Flag = False
        if policy.writes:
            withheld = any_of([negated(committed), unwanted]) if skips else unwanted
        return ClipResult(
            measured_S=norms_S,
            thresholds=thresholds,
            coefficients=coefficients,
            withheld=withheld,
            tensor_sums_T=found.tensor_sums_T,
            norm_type=policy.order,
            dtype=dtype,
            scopes=group.of.scope_names,
            clamped=clamped,
            left_S=left_S,
            nonfinite_on_ranks=found.nonfinite,
            deferred=deferred,
            policy_may_skip=any(pattern.may_skip for pattern in self._patterns),
        )

    def _can_defer(self, group: Group, coefficients: Coefficients, dtype: torch.dtype) -> bool:
        """Return whether an optimizer's scale, in float32, can have the one coefficient in it."""
        if self._by_pattern or group.policy.scope != "group" or dtype is not torch.float32:
            return False
        if group.policy.element_limit is not None:
            return False
        return coefficients.number is None or not 0 < coefficients.number < _COARSE

    def _summed_up(
        self, step: _Step, found: list[Found], norms: list[Tensor], results: list[ClipResult]
    ) -> ClipResult:
        """Return one result over those of all patterns."""
        if not self._by_pattern:
            return results[0]
        totals = [
            norms_S if each.total is each.norm else step.unscaled(each.total)
            for each, norms_S in zip(found, norms, strict=True)
        ]
        on_ranks = [each.nonfinite for each in found if each.nonfinite is not None]
        names = [group.of.name for group in step.groups]
        return over_all(
            dict(zip(names, results, strict=True)),
            totals,
            self._total_order,
            torch.stack(on_ranks).sum() if on_ranks else None,
        )

    # state

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on: numbers, strings and tensors."""
        steps, histories = self._histories.saved()
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "committed_steps": steps,
            "consecutive_skips": self._skips.in_a_row,
            "clip_modes": {
                pattern: None if policy is None else policy.clip_mode
                for pattern, policy in self.policies.items()
            },
            "states": histories,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; see ``GradientClipper.load_state_dict``."""
        saved = read_state(state, self.state_dict())
        self.step, self._skips.in_a_row = saved.step, saved.consecutive_skips
        self._histories.load(saved.committed_steps, saved.histories)


def _maxima(found: list[Found]) -> list[Tensor]:
    """Return the maxima of norms that are read twice, in the order in which ranks expect them."""
    return [
        sums.maxima_S
        for each in found
        for name, sums in each.sums.items()
        if name != "left" and reads_twice(sums.order) and sums.maxima_S is not None
    ]


def _with_maxima(found: list[Found], maxima: Sequence[Tensor]) -> list[Found]:
    """Put the maxima of all ranks in the place of those of this one."""
    if not maxima:
        return found
    rest = iter(maxima)
    return [
        each.with_sums(
            {
                name: replace(sums, maxima_S=next(rest))
                if name != "left" and reads_twice(sums.order)
                else sums
                for name, sums in each.sums.items()
            }
        )
        for each in found
    ]


def _pattern_norm(step: _Step, group: Group, found: Found, norms_S: Tensor) -> Tensor:
    """Return the norm of all parameters of a pattern, on all ranks: 0-d."""
    if found.pattern_norm is not None:
        return step.unscaled(found.pattern_norm)[0]
    return combine(norms_S, group.policy.order)


def _check_real(group: Group) -> None:
    if not group.gradients.has_complex:
        return
    for name, tensor in zip(group.gradients.names, group.gradients.tensors, strict=True):
        if tensor.is_complex():
            raise UnsupportedGradientError(
                f"the gradient of {name} is {tensor.dtype}, and complex numbers have no "
                "order to clamp by: use NormClip for it. No gradient was changed."
            )


def _is_zero(target: float | Tensor, element_limit: float | None) -> bool:
    limit = target if element_limit is None else element_limit
    return not isinstance(limit, Tensor) and limit == 0
