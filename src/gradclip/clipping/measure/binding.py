"""The patterns of an engine, bound to parameters and ranks, and again when those were replaced."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradclip.clipping.arguments import Options
from gradclip.clipping.collect.gradients import Gradients, left_alone
from gradclip.clipping.collect.parameters import ParameterGroup, Parameters
from gradclip.clipping.collect.sources import ParameterSource
from gradclip.clipping.kernels import SpecsCache
from gradclip.clipping.measure.norm import reads_twice
from gradclip.clipping.measure.pattern import Pattern, rule_of
from gradclip.clipping.policies import Division, Policy
from gradclip.clipping.policies.changes import check_change, refused
from gradclip.clipping.ranks import find_peers, pass_by
from gradclip.clipping.ranks.peers import Peers, ReplacedError, Rule, SingleProcess, in_words

if TYPE_CHECKING:
    from gradclip.clipping.ranks import Meet

_CPU = torch.device("cpu")
_EUCLIDEAN = 2.0


class Binding:
    """Finds the parameters of each pattern, and who holds them together with this process.

    Args:
        source: Where parameters and gradients come from.
        policies: What bounds them, by name pattern; None leaves a pattern alone.
        options: The checked keywords.
        division: What has a policy of its own.
        known: Recognises gradients, for all engines that share it; None for one per pattern.
        meet: Finds the ranks of parameters; None to agree with them anew.
    """

    def __init__(
        self,
        source: ParameterSource,
        policies: Mapping[str, Policy | None],
        options: Options,
        *,
        division: Division,
        known: SpecsCache | None,
        meet: "Meet | None",
    ) -> None:
        self._source, self._options, self._division = source, options, division
        self._known, self._meet = known, meet
        self.patterns: list[Pattern] = []
        """Those that have a policy, in order."""
        self.may_skip = False
        """Whether a policy may ask to skip a step."""
        self.asks = False
        """Whether a policy is asked at each step, and may have a history."""
        self.peers: Peers = SingleProcess()
        """The processes that hold the parameters."""
        self._groups: dict[str, ParameterGroup] | None = None
        self._unbounded = SpecsCache()
        self._by_unit = self._warned = False
        self._parameters = self._sorted(policies)
        self._take(policies)

    def _sorted(self, policies: Mapping[str, Policy | None]) -> Parameters:
        """Return the parameters sorted by what has a policy.

        Raises:
            ArgumentValueError: GC010, for a parameter that has none.
        """
        units = {name: policy.unit_dims for name, policy in policies.items() if policy}
        patterns = None if self._division == "whole" else list(policies)
        by_group = self._division == "by group"
        return Parameters(self._source, patterns, units, by_group=by_group)

    def _take(self, policies: Mapping[str, Policy | None]) -> None:
        self.policies, self._rules = policies, _rules_of(policies)
        orders = {policy.order for policy in policies.values() if policy}
        self.total_order = next(iter(orders)) if len(orders) == 1 else _EUCLIDEAN
        """p of the norm of all patterns together."""
        self.reads_twice = any(map(reads_twice, {self.total_order, *orders}))
        """Whether a norm needs the largest modulus first; the same on all ranks."""

    def check_change(self, policies: Mapping[str, Policy | None], division: Division) -> None:
        """Refuse policies that cannot take the place of those so far; nothing is changed.

        Raises:
            ArgumentValueError: GC010.
        """
        names = list(self.policies)
        if division != self._division or (list(policies) != names and division != "by group"):
            kinds = {"whole": "one for all", "by name": "a mapping of {}", "by group": "a list"}
            before, after = kinds[self._division].format(names), kinds[division]
            raise refused(f"it is {before}, and would be {after.format(list(policies))}")
        if list(policies) != names:  # groups were added, or will not fit
            self._sorted(policies)
        told = {pattern.name: pattern.told(_CPU) for pattern in self.patterns}
        rules = _rules_of(policies)
        for name in filter(policies.__contains__, self._groups or ()):  # others have no history
            check_change(name, self.policies[name], policies[name], told.get(name))
            old, new = self._rules.get(name), rules[name]
            changes = old and new and old.exchanged != new.exchanged
            if changes and not self.peers.is_single:
                raise refused(
                    f"{self.policies[name]!r} and {policies[name]!r} need other numbers of the "
                    "other ranks"
                )

    def change(self, policies: Mapping[str, Policy | None]) -> None:
        """Bind other policies, which were checked, to the same parameters."""
        if list(policies) != list(self.policies):
            self._parameters = self._sorted(policies)
        self.policies = policies
        if self._groups is None or list(policies) != list(self._groups):
            return  # groups were added: the next ``find`` binds them, on all ranks
        self._take(policies)
        self.peers.assign(in_words(self._rules, self._options.in_words))
        self._bind(self._groups)

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
        self._take(self.policies)
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
        if not self.peers.is_single:
            return []
        return self.patterns if self._parameters.groups() is self._groups else []

    def bounded(self) -> list[Tensor]:
        """Return the parameters that have a policy, in the order that all ranks have."""
        return [tensor for pattern in self.patterns for tensor in pattern.parameters.parameters]

    def left_alone(self) -> list[Gradients]:
        """Return the gradients that no policy bounds, and that should not change."""
        groups = self._parameters.groups()
        return [
            left_alone(groups[name], self._unbounded)
            for name, policy in self.policies.items()
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
            for name, policy in self.policies.items()
            if policy is not None
        ]
        by_unit = [pattern for pattern in self.patterns if pattern.by_unit]
        self._by_unit = bool(by_unit)
        if not self._warned:
            self._warned = any(each.parameters.warn_of_units() for each in by_unit)
        self.may_skip = any(each.may_skip and each.writes for each in self.patterns)
        self.asks = any(pattern.limit is None for pattern in self.patterns)


def _rules_of(policies: Mapping[str, Policy | None]) -> dict[str, Rule | None]:
    return {name: None if policy is None else rule_of(policy) for name, policy in policies.items()}
