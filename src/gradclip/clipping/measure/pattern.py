"""A name pattern with its policy and parameters: what stays from step to step."""

from functools import cached_property
from math import inf

import torch
from torch import Tensor

from gradclip.clipping.collect.gradients import Gradients, as_gradients, collect, has_norm
from gradclip.clipping.collect.parameters import ParameterGroup
from gradclip.clipping.collect.shards import local_part
from gradclip.clipping.kernels import SpecsCache
from gradclip.clipping.kernels.tables import Table
from gradclip.clipping.measure.scopes import PatternScopes, ScopeNames
from gradclip.clipping.policies import Decision, Policy, Scopes
from gradclip.clipping.ranks.peers import PatternShare, Rule


class Pattern:
    """A name pattern that has a policy.

    Args:
        policy: What bounds its gradients.
        parameters: Those whose names match.
        share: How ranks hold them; None where all are whole here.
        known: Recognises gradients like those of earlier calls.
    """

    def __init__(
        self,
        policy: Policy,
        parameters: ParameterGroup,
        share: PatternShare | None,
        known: SpecsCache,
    ) -> None:
        self.policy = policy
        self.parameters = parameters
        self.name = parameters.pattern
        self.limit = policy.fixed()
        """The policy as numbers, where that is all there is to it."""
        self.decision = (
            None if self.limit is None else Decision(self.limit.threshold, self.limit.target)
        )
        """The decision of a policy that is not asked at each step."""
        self.order, self.element_limit = policy.order, policy.element_limit
        self.writes = policy.writes
        self.may_skip = self.limit is None or self.limit.skip_above < inf
        """Whether the policy may ask to skip a step."""
        self.by_unit = policy.scope == "unit"
        self.scopes = PatternScopes(
            policy.scope, parameters.rows(policy.scope), None if share is None else share.weights
        )
        """Which scope each row has."""
        self.as_one: PatternScopes | None = None
        """The same rows as one scope, where ranks have to add up the norm of the pattern."""
        if share is not None and rule_of(policy).needs_pattern_norm:
            self.as_one = PatternScopes("group", self.scopes.rows, share.weights)
        self._share = share
        self.known, self._known_weights = known, SpecsCache()
        self._told: dict[torch.device, Scopes] = {}

    def zeroes(self, decision: Decision) -> bool:
        """Return whether gradients are set to zero in any case, whatever they are."""
        limit = decision.targets if self.element_limit is None else self.element_limit
        return not isinstance(limit, Tensor) and limit == 0

    @property
    def is_outdated(self) -> bool:
        """Whether parameters were given other shapes, so that there are other units."""
        return self.by_unit and self.parameters.rows("unit") != self.scopes.rows

    @property
    def portions(self) -> list[float]:
        """How much of each parameter this process answers for: less than 1 of a copy."""
        count = len(self.parameters.parameters)
        return [1.0] * count if self._share is None else list(self._share.weights)

    @cached_property
    def scope_names(self) -> ScopeNames:
        """What the scopes are called that have a part on this process."""
        scope, starts = self.policy.scope, None if self._share is None else self._share.row_starts
        names = [] if scope == "group" else self.parameters.names
        return ScopeNames(scope, self.name, names, self.scopes.rows, starts)

    def told(self, device: torch.device) -> Scopes:
        """Return what the policy is told once, with numbers on a device: the same object always."""
        if device not in self._told:
            sizes_S = Table.of(self._sizes()).on(device)
            self._told[device] = Scopes(self.scope_names, sizes_S, device)
        return self._told[device]

    def gradients(self) -> Gradients:
        """Collect the gradients that exist now.

        Raises:
            UnsupportedGradientError: GC020, for a gradient that cannot be clipped.
        """
        return collect(self.parameters, self.known, by_unit=self.by_unit)

    def found(self) -> list[Tensor | None]:
        """Return the gradient of each parameter as it is, unchecked; None where there is none."""
        return self.parameters.source.gradients(self.parameters.parameters)

    def weights(self) -> Gradients:
        """Return the parameters themselves, as what is measured.

        Without those that are frozen and have no norm, such as quantized ones: these get no
        gradient.
        """
        parts = [(each, local_part(each.detach())) for each in self.parameters.parameters]
        local = [part if each.requires_grad or has_norm(part) else None for each, part in parts]
        return as_gradients(self.parameters, local, self._known_weights, by_unit=self.by_unit)

    def _sizes(self) -> list[int]:
        parameters = self.parameters.parameters
        if self.policy.scope == "group":
            of_ranks = None if self._share is None else self._share.elements
            return [sum(each.numel() for each in parameters) if of_ranks is None else of_ranks]
        sizes = []
        for parameter, units, here in zip(
            parameters, self.parameters.units, self.scopes.rows, strict=True
        ):
            parts = max(units.rows(parameter), 1) if self.by_unit else 1
            sizes += [parameter.numel() // parts] * here
        return sizes


def rule_of(policy: Policy) -> Rule:
    """Return what ranks have to know of a policy."""
    limit = policy.fixed()
    return Rule(
        label=repr(policy),
        scope=policy.scope,
        order=policy.order,
        clamps=policy.element_limit is not None and policy.writes,
        is_fixed=limit is not None and limit.skip_above == inf,
        weighs=policy.needs_weight_norms and limit is None,
        is_asked=limit is None,
    )
