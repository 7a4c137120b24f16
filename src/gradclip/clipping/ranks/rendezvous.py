"""How ranks find each other: from parameters, declarations and agreement to ``Ranks``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradclip.clipping.collect.parameters import ParameterGroup, ParameterSource
from gradclip.clipping.kernels.blocks import home_of
from gradclip.clipping.policies import Policy
from gradclip.clipping.ranks.agreement import Facts, acquainted, check_agreement
from gradclip.clipping.ranks.fsdp1 import is_flattened
from gradclip.clipping.ranks.ranks import Member, Ranks
from gradclip.clipping.ranks.share import Share
from gradclip.clipping.ranks.topology import Declared, Survey, Topology
from gradclip.errors import ArgumentValueError

_SUMMED = {1.0, 2.0}


@dataclass(frozen=True, eq=False)
class Meeting:
    """What ranks need to know of a clipper.

    Args:
        source: Where its parameters are found.
        policies: By pattern; None leaves parameters alone.
        options: Its other arguments, in words.
        total_order: p of the norm of all groups together.
        partitioned: What ``GradientClipper`` was given.
        duplicated: Likewise.
    """

    source: ParameterSource
    policies: Mapping[str, Policy | None]
    options: str
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
        survey = Survey(
            parameters,
            lambda: self._names(bounded),
            self.source.module,
            self.partitioned,
            self.duplicated,
        )
        error = survey.error or self._unable(bounded)
        doubles = [_is_double(parameter) for parameter in parameters]
        facts = Facts(
            policies=self._words(),
            outline=survey.outline(),
            parameters=survey.fingerprints([n for group in bounded for n in group.names])
            if agree
            else {},
            doubles=any(doubles),
            singles=not all(doubles),
            unmatched=self._unmatched(groups, survey.matched),
            error=None if error is None else str(error),
        )
        said = None
        if agree:
            said = acquainted(survey.dimensions, facts)
        if error is not None:
            raise error
        if said is not None:
            check_agreement(said)
        outlines = None if said is None else {rank: each.outline for rank, each in said.items()}
        topology = survey.settled(outlines)
        members = [self._member(group, topology) for group in bounded]
        devices = {parameter.device for parameter in parameters if not parameter.is_meta}
        everyone = [facts] if said is None else list(said.values())
        return Ranks(
            topology,
            members,
            self.total_order,
            doubles=any(each.doubles for each in everyone),
            singles=any(each.singles for each in everyone),
            home=home_of(devices) if devices else torch.device("cpu"),
            replicas=getattr(self.source.module, "process_group", None),
        )

    def _names(self, groups: Sequence[ParameterGroup]) -> list[str | None]:
        known = self.source.names()
        return [known[number] for group in groups for number in group.numbers]

    def _unable(self, groups: Sequence[ParameterGroup]) -> ArgumentValueError | None:
        """Return why a policy cannot be followed on several ranks, if one cannot."""
        for group in groups:
            policy = self._policy(group)
            if policy.element_limit is not None and policy.order not in _SUMMED:
                return ArgumentValueError(
                    f"{policy!r} clamps elements and measures p = {policy.order:g}: on several "
                    "ranks a policy that clamps measures p = 1 or 2"
                )
            for name, parameter in zip(group.names, group.parameters, strict=True):
                if policy.scope != "group" and is_flattened(parameter):
                    return ArgumentValueError(
                        f"{policy!r} has a norm for each {policy.scope}, and {name} lies in a flat "
                        "parameter of FSDP1, which cuts tensors anywhere: use FSDP2 (fully_shard)"
                    )
        return None

    def _policy(self, group: ParameterGroup) -> Policy:
        policy = self.policies[group.pattern]
        assert policy is not None
        return policy

    def _member(self, group: ParameterGroup, topology: Topology) -> Member:
        policy = self._policy(group)
        if policy.scope != "group" and not topology.is_grid:
            raise ArgumentValueError(
                f"{policy!r} has a norm for each {policy.scope}, and these ranks hold parameters "
                "over groups that are no grid (some are in groups that others are not in): only "
                "norms of all parameters together are found there"
            )
        holdings = [topology.holdings[id(parameter)] for parameter in group.parameters]
        by_unit = [policy.scope == "unit" and p.dim() > 1 for p in group.parameters]
        rows = [
            _local(parameter).shape[0] if each else 1
            for parameter, each in zip(group.parameters, by_unit, strict=True)
        ]
        return Member(group.pattern, policy, Share(holdings, rows, by_unit, policy.scope))

    def _words(self) -> str:
        """Say what is done with gradients, so that ranks can compare it."""
        policies = ", ".join(
            f"{pattern!r}: {policy!r}" for pattern, policy in self.policies.items()
        )
        return f"{{{policies}}} with {self.options}"

    def _unmatched(
        self, groups: Mapping[str, ParameterGroup], matched: set[str]
    ) -> frozenset[tuple[str, str]]:
        """Return the patterns that match nothing here, each with the argument that has it."""
        empty = {("policy", pattern) for pattern, group in groups.items() if not group.parameters}
        for declared in (self.partitioned, self.duplicated):
            unused = declared.groups.keys() - matched
            empty |= {(declared.argument, pattern) for pattern in unused}
        return frozenset(empty)


def _local(parameter: Tensor) -> Tensor:
    local: Tensor = getattr(parameter, "_local_tensor", parameter)
    return local


def _is_double(parameter: Tensor) -> bool:
    """Return whether gradients may be float64, also where torch was told of another dtype."""
    known = parameter.is_leaf and hasattr(parameter, "grad_dtype")
    kind = parameter.grad_dtype if known else parameter.dtype
    return kind in {None, torch.float64, torch.complex128}
