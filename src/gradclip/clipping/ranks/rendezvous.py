"""How ranks find each other: from parameters, declarations and agreement to ``Ranks``."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gradclip.clipping.collect.parameters import ParameterGroup
from gradclip.clipping.collect.shards import global_offset, local_part
from gradclip.clipping.collect.sources import ParameterSource
from gradclip.clipping.kernels.device import result_device_of
from gradclip.clipping.ranks.agreement import Facts, check_agreement, gather_facts
from gradclip.clipping.ranks.columns import Member
from gradclip.clipping.ranks.coverage import compact
from gradclip.clipping.ranks.dimension import Dimension, gathered
from gradclip.clipping.ranks.fsdp1 import is_flattened
from gradclip.clipping.ranks.peers import PatternShare, Rule, in_words
from gradclip.clipping.ranks.ranks import Ranks
from gradclip.clipping.ranks.rollcall import meet
from gradclip.clipping.ranks.share import Share
from gradclip.clipping.ranks.topology import Declared, Survey, Topology
from gradclip.errors import ArgumentValueError

_SUMMED = {1.0, 2.0}


@dataclass(frozen=True, eq=False)
class Rendezvous:
    """What ranks need to know of a clipper.

    Args:
        source: Where its parameters are found.
        rules: What the policies ask for, by pattern; None leaves parameters alone.
        options: Its other arguments, in words.
        total_order: p of the norm of all patterns together.
        partitioned: What ``GradientClipper`` was given.
        duplicated: Likewise.
    """

    source: ParameterSource
    rules: Mapping[str, Rule | None]
    options: str
    total_order: float
    partitioned: Declared
    duplicated: Declared

    def ranks(self, groups: Mapping[str, ParameterGroup], *, agree: bool = True) -> Ranks:
        """Find the ranks that hold these parameters together; all of them ask at the same time.

        Args:
            groups: By pattern.
            agree: Whether ranks compare notes first, which is a collective of its own.

        Raises:
            ArgumentValueError: GC010, on every rank, if they do not mean the same thing.
        """
        bounded = {p: (group, rule) for p, group in groups.items() if (rule := self.rules[p])}
        parameters = [tensor for group, _ in bounded.values() for tensor in group.parameters]
        survey = Survey(
            parameters,
            lambda: self._names([group for group, _ in bounded.values()]),
            self.source.module,
            self.partitioned,
            self.duplicated,
        )
        error = survey.error or _unable(bounded.values())
        dimensions, words = survey.dimensions, in_words(self.rules, self.options)
        missed = meet((d.ranks for d in dimensions), words) if agree else {}
        if missed:
            error = error or ArgumentValueError(next(iter(missed.values())))
        there = [d for d in dimensions if d.size > 1 and d.ranks not in missed]
        facts = self._facts(groups, survey, there, parameters, error, agree=agree)
        everyone = gather_facts(there, facts) if agree else None
        if error is not None:
            raise error
        if everyone is not None:
            check_agreement(everyone)
        outlines = None if everyone is None else {r: each.outline for r, each in everyone.items()}
        topology = survey.settle(outlines)
        known = [facts] if everyone is None else list(everyone.values())
        devices = {parameter.device for parameter in parameters if not parameter.is_meta}
        device = result_device_of(devices) if devices else torch.device("cpu")
        ranks = Ranks(
            topology,
            [_member(group, rule, topology) for group, rule in bounded.values()],
            self.total_order,
            doubles=any(each.doubles for each in known),
            singles=any(each.singles for each in known),
            result_device=device,
            module=self.source.module,
            alike=_numbered(known) if agree else self._unagreed(parameters, survey, facts),
            policies=words,
            agreed=agree,
        )
        if agree:
            ranks.check_lengths()
        return ranks

    def _facts(
        self,
        groups: Mapping[str, ParameterGroup],
        survey: Survey,
        there: Sequence[Dimension],
        parameters: Sequence[Tensor],
        error: Exception | None,
        *,
        agree: bool,
    ) -> Facts:
        """Return what this rank says of itself."""
        doubles = [_is_double(parameter) for parameter in parameters]
        bounded = [(p, group.names) for p, group in groups.items() if self.rules[p]]
        labels = [f"{pattern}: {name}" for pattern, names in bounded for name in names]
        return Facts(
            policies=in_words(self.rules, self.options),
            outline=survey.outline(),
            parameters=survey.fingerprints(labels) if agree else {},
            doubles=any(doubles),
            singles=not all(doubles),
            unmatched=self._unmatched(groups, survey.matched),
            idle=frozenset(
                (declared.argument, pattern)
                for declared in (self.partitioned, self.duplicated)
                for pattern, known in declared.groups.items()
                if not known
            ),
            error=None if error is None else str(error),
            groups=tuple(compact(dimension.ranks) for dimension in there),
            made=_made[0],
        )

    def _unagreed(self, parameters: Sequence[Tensor], survey: Survey, facts: Facts) -> str:
        """Say what ranks should have alike that do not compare it first.

        Of parameters that ranks hold parts of, some may have been given only those with a gradient.
        """
        count, checksum = survey.fingerprints([""] * len(parameters))[None]
        kinds = [k for k, has in (("float64", facts.doubles), ("others", facts.singles)) if has]
        return (
            f"{facts.policies} for {count} plain parameters (checksum {checksum:08x}), "
            f"dimensions of {[dimension.size for dimension in survey.dimensions]} ranks, and "
            f"parameters of {' and '.join(kinds)}"
        )

    def _names(self, groups: Sequence[ParameterGroup]) -> list[str | None]:
        known = self.source.names()
        return [known[number] for group in groups for number in group.numbers]

    def _unmatched(
        self, groups: Mapping[str, ParameterGroup], matched: set[str]
    ) -> frozenset[tuple[str, str]]:
        """Return the patterns that match nothing here, each with the argument that has it."""
        empty = {
            ("policy", pattern)
            for pattern, group in groups.items()
            if not (group.parameters or group.may_be_empty)
        }
        empty |= {("units", each) for group in groups.values() for each in group.unused_units}
        for declared in (self.partitioned, self.duplicated):
            unused = declared.groups.keys() - matched
            empty |= {(declared.argument, pattern) for pattern in unused}
        return frozenset(empty)


def _numbered(known: Sequence[Facts]) -> str:
    """Say which clipper it is, so that one is told from another of equal policies."""
    _made[0] = 1 + max(each.made for each in known)
    return f"{known[0].policies}, number {_made[0]} of its clippers"


_made = [0]
"""How many clippers this process has made with other ranks, or a larger number that they agreed."""


def _unable(
    bounded: Iterable[tuple[ParameterGroup, Rule]],
) -> ArgumentValueError | None:
    """Return why a policy cannot be followed on several ranks, if one cannot."""
    for group, rule in bounded:
        if rule.clamps and rule.order not in _SUMMED:
            return ArgumentValueError(
                f"{rule.label} clamps elements and measures p = {rule.order:g}: on several "
                "ranks a policy that clamps measures p = 1 or 2"
            )
        for name, parameter in zip(group.names, group.parameters, strict=True):
            if is_flattened(parameter) and (rule.scope != "group" or rule.weighs):
                what = (
                    f"a norm for each {rule.scope}" if rule.scope != "group" else "norms of weights"
                )
                return ArgumentValueError(
                    f"{rule.label} has {what}, and {name} lies in a flat "
                    "parameter of FSDP1, which cuts tensors anywhere: use FSDP2 (fully_shard)"
                )
        if rule.scope == "unit" and (error := _wrong_units(group, rule)) is not None:
            return error
    return None


def _wrong_units(group: ParameterGroup, rule: Rule) -> ArgumentValueError | None:
    """Return what is wrong with the units of a pattern, if anything is."""
    try:
        every = group.units
    except ArgumentValueError as error:
        return error
    for name, parameter, units in zip(group.names, group.parameters, every, strict=True):
        apart = any(placed.is_shard() for placed in getattr(parameter, "placements", ()))
        if units.groups > 1 and parameter.dim() > 1 and apart:
            return ArgumentValueError(
                f"{rule.label} has a norm for each unit, and {name} is the weight of a transposed "
                f"convolution of {units.groups} groups, of which ranks hold parts: name other "
                f'units, such as units={{{name!r}: 1}} (over all groups) or "tensor"'
            )
    return None


def _member(group: ParameterGroup, rule: Rule, topology: Topology) -> Member:
    if rule.scope != "group" and not topology.is_grid:
        raise ArgumentValueError(
            f"{rule.label} has a norm for each {rule.scope}, and these ranks hold parameters "
            "over groups that are no grid (some are in groups that others are not in): only "
            "norms of all parameters together are found there"
        )
    holdings = [topology.holdings[id(parameter)] for parameter in group.parameters]
    by_unit = rule.scope == "unit"
    unit_dims = [
        units.dim if by_unit and parameter.dim() > 1 else None
        for parameter, units in zip(group.parameters, group.units, strict=True)
    ]
    share = Share(holdings, group.rows(rule.scope), unit_dims, rule.scope)
    told = PatternShare(share.weights)
    if not rule.is_fixed:
        starts = [
            0 if dim is None else global_offset(parameter, dim)
            for parameter, dim in zip(group.parameters, unit_dims, strict=True)
        ]
        elements = _elements_on_all_ranks(group, share, topology)
        told = PatternShare(share.weights, elements, starts)
    return Member(group.pattern, rule, share, told)


def _elements_on_all_ranks(group: ParameterGroup, share: Share, topology: Topology) -> int:
    """Add up the elements of a pattern; all ranks ask at the same time."""
    pairs = zip(group.parameters, share.weights, strict=True)
    here = sum(local_part(parameter).numel() * weight for parameter, weight in pairs)
    known = gathered(topology.dimensions, {dist.get_rank(): here})
    return round(sum(known.values()))


def _is_double(parameter: Tensor) -> bool:
    """Return whether gradients may be float64, also where torch was told of another dtype."""
    known = parameter.is_leaf and hasattr(parameter, "grad_dtype")
    kind = parameter.grad_dtype if known else parameter.dtype
    return kind in {None, torch.float64, torch.complex128}
