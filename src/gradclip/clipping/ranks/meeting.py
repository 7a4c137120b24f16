"""How ranks find each other: from parameters, declarations and agreement to ``Ranks``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress

import torch
from torch import Tensor

from gradclip.clipping.kernels.blocks import home_of
from gradclip.clipping.parameters import ParameterGroup, ParameterSource
from gradclip.clipping.policies import Policy
from gradclip.clipping.ranks.agreement import Facts, agreed, fingerprint_of
from gradclip.clipping.ranks.many import Member, Ranks
from gradclip.clipping.ranks.share import Share
from gradclip.clipping.ranks.topology import Declared, Topology, topology_of
from gradclip.errors import ArgumentValueError

_SUMMED = {1.0, 2.0}


@dataclass(frozen=True, eq=False)
class Meeting:
    """What ranks need to know of a clipper.

    Args:
        source: Where its parameters are found.
        policies: By pattern; None leaves parameters alone.
        nonfinite: What it does about a NaN.
        total_order: p of the norm of all groups together.
        partitioned: What ``GradientClipper`` was given.
        duplicated: Likewise.
    """

    source: ParameterSource
    policies: Mapping[str, Policy | None]
    nonfinite: str
    total_order: float
    partitioned: Declared
    duplicated: Declared

    def ranks(self, groups: Mapping[str, ParameterGroup], *, agree: bool = True) -> Ranks:
        """Find the ranks that hold these groups together; all of them ask at the same time.

        Args:
            groups: By pattern.
            agree: Whether ranks compare notes first, which is a collective of its own.

        Raises:
            ArgumentValueError: GC010, on every rank, if they do not mean the same thing.
        """
        bounded = [group for pattern, group in groups.items() if self.policies[pattern]]
        parameters = [parameter for group in bounded for parameter in group.parameters]
        topology = topology_of(
            parameters,
            lambda: self._names(bounded),
            self.source.module,
            self.partitioned,
            self.duplicated,
        )
        members = [self._member(group, topology) for group in bounded]
        facts = self._facts(groups, bounded, topology, named=agree)
        if agree:
            facts = agreed(topology.dimensions, facts)
        devices = {parameter.device for parameter in parameters if not parameter.is_meta}
        return Ranks(
            topology,
            members,
            self.total_order,
            doubles=facts.doubles,
            singles=facts.singles,
            agrees=agree,
            home=home_of(devices) if devices else torch.device("cpu"),
        )

    def _names(self, groups: Sequence[ParameterGroup]) -> list[str | None]:
        known = self.source.names()
        return [known[number] for group in groups for number in group.numbers]

    def _member(self, group: ParameterGroup, topology: Topology) -> Member:
        policy = self.policies[group.pattern]
        assert policy is not None
        if policy.element_limit is not None and policy.order not in _SUMMED:
            raise ArgumentValueError(
                f"{policy!r} clamps elements and measures p = {policy.order:g}: on several ranks "
                "a policy that clamps measures p = 1 or 2"
            )
        holdings = [topology.holdings[id(parameter)] for parameter in group.parameters]
        if policy.scope != "group":
            for name, holding in zip(group.names, holdings, strict=True):
                if holding.flat:
                    raise ArgumentValueError(
                        f"{policy!r} has a norm for each {policy.scope}, and {name} lies in a flat "
                        "parameter of FSDP1, which cuts tensors anywhere: use FSDP2 (fully_shard)"
                    )
        by_unit = [policy.scope == "unit" and p.dim() > 1 for p in group.parameters]
        rows = [
            _local(parameter).shape[0] if each else 1
            for parameter, each in zip(group.parameters, by_unit, strict=True)
        ]
        return Member(group.pattern, policy, Share(holdings, rows, by_unit, policy.scope))

    def _facts(
        self,
        groups: Mapping[str, ParameterGroup],
        bounded: Sequence[ParameterGroup],
        topology: Topology,
        *,
        named: bool,
    ) -> Facts:
        parameters = list(chain.from_iterable(group.parameters for group in bounded))
        compared = [topology.holdings[id(parameter)].compared for parameter in parameters]
        fingerprint = 0, 0
        if named:
            names = chain.from_iterable(group.names for group in bounded)
            pairs = zip(names, parameters, strict=True)
            fingerprint = fingerprint_of(compress(pairs, compared))
        doubles = [_is_double(parameter) for parameter in parameters]
        unmatched = {
            ("policy", pattern) for pattern, group in groups.items() if not group.parameters
        }
        for declared in (self.partitioned, self.duplicated):
            unmatched |= {
                (declared.argument, pattern)
                for pattern in declared.groups
                if pattern not in topology.matched
            }
        policies = ", ".join(
            f"{pattern!r}: {policy!r}" for pattern, policy in self.policies.items()
        )
        return Facts(
            policies=f"{{{policies}}} with nonfinite={self.nonfinite!r}",
            parameters=fingerprint,
            doubles=any(doubles),
            singles=not all(doubles),
            unmatched=frozenset(unmatched),
        )


def _local(parameter: Tensor) -> Tensor:
    local: Tensor = getattr(parameter, "_local_tensor", parameter)
    return local


def _is_double(parameter: Tensor) -> bool:
    return parameter.dtype in {torch.float64, torch.complex128}
