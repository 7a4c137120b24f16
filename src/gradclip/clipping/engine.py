"""The engine: collect, measure, decide, apply. What varies between its users is given to it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from gradclip.clipping import flags
from gradclip.clipping.apply.clamping import Clamping
from gradclip.clipping.apply.coefficients import Coefficients
from gradclip.clipping.apply.scaling import scaling
from gradclip.clipping.arguments import Options, check_grad_scale
from gradclip.clipping.collect.gradients import warn_of_none
from gradclip.clipping.collect.overlap import DisjointCheck
from gradclip.clipping.collect.pending import require_reduced
from gradclip.clipping.collect.sources import ParameterSource
from gradclip.clipping.flags import Flag, all_of, any_of, as_flag, as_known, negated
from gradclip.clipping.kernels import SpecsCache, Write, carry_out, choose
from gradclip.clipping.kernels.device import is_capturing, result_device_of
from gradclip.clipping.measure.binding import Binding
from gradclip.clipping.measure.exchange import exchange_maxima, exchange_sums
from gradclip.clipping.measure.group import Found, Group, read, read_again, tensor_sums
from gradclip.clipping.measure.step import Measured, Step, is_small
from gradclip.clipping.policies import (
    Decision,
    Division,
    Policy,
    as_given,
    as_policies,
)
from gradclip.clipping.policies.checks import check_decision, check_skips, decide_by_shared
from gradclip.clipping.ranks import telling_others
from gradclip.clipping.ranks.peers import Peers
from gradclip.clipping.result import ClipResult, over_all
from gradclip.clipping.saved import STATE_VERSION, read_state
from gradclip.clipping.short import ShortWays
from gradclip.clipping.state import Histories
from gradclip.clipping.step.judge import Decided, Judge
from gradclip.clipping.step.made import MadeSteps
from gradclip.clipping.step.ownership import Owner, Role
from gradclip.clipping.step.recorder import recorder_of
from gradclip.clipping.step.rows import StepLog

if TYPE_CHECKING:
    from gradclip.clipping.ranks import Meet


class Engine:
    """Bounds the gradients of a source of parameters.

    Args:
        source: Where parameters and gradients come from.
        policies: What bounds them, by name pattern; None leaves a pattern alone.
        options: The checked keywords.
        role: Whether this is a guest or an owner, for others that clip the same gradients.
        division: What has a policy of its own; where that is all parameters there is one result.
        once: Whether this engine serves one call, so that nothing changes before it.
        known: Recognises gradients, for all engines that share it; None for one per pattern.
        meet: Finds the ranks of parameters; None to agree with them anew.
        called: What clips, as its user knows it; None for a function.
    """

    def __init__(
        self,
        source: ParameterSource,
        policies: Mapping[str, Policy | None],
        options: Options,
        role: Role,
        *,
        division: Division = "whole",
        once: bool = False,
        known: SpecsCache | None = None,
        meet: "Meet | None" = None,
        called: str | None = None,
    ) -> None:
        check_skips(policies.values(), options.max_consecutive_skips)
        self.source, self.policies = source, policies
        self._role, self._division, self._by_pattern = role, division, division != "whole"
        self._backends = choose(options.backend)
        self._binding = Binding(
            source, policies, options, division=division, known=known, meet=meet
        )
        self._check_disjoint = DisjointCheck()
        self._skips, raises = (options.nonfinite == each for each in ("skip", "raise"))
        self._clamping = Clamping(
            self._backends, skips=self._skips, raises=raises, together=self._by_pattern
        )
        owned = isinstance(role, Owner)
        self._judge = Judge(options, self._binding, called=called, owned=owned)
        self.step_log = StepLog(called or "gradclip", owned=owned, lasts=not once)
        self.recorder = recorder_of(self, options.folder, called, source)
        self._histories = Histories()
        self._made = MadeSteps(self.step_log, self._histories)
        self._short = None
        if not once:
            parts = self._binding, policies, options, self._backends, role, self._judge
            self._short = ShortWays(*parts, by_pattern=self._by_pattern)
        self._settled, self._warned = once, False
        self._asked: set[str] = set()
        self._assigned: str | None = None
        self.step, self.last = 0, cast("ClipResult | None", None)
        """How many calls there were, and the result of the last."""
        self._binding.find(anew=True)

    @property
    def policy(self) -> object:
        """What bounds gradients, in the form in which it is given."""
        return as_given(self.policies, self._division)

    def admit(self, value: object) -> dict[str, Policy | None]:
        """Return policies that may be assigned; refuse others, before anything is changed."""
        policies, division = as_policies(value)
        self.step_log.require_uncaptured(value)
        check_skips(policies.values(), self._judge.skips.limit)
        self._binding.check_change(policies, division)
        self._role.admit(value)
        return policies

    def assign(self, value: object) -> None:
        """Clip by another policy from the next step on; see ``GradientClipper.policy``."""
        policies = self.admit(value)
        self._histories.follow(self.policies, policies)
        self._binding.change(policies)
        self._made.change(self.policies, policies)
        self.policies = policies
        self._asked.clear()
        if self._short is not None:
            self._short.assign(policies)
        now = self.policy
        self._assigned = repr(dict(now) if isinstance(now, Mapping) else now)

    def clip(
        self,
        grad_scale: float | Tensor | None = None,
        *,
        overflow_expected: bool = False,
        defer_scaling: bool = False,
    ) -> ClipResult:
        """Clip the gradients that exist now; see ``GradientClipper.clip``."""
        last = None
        if self._settled and self._short is not None and self.recorder.is_open:
            last = self._short.clip(
                grad_scale, self.step, expected=overflow_expected, defer=defer_scaling
            )
        if last is None:
            with torch.no_grad(), self.recorder.watching(self.step):
                last = self._clip(grad_scale, expected=overflow_expected, defer=defer_scaling)
        if self._assigned is not None:
            vars(last)["new_policy"], self._assigned = self._assigned, None
        self.step, self.last = self.step + 1, last
        self.step_log.push(last, self.step - 1, overflow_expected, grad_scale is not None)
        if self.recorder.asks:
            at = self.step - 1, self._binding.patterns
            self.recorder.push(last, *at, overflow_expected, grad_scale)
        return last

    def _clip(
        self, grad_scale: float | Tensor | None, *, expected: bool, defer: bool
    ) -> ClipResult:
        peers = self._find_peers()
        sound: Flag | None = None
        while sound is None:  # again where ranks had to agree first
            step = self._collect(grad_scale, peers)
            found = self._measure(step, peers)
            sound = True
            if not peers.is_single:
                sound, found = exchange_sums(peers, step.groups, found, step.tag)
            if peers.look_again:
                with telling_others():
                    peers = self._binding.find_again(awaited=True)
        try:
            with peers.owing(self.step):
                return self._finish(step, found, sound, peers, expected=expected, defer=defer)
        except Exception:
            self.step += peers.owes  # as on the ranks that made it
            raise

    def _finish(
        self,
        step: Step,
        found: list[Found],
        sound: Flag,
        peers: Peers,
        *,
        expected: bool,
        defer: bool,
    ) -> ClipResult:
        """Decide, judge and write. What fails here on one rank, others hear at their next call."""
        norms = [step.unscaled(each.norm) for each in found]
        if not peers.is_single:
            gradients = [group.gradients for group in step.groups]
            peers.compare(gradients, norms, [f.nonfinite for f in found], self._histories.tensors())

        decided = self._decide_together(step, found, norms, sound, peers)
        self._judge.judge(
            step.groups,
            found,
            decided,
            overflow_expected=expected,
            may_skip=self._binding.may_skip,
            peers=peers,
            step=self.step,
        )

        writes: list[Write] = []
        results = []
        for number in range(len(norms)):
            result, more = self._apply(
                step, decided, number, found[number], norms[number], defer=defer
            )
            results.append(result)
            writes += more
        last = self._summed_up(step, found, norms, results)
        if is_capturing(step.device):
            last.compute()
        if self._binding.asks:
            self._commit(step, decided)
        # Nothing was written so far (but what an accelerator clamped while it measured), and from
        # here on nothing but a device can fail.
        carry_out(writes)
        writing = [group for group in step.groups if group.of.writes]
        self._role.mark([(group.gradients.tensors, group.policy) for group in writing])
        self._settled = True
        if self._short is not None:
            self._short.follow(step.device)
        if decided.made is not False:
            self._judge.remember(last.measured_S)
        return last

    # collect

    def _find_peers(self) -> Peers:
        """Find the processes that hold the parameters; what fails here, those of before hear."""
        known = self._binding.peers
        with telling_others() if known.is_single else known.guarding():
            # Since the engine was made, FSDP1 may have put the same parameters into shards.
            peers = self._binding.find(anew=not self._settled)
            if not self.recorder.is_open:
                self.recorder.open(self.step, self._binding.patterns, self.policies)
            return peers
        return known

    def _collect(self, grad_scale: float | Tensor | None, peers: Peers) -> Step:
        """Find and check the gradients of every pattern. What fails here fails on every rank."""
        peers.prepare(self._binding.bounded)
        device, groups = peers.result_device, list[Group]()
        scale: float | Tensor | None = None
        tag = ""
        with peers.guarding():
            peers.check()
            scale = check_grad_scale(grad_scale)
            total_order = self._binding.total_order
            collected = [Group.collect(p, total_order) for p in self._binding.patterns]
            self._check(collected)
            devices = {device for group in collected for device in group.gradients.devices}
            for each in devices:
                self._backends.on(each)  # refuses what it cannot serve, before any is written
            if device is None:
                known = {p.device for p in self._binding.every() if not p.is_meta}
                device = result_device_of(devices or known)
            if isinstance(scale, Tensor):
                scale = scale.to(device)
            if self._binding.asks:
                self._prepare_histories(device)
            if not peers.is_single:
                tag = self._step_tag(device, scale)
            groups = collected
        assert device is not None
        doubles = any(peers.precision(g.gradients)[0] is torch.float64 for g in groups)
        return Step(groups, device, scale, tag, wide=doubles or is_small(scale))

    def _check(self, groups: list[Group]) -> None:
        """Refuse gradients that cannot be clipped together, before any is written."""
        self._check_disjoint([group.gradients for group in groups], self._binding.left_alone())
        for group in groups:
            if group.of.element_limit is not None:
                group.gradients.require_real()
            if group.of.writes:
                self._role.check(group.gradients.tensors)
        has_gradients = any(group.gradients.tensors for group in groups)
        require_reduced(self._binding.bounded, has_gradients=has_gradients)
        if not (self._warned or has_gradients) and self._binding.every():
            self._warned = True
            warn_of_none()

    def _prepare_histories(self, device: torch.device) -> None:
        for pattern in self._binding.patterns:
            if pattern.limit is None:
                named = pattern.policy.scope == "group" or pattern.parameters.is_named
                told = pattern.told(device)
                held = pattern.parameters.parameters
                self._histories.prepare(pattern.name, pattern.policy, told, named=named, held=held)

    # measure

    def _measure(self, step: Step, peers: Peers) -> list[Found]:
        """Read all gradients; clamp them on the way where the host waits for no verdict."""
        found: list[Found] = []
        with peers.guarding():
            for group in step.groups:
                clamped = self._clamping.read(group, step.scale, step.device)
                each = read(group, self._backends, step.device, clamped, self.recorder.asks)
                if not peers.is_single:
                    each = self._clamping.foresee(group, each, step.scale, step.device)
                found.append(each)
        if not self._binding.reads_twice:
            return found
        found = exchange_maxima(peers, found)
        with peers.guarding():
            return [
                read_again(group, each, self._backends)
                for group, each in zip(step.groups, found, strict=True)
            ]
        return []  # an error, of which the other ranks hear next

    def _step_tag(self, device: torch.device, scale: float | Tensor | None) -> str:
        """Say at which step this rank stands, as far as its host knows without waiting."""
        known = "" if scale is None or isinstance(scale, Tensor) else f"grad_scale {scale:.17g}"
        if flags.host_waits_for(device):
            return known
        made = f", {self._histories.steps} steps made" if self._binding.asks else ""
        known = known and f", {known}"
        return f"step {self.step}, {self._judge.skips.in_a_row} skips in a row{made}{known}"

    # decide

    def _decide_together(
        self, step: Step, found: list[Found], norms: list[Tensor], sound: Flag, peers: Peers
    ) -> Decided:
        """Decide, and tell other ranks where a policy that is asked fails on this one alone."""
        if peers.is_single or not self._binding.asks:
            return self._decide(step, found, norms, sound)
        decided = Decided([], [], committed=False, unwanted=False, made=False)
        with peers.guarding():
            decided = self._decide(step, found, norms, sound)
        sure = peers.confirm()
        return replace(
            decided,
            committed=all_of([decided.committed, sure]),
            made=all_of([decided.made, sure]),
        )

    def _decide(self, step: Step, found: list[Found], norms: list[Tensor], sound: Flag) -> Decided:
        """Ask each policy, but for those that numbers say completely."""
        bounded = [
            each.is_bounded(group.of, norms_S)
            for group, each, norms_S in zip(step.groups, found, norms, strict=True)
        ]
        # What only measures forbids no step.
        writing = [b for group, b in zip(step.groups, bounded, strict=True) if group.of.writes]
        committed = all_of([sound, *writing])
        decisions = []
        for group, each, norms_S in zip(step.groups, found, norms, strict=True):
            decision, limit = group.of.decision, group.of.limit
            if limit is not None and group.of.may_skip:
                skip = step.pattern_norm(group, each, norms_S) > limit.skip_above
                decision = Decision(limit.threshold, limit.target, skip=skip)
            elif decision is None:
                decision = self._ask(step, group, each, norms_S, committed)
            decisions.append(decision)
        unwanted: Flag = False
        if self._binding.may_skip:
            pairs = zip(step.groups, decisions, strict=True)
            unwanted = any_of([as_known(each.skip) for group, each in pairs if group.of.writes])
        made = all_of([committed, negated(unwanted)])
        return Decided(decisions, bounded, committed, unwanted, made)

    def _ask(
        self, step: Step, group: Group, found: Found, norms_S: Tensor, committed: Flag
    ) -> Decision:
        pattern = group.of
        # Copies: what a policy writes into them by mistake is not what was measured.
        seen = Measured(
            self._histories,
            partial(step.pattern_norm, group, found, norms_S),
            norms_S=norms_S.clone(),
            committed=as_flag(committed, norms_S.device).clone(),
            weight_norms_S=None if found.weights is None else found.weights.norms(),
        )
        state = self._histories.of(pattern.name)
        if pattern.name in self._asked or self._binding.peers.is_single:
            decision = pattern.policy.decide(seen, state)
        else:
            decision = decide_by_shared(pattern.policy, seen, state)
            self._asked.add(pattern.name)
        check_decision(pattern.policy, decision, norms_S)
        self._histories.check(pattern.name, pattern.policy, decision.state)
        return decision

    def _commit(self, step: Step, decided: Decided) -> None:
        """Write what policies remember, where the step is made."""
        asked = all_of([decided.committed, decided.unwanted])
        self._histories.commit(decided.histories(step.groups), decided.made, asked)

    # apply

    def _apply(
        self,
        step: Step,
        decided: Decided,
        number: int,
        found: Found,
        norms_S: Tensor,
        *,
        defer: bool,
    ) -> tuple[ClipResult, list[Write]]:
        """Say what is done to the gradients of a pattern, and prepare to do it."""
        group, decision = step.groups[number], decided.decisions[number]
        pattern, committed, unwanted = group.of, decided.committed, decided.unwanted
        dtype, guard = self._binding.peers.precision(group.gradients)
        zeroes = self._skips or (not self._by_pattern and pattern.zeroes(decision))
        coefficients = Coefficients(
            self._backends,
            norms_S,
            decision,
            committed,
            unwanted if pattern.writes else False,
            guard=guard,
            skipped_coefficient=0.0 if zeroes and pattern.writes else 1.0,
            reduced=partial(found.norm.reduced, step.scale) if step.wide else None,
        )
        thresholds, clamped, left_S = decision.thresholds, None, None
        writes: list[Write] = []
        if pattern.element_limit is not None:
            thresholds = pattern.element_limit
            finish = self._clamping.finish(
                group, found, norms_S, step.scale, bounded=committed, unwanted=unwanted
            )
            clamped, left_S, writes = finish.changed, finish.left_S, finish.writes
        whole = pattern.policy.scope == "group" and pattern.element_limit is None
        able = whole and dtype is torch.float32 and coefficients.may_be_deferred
        deferred = defer and able and not self._by_pattern
        if pattern.writes and not deferred:
            writes += scaling(self._backends, group.gradients, coefficients, group.rows)
            left_S = coefficients.left_S if left_S is None else left_S
        withheld: Flag = False
        if pattern.writes:
            withheld = negated(decided.made) if self._skips else unwanted
        result = ClipResult(
            measured_S=norms_S,
            thresholds=thresholds,
            coefficients=coefficients,
            withheld=withheld,
            tensor_sums_T=found.tensor_sums_T,
            norm_type=pattern.order,
            dtype=dtype,
            scopes=pattern.scope_names,
            clamped=clamped,
            left_S=left_S,
            nonfinite_on_ranks=found.nonfinite,
            deferred=deferred,
            by_policy=all_of([committed, unwanted]),
        )
        vars(result)["tensors"] = tensor_sums(group, found) if self.recorder.asks else None
        return result, writes

    def _summed_up(
        self, step: Step, found: list[Found], norms: list[Tensor], results: list[ClipResult]
    ) -> ClipResult:
        """Return one result over those of all patterns."""
        if not self._by_pattern:
            return results[0]
        on_ranks = [each.nonfinite for each in found if each.nonfinite is not None]
        everywhere = torch.stack(on_ranks).sum() if on_ranks else None
        named = dict(zip([group.of.name for group in step.groups], results, strict=True))
        return over_all(named, step.totals(found, norms), self._binding.total_order, everywhere)

    # state

    def take_back(self) -> None:
        """Take the last call back; see ``GradientClipper.take_back``."""
        self._histories.take_back()

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on: numbers, strings and tensors."""
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "committed_steps": self._made.of(self.policies),
            "consecutive_skips": self._judge.skips.in_a_row,
            "policy_skips": self._histories.skips_in_a_row,
            "clip_modes": {
                pattern: None if policy is None else policy.clip_mode
                for pattern, policy in self.policies.items()
            },
            "states": self._histories.saved(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; see ``GradientClipper.load_state_dict``."""
        saved = read_state(state, self.state_dict())
        self._binding.peers.forget()
        self.recorder.resume()
        self.step, self._judge.skips.in_a_row = saved.step, saved.consecutive_skips
        self._made.go_on(saved.committed_steps)
        self._histories.load(saved.committed_steps, saved.policy_skips, saved.histories)
