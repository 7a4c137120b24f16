"""The patterns of an engine, bound to parameters and ranks, and again when those were replaced."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING

from torch import Tensor

from gradclip.clipping.arguments import Options
from gradclip.clipping.collect.gradients import Gradients, left_alone
from gradclip.clipping.collect.parameters import ParameterGroup, Parameters
from gradclip.clipping.collect.sources import ParameterSource
from gradclip.clipping.kernels import SpecsCache
from gradclip.clipping.measure.norm import reads_twice
from gradclip.clipping.measure.pattern import Pattern, rule_of
from gradclip.clipping.policies import Policy
from gradclip.clipping.ranks import find_peers, pass_by
from gradclip.clipping.ranks.peers import Peers, ReplacedError, SingleProcess

if TYPE_CHECKING:
    from gradclip.clipping.ranks import Meet

_EUCLIDEAN = 2.0


class Binding:
    """Finds the parameters of each pattern, and who holds them together with this process.

    Args:
        source: Where parameters and gradients come from.
        policies: What bounds them, by name pattern; None leaves a pattern alone.
        options: The checked keywords.
        by_pattern: Whether patterns were given; otherwise there is one, of all parameters.
        known: Recognises gradients, for all engines that share it; None for one per pattern.
        meet: Finds the ranks of parameters; None to agree with them anew.
    """

    def __init__(
        self,
        source: ParameterSource,
        policies: Mapping[str, Policy | None],
        options: Options,
        *,
        by_pattern: bool,
        known: SpecsCache | None,
        meet: "Meet | None",
    ) -> None:
        self._source, self._policies, self._options = source, policies, options
        self._known, self._meet = known, meet
        units = {name: policy.unit_dims for name, policy in policies.items() if policy}
        self._parameters = Parameters(source, list(policies) if by_pattern else None, units)
        self._rules = {
            name: None if policy is None else rule_of(policy) for name, policy in policies.items()
        }
        orders = {policy.order for policy in policies.values() if policy}
        self.total_order = orders.pop() if len(orders) == 1 else _EUCLIDEAN
        """p of the norm of all patterns together."""
        self.patterns: list[Pattern] = []
        """Those that have a policy, in order."""
        self.may_skip = False
        """Whether a policy may ask to skip a step."""
        self.asks = False
        """Whether a policy is asked at each step, and may have a history."""
        orders = {self.total_order, *(policy.order for policy in policies.values() if policy)}
        self.reads_twice = any(map(reads_twice, orders))
        """Whether a norm needs the largest modulus first; the same on all ranks."""
        self.peers: Peers = SingleProcess()
        """The processes that hold the parameters."""
        self._groups: dict[str, ParameterGroup] | None = None
        self._unbounded = SpecsCache()
        self._by_unit = self._warned = False

    def find(self, *, anew: bool) -> Peers:
        """Bind to the parameters that there are now, where they were replaced.

        Args:
            anew: Look again who holds them, if it was this process alone so far.

        Raises:
            ArgumentValueError: GC010, for a pattern that matches nothing, or ranks that disagree.
            ReplacedError: They were replaced, and other ranks have to hear of it first.
        """
        groups = self._parameters.groups()
        replaced = groups is not self._groups
        if replaced and self.peers.hear_first:
            raise ReplacedError
        if replaced or (anew and self.peers.is_single):
            self.find_again()
        elif self._by_unit and any(pattern.is_outdated for pattern in self.patterns):
            self._bind(groups)
        return self.peers

    def find_again(self, *, awaited: bool = False) -> Peers:
        """Bind anew; where ranks hold parameters together, all of them do.

        Args:
            awaited: Whether other ranks do so now, and wait for this one.
        """
        groups = self._parameters.groups()
        self.peers = self._find_peers(groups, awaited=awaited)
        if self._groups is None and self.peers.is_single and self._meet is None:
            pass_by(self._rules, self._options.in_words)
        # At a step the ranks that were found now wait for this one.
        with self.peers.guarding() if awaited else nullcontext():
            self._bind(groups)
        return self.peers

    @property
    def here(self) -> list[Pattern]:
        """The patterns, if their parameters are those that were bound, and here alone."""
        same = self._parameters.groups() is self._groups
        return self.patterns if same and self.peers.is_single else []

    def bounded(self) -> list[Tensor]:
        """Return the parameters that have a policy, in the order that all ranks have."""
        return [tensor for pattern in self.patterns for tensor in pattern.parameters.parameters]

    def left_alone(self) -> list[Gradients]:
        """Return the gradients that no policy bounds, and that should not change."""
        groups = self._parameters.groups()
        return [
            left_alone(groups[name], self._unbounded)
            for name, policy in self._policies.items()
            if policy is None
        ]

    def every(self) -> list[Tensor]:
        """Return the first parameter of each pattern, those without a policy too."""
        groups = self._parameters.groups().values()
        return [group.parameters[0] for group in groups if group.parameters]

    def _find_peers(self, groups: dict[str, ParameterGroup], *, awaited: bool) -> Peers:
        options = self._options
        return find_peers(
            self._source,
            groups,
            self._rules,
            options=options.in_words,
            total_order=self.total_order,
            partitioned=options.partitioned,
            duplicated=options.duplicated,
            meet=self._meet,
            require_matches=self._parameters.require_matches,
            awaited=awaited,
        )

    def _bind(self, groups: dict[str, ParameterGroup]) -> None:
        known = {pattern.name: pattern.known for pattern in self.patterns}
        self._groups = groups
        self.patterns = [
            Pattern(
                policy,
                groups[name],
                self.peers.share(name),
                self._known or known.get(name) or SpecsCache(),
            )
            for name, policy in self._policies.items()
            if policy is not None
        ]
        by_unit = [pattern for pattern in self.patterns if pattern.by_unit]
        self._by_unit = bool(by_unit)
        if not self._warned:
            self._warned = any(each.parameters.warn_of_units() for each in by_unit)
        self.may_skip = any(each.may_skip and each.writes for each in self.patterns)
        self.asks = any(pattern.limit is None for pattern in self.patterns)
