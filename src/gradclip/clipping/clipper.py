"""The object that clips: collect, measure and reduce, decide, apply."""

import warnings
from collections import deque
from collections.abc import Iterable, Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from gradclip.clipping.apply import scaling
from gradclip.clipping.apply.clamping import Clamping
from gradclip.clipping.apply.coefficients import Flag, Response, all_of, as_flag, host_waits_for
from gradclip.clipping.arguments import (
    Nonfinite,
    check_count,
    check_grad_scale,
    check_nonfinite,
)
from gradclip.clipping.collect.gradients import collect
from gradclip.clipping.collect.overlap import DisjointCheck
from gradclip.clipping.collect.parameters import (
    OptimizerParameters,
    ParameterGroup,
    Parameters,
    ParameterSource,
    as_source,
)
from gradclip.clipping.kernels import LayoutCache, choose
from gradclip.clipping.kernels.blocks import home_of
from gradclip.clipping.kernels.device import callers_level, untraced
from gradclip.clipping.kernels.tables import is_capturing
from gradclip.clipping.measure.group import Group
from gradclip.clipping.measure.norm import Measured, combine
from gradclip.clipping.policies import Policy, PolicyLike, any_writes, as_policies
from gradclip.clipping.ranks import may_be_shared
from gradclip.clipping.ranks.peers import Alone, Peers
from gradclip.clipping.result import ClipResult, over_all
from gradclip.clipping.state import STATE_VERSION, check_history, read_state
from gradclip.clipping.step.marks import leave
from gradclip.clipping.step.nonfinite import (
    Faults,
    SkipCounter,
    nonfinite_error,
    nonfinite_report,
    too_many_skips,
)
from gradclip.clipping.step.ownership import check_unowned
from gradclip.errors import UnsupportedGradientError

if TYPE_CHECKING:
    from gradclip.clipping.ranks.dimension import GroupLike
    from gradclip.clipping.ranks.rendezvous import Meeting
    from gradclip.clipping.ranks.share import Share

ParametersLike: TypeAlias = (
    nn.Module
    | torch.optim.Optimizer
    | Tensor
    | Iterable[Tensor]
    | Iterable[tuple[str, Tensor]]
    | ParameterSource
)

_EUCLIDEAN = 2.0


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
            nothing, also where gradients are only measured (reads one number per step);
            "propagate" reports the non-finite norm and changes nothing.
        max_consecutive_skips: Skipped steps in a row that are tolerated.
        partitioned: Process groups by name pattern, for parameters of which each rank of the group
            has different ones: ``{"*": pp_group}`` for the stages of a pipeline, ``{"experts.*":
            ep_group}`` for experts placed by hand. What DTensor and FSDP split tells itself.
            A value is a process group, a ``DeviceMesh``, several of these, or None on ranks that
            are in none.
        duplicated: Likewise, for a parameter of which several ranks among those have a copy, as
            stages have that tie weights: it is counted once.
        backend: "auto" (the fastest of each device), "foreach", "triton" (CUDA), or "reference"
            (float64, slow, for comparison).

    Raises:
        ArgumentTypeError: GC011, for an argument of the wrong kind.
        ArgumentValueError: GC010, for one out of range, patterns that do not fit the names, or
            ranks that give different arguments.
        DoubleClippingError: GC101, for an optimizer that an attachment clips.

    Note:
        Where ranks hold parameters together, making a clipper and each ``clip`` are collective:
        every rank does it, at the same step, whatever gradients it has.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> GradientClipper([weight], 1.0).clip()
    ClipResult(norm_pre=5, norm_post=1, threshold=1, coefficient=0.2, \
clipped=True, skipped=False, nonfinite=0)
    """

    _called = "a GradientClipper"

    def __init__(
        self,
        params: ParametersLike,
        policy: PolicyLike | Mapping[str, PolicyLike | None],
        *,
        nonfinite: Nonfinite = "skip",
        max_consecutive_skips: int = 25,
        partitioned: "Mapping[str, GroupLike] | None" = None,
        duplicated: "Mapping[str, GroupLike] | None" = None,
        backend: str = "auto",
    ) -> None:
        self._policies, by_pattern = as_policies(policy)
        self._nonfinite = check_nonfinite(nonfinite)
        self._skips = SkipCounter(check_count(max_consecutive_skips))
        self._backends = choose(backend)
        self._source = as_source(params)
        self._check_owner()
        self._parameters = Parameters(self._source, list(self._policies) if by_pattern else None)
        self._by_pattern = by_pattern
        orders = {policy.order for policy in self._policies.values() if policy}
        self._order = orders.pop() if len(orders) == 1 else _EUCLIDEAN
        self._partitioned, self._duplicated = partitioned, duplicated
        self._met: dict[str, ParameterGroup] | None = None
        self._settled = False
        self._peers: Peers = Alone()
        self._states: dict[str, dict[str, Tensor]] = {}
        self._loaded: set[str] = set()
        self._recent: deque[Tensor] = deque(maxlen=32)
        self._known: dict[str, LayoutCache] = {}
        self._check_disjoint = DisjointCheck()
        self._clamping = Clamping(self._backends, self._nonfinite, together=by_pattern)
        self._warned = False
        self.step = 0
        """How many calls there were."""
        self.last: ClipResult | None = None
        """The result of the last call."""
        self._meet()

    @untraced
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
            ArgumentValueError: GC010, for gradients on a device that the backend cannot serve.
            CaptureError: GC022, inside a CUDA graph that is captured before the first steps.
            NonFiniteGradientError: GC201, with ``nonfinite="raise"``.
            RankError: GC210, if another rank could not clip.
            ReplicaError: GC211, if gradients that ranks should hold alike differ.
            CollectiveError: GC212, if another rank is gone.
            TooManySkipsError: GC202, after ``max_consecutive_skips``; on an accelerator four steps
                later.

        All are raised before any gradient is changed, but for the last on an accelerator.
        """
        self._check_owner()
        with torch.no_grad():
            return self._clip(grad_scale, overflow_expected=overflow_expected)

    def _clip(self, grad_scale: float | Tensor | None, *, overflow_expected: bool) -> ClipResult:
        peers = self._meet()
        sound: Flag | None = None
        while sound is None:  # again where ranks had to agree on placements first
            groups, home, scale = self._measure(grad_scale, peers)
            sound = peers.combine(groups, "" if peers.is_alone else self._moment(scale, home))
        peers.compare(groups, self._states)

        measured = [group.measured(group.norm, scale) for group in groups]
        totals = [
            norms if group.total is group.norm else group.measured(group.total, scale)
            for group, norms in zip(groups, measured, strict=True)
        ]
        counts = self._judge(groups, measured, sound, overflow_expected=overflow_expected)

        responses = [
            self._decide(group, norms, counts)
            for group, norms in zip(groups, measured, strict=True)
        ]
        results = [
            self._apply(group, norms, response, scale)
            for group, norms, response in zip(groups, measured, responses, strict=True)
        ]
        self._leave_traces(groups)
        self._settled = True
        self.step += 1
        self.last = results[0]  # there is just one
        if self._by_pattern:
            found = None if peers.is_alone else torch.stack([r.nonfinite for r in results]).sum()
            patterns = [group.pattern for group in groups]
            self.last = over_all(dict(zip(patterns, results, strict=True)), totals, found)
        if is_capturing(home):
            self.last.compute()
        if counts is not False:
            self._recent.append(self.last.measured_S)
        return self.last

    def _check_owner(self) -> None:
        """Refuse to clip what an attachment clips before every step; to measure it is fine."""
        if isinstance(self._source, OptimizerParameters) and any_writes(self._policies):
            check_unowned(self._source.optimizer, self, "this GradientClipper")

    def _leave_traces(self, groups: list[Group]) -> None:
        """Let those find out who clip before every step, and cannot know of this clipper."""
        for group in groups:
            if group.policy.writes:
                leave(self._telling(group), self._called, group.policy)

    def _telling(self, group: Group) -> list[Tensor]:
        """Return gradients to tell others of: all at the first call, later one for the rest."""
        tensors = group.gradients.tensors
        return tensors[:1] if self._settled else tensors

    # collect

    def _meet(self) -> Peers:
        """Find who holds the parameters together with this process; anew if they were replaced."""
        groups = self._parameters.groups()
        if groups is not self._met:
            self._peers = self._peers_of(groups)
            self._met = groups
        elif not self._settled and self._peers.is_alone:
            # Since the clipper was made, FSDP1 may have put the same parameters into shards.
            self._peers = self._peers_of(groups)
        return self._peers

    def _measure(
        self, grad_scale: float | Tensor | None, peers: Peers
    ) -> tuple[list[Group], torch.device, float | Tensor | None]:
        """Collect the gradients, and read them; what fails here alone, fails everywhere."""
        peers.prepare(self._bounded)
        groups: list[Group] = []
        home = peers.home(groups)
        scale = None
        with peers.guarding():
            scale = check_grad_scale(grad_scale)
            groups = self._collect(peers)
            home = home or self._home(groups)
            for device in {device for group in groups for device in group.gradients.devices}:
                self._backends.on(device)  # refuses what it cannot serve, before any is written
            if isinstance(scale, Tensor):
                scale = scale.to(home)
            self._read(groups, scale, home, peers)
        peers.maximise(groups)
        with peers.guarding():
            for group in groups:
                group.read_again(self._backends)
        assert home is not None
        return groups, home, scale

    def _moment(self, scale: float | Tensor | None, home: torch.device) -> str:
        """Say where this rank stands, if its host knows: on an accelerator it is behind."""
        if host_waits_for(home):
            return ""
        known = "" if scale is None or isinstance(scale, Tensor) else f", grad_scale {scale:g}"
        return f"step {self.step}, {self._skips.in_a_row} skips in a row{known}"

    def _bounded(self) -> list[Tensor]:
        """Return the parameters that have a policy, in the order that all ranks have."""
        groups = self._parameters.groups()
        bounded = [group for pattern, group in groups.items() if self._policies[pattern]]
        return [parameter for group in bounded for parameter in group.parameters]

    def _peers_of(self, groups: dict[str, ParameterGroup]) -> Peers:
        declared = bool(self._partitioned or self._duplicated)
        if not declared:
            self._parameters.require_matches()
        if not (declared or may_be_shared(self._bounded())):
            return Alone()
        # Slow to import, and not for one process.
        from gradclip.clipping.ranks.rendezvous import Meeting  # noqa: PLC0415
        from gradclip.clipping.ranks.topology import Declared  # noqa: PLC0415

        meeting = Meeting(
            self._source,
            self._policies,
            f"nonfinite={self._nonfinite!r}, max_consecutive_skips={self._skips.limit}",
            self._order,
            Declared("partitioned", self._partitioned),
            Declared("duplicated", self._duplicated),
        )
        return self._ranks_of(meeting, groups)

    def _ranks_of(self, meeting: "Meeting", groups: dict[str, ParameterGroup]) -> Peers:
        """Agree with the ranks that hold the parameters together."""
        return meeting.ranks(groups)

    def _collect(self, peers: Peers) -> list[Group]:
        """Find and check the gradients of every group that has a policy."""
        groups = []
        for pattern, parameters in self._parameters.groups().items():
            policy = self._policies[pattern]
            if policy is not None:
                groups.append(self._collect_group(parameters, policy, peers.share(pattern)))
        self._check_disjoint([group.gradients for group in groups])
        self._warn_if_none(groups)
        return groups

    def _collect_group(
        self, parameters: ParameterGroup, policy: Policy, share: "Share | None"
    ) -> Group:
        pattern = parameters.pattern
        if pattern not in self._known:
            self._known[pattern] = self._layouts(policy)
        gradients = collect(parameters, self._known[pattern])
        if policy.element_limit is not None and gradients.has_complex:
            for name, tensor in zip(gradients.names, gradients.tensors, strict=True):
                if tensor.is_complex():
                    raise UnsupportedGradientError(
                        f"the gradient of {name} is {tensor.dtype}, and complex numbers have no "
                        "order to clamp by: use NormClip for it. No gradient was changed."
                    )
        return Group(parameters.pattern, policy, gradients, self._order, share)

    def _layouts(self, policy: Policy) -> LayoutCache:
        """Return where the layouts of a group's gradients are remembered."""
        return LayoutCache(by_unit=policy.scope == "unit")

    def _read(
        self, groups: list[Group], scale: float | Tensor | None, home: torch.device, peers: Peers
    ) -> None:
        """Read all gradients; clamp them on the way where no host can wait for a verdict."""
        for group in groups:
            if self._clamping.goes_first(home):
                self._clamping.clamp(group, scale, home, before=True)
            group.read(self._backends, home)
            if not peers.is_alone:
                self._clamping.foresee(group, scale, home)

    def _warn_if_none(self, groups: list[Group]) -> None:
        if self._warned or any(group.gradients.tensors for group in groups):
            return
        if any(group.parameters for group in self._parameters.groups().values()):
            self._warned = True
            warnings.warn(
                "every gradient is None, so nothing was clipped: clip after backward() and before "
                "zero_grad()",
                stacklevel=callers_level(),
            )

    def _home(self, groups: list[Group]) -> torch.device:
        """Return the device of the small results: an accelerator where there is one."""
        devices = {device for group in groups for device in group.gradients.devices}
        if not devices:
            found = self._parameters.groups().values()
            devices = {p.device for group in found for p in group.parameters[:1] if not p.is_meta}
        return home_of(devices)

    # decide

    def _judge(
        self,
        groups: list[Group],
        measured: list[Measured],
        sound: Flag,
        *,
        overflow_expected: bool,
    ) -> Flag:
        """Return whether the update may happen, as far as NaN, infinities and other ranks go.

        Its verdicts are those of all ranks, so what one raises, all raise.
        """
        finite = [g.is_bounded(m.norms_S) for g, m in zip(groups, measured, strict=True)]
        if self._nonfinite == "raise" and not all(map(bool, finite)):
            raise nonfinite_error(self._report(groups))
        counts = all_of(
            [sound, *(f for f, group in zip(finite, groups, strict=True) if group.policy.writes)]
        )
        if self._nonfinite == "skip":
            skipped = not counts if isinstance(counts, bool) else ~counts
            if self._skips.record(skipped, expected=overflow_expected):
                raise too_many_skips(self._report(groups), self._skips.limit)
        return counts

    def _report(self, groups: list[Group]) -> str:
        recent = [float(combine(norms_S, self._order)) for norms_S in self._recent]
        mine = Faults.of([group.gradients for group in groups], self._peers.rank)
        return nonfinite_report(
            self._peers.gather(mine),
            norm_type=groups[0].policy.order,
            step=self.step,
            last_norms=[norm for norm in recent if isfinite(norm)][-4:],
            ceiling=groups[0].policy.ceiling,
        )

    def _decide(self, group: Group, norms: Measured, counts: Flag) -> Response:
        policy, norms_S = group.policy, norms.norms_S
        state = self._states.get(group.pattern)
        if state is None or group.pattern in self._loaded:
            initial = policy.initial_state(len(norms_S), norms_S.device)
            if state is not None:
                check_history(group.pattern, state, initial, len(norms_S))
            state = initial if state is None else state
            self._loaded.discard(group.pattern)
        decision = policy.decide(norms_S, as_flag(counts, norms_S.device), state)
        self._states[group.pattern] = decision.state
        zeroes = self._nonfinite == "skip" or (policy.ceiling == 0 and not self._by_pattern)
        return Response(
            self._backends,
            norms_S,
            decision,
            counts,
            guard=self._peers.precision(group.gradients)[1],
            otherwise=0.0 if zeroes and policy.writes else 1.0,
        )

    # apply

    def _apply(
        self,
        group: Group,
        norms: Measured,
        response: Response,
        scale: float | Tensor | None,
    ) -> ClipResult:
        policy, counts = group.policy, response.counts
        skips = policy.writes and self._nonfinite == "skip"
        thresholds, clamped, left_S = response.decision.thresholds, None, None
        if policy.element_limit is not None:
            thresholds = policy.element_limit
            clamped, left_S = self._clamping.finish(group, norms, counts, scale)
        if policy.writes:
            self._scale(group, response)
        skipped: Flag = not counts if isinstance(counts, bool) else ~counts
        return ClipResult(
            measured_S=norms.norms_S,
            thresholds=thresholds,
            response=response,
            withheld=skipped if skips else False,
            witness_T=norms.witness_T,
            norm_type=norms.norm_type,
            dtype=self._peers.precision(group.gradients)[0],
            scope_names=group.scope_names(),
            clamped=clamped,
            left_S=left_S,
            found=group.found,
        )

    def _scale(self, group: Group, response: Response) -> None:
        """Multiply the gradients by what was decided."""
        scaling.scale(self._backends, group.gradients, response, group.share)

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
                is changed then. The next ``clip`` raises it for a history of other parameters.
        """
        self.step, self._skips.in_a_row, self._states = read_state(state, self.state_dict())
        self._loaded = set(self._states)
