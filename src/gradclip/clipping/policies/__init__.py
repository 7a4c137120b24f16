"""What decides the coefficient: one file per policy, each named in the union here."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from gradclip.clipping.policies.agc import AGCClip as AGCClip
from gradclip.clipping.policies.base import Decision as Decision
from gradclip.clipping.policies.base import FixedLimit as FixedLimit
from gradclip.clipping.policies.base import Measurement as Measurement
from gradclip.clipping.policies.base import Policy as Policy
from gradclip.clipping.policies.base import PolicyState as PolicyState
from gradclip.clipping.policies.base import Scope as Scope
from gradclip.clipping.policies.base import Scopes as Scopes
from gradclip.clipping.policies.ema import EMAClip as EMAClip
from gradclip.clipping.policies.guard import GuardClip as GuardClip
from gradclip.clipping.policies.norm import NormClip as NormClip
from gradclip.clipping.policies.observe import ObserveClip as ObserveClip
from gradclip.clipping.policies.quantile import QuantileClip as QuantileClip
from gradclip.clipping.policies.schedule import Schedule as Schedule
from gradclip.clipping.policies.value import ValueClip as ValueClip
from gradclip.clipping.policies.zscore import ZScoreClip as ZScoreClip
from gradclip.config import as_ceiling
from gradclip.errors import ArgumentTypeError, ArgumentValueError

AnyPolicy: TypeAlias = Annotated[
    NormClip | ValueClip | ObserveClip | GuardClip | AGCClip | QuantileClip | ZScoreClip | EMAClip,
    Field(discriminator="clip_mode"),
]
"""Every policy, told apart by ``clip_mode``: what a configuration file may name."""

BUILT_IN = (
    NormClip,
    ValueClip,
    ObserveClip,
    GuardClip,
    AGCClip,
    QuantileClip,
    ZScoreClip,
    EMAClip,
)
"""The same as a tuple: policies that need no ``class_type`` in a file."""

PolicyLike: TypeAlias = Policy | float
"""A policy, or a number that means ``NormClip(max_norm=number)``."""

PoliciesLike: TypeAlias = PolicyLike | Mapping[str, PolicyLike | None] | Sequence[PolicyLike | None]
"""What bounds all gradients, or by name pattern, or a list with one entry per ``param_group``."""

Division: TypeAlias = Literal["whole", "by name", "by group"]
"""What has a policy of its own: all parameters, those of a name pattern, or a ``param_group``."""


def as_policy(value: object, name: str = "policy") -> Policy:
    """Turn a number or a policy into a policy.

    Raises:
        ArgumentTypeError: GC011, for anything else.
        ArgumentValueError: GC010, for a number that is negative or NaN.
    """
    if isinstance(value, Policy):
        return value
    if isinstance(value, type) or callable(value) or value is None:
        raise ArgumentTypeError(
            f"{name} is {value!r}: expected a number (max_norm), a policy such as "
            "NormClip(max_norm=1.0), a mapping of name patterns to those, or a list of them, one "
            "for each param_group"
        )
    return NormClip(max_norm=as_ceiling(value, name))


def any_writes(policies: Mapping[str, Policy | None]) -> bool:
    """Return whether any of these policies can change a gradient; else they only measure."""
    return any(policy.writes for policy in policies.values() if policy)


def any_asked(policies: Mapping[str, Policy | None]) -> bool:
    """Return whether any of these policies is asked at each step, and may have a history."""
    return any(policy.fixed() is None for policy in policies.values() if policy)


def as_policies(value: object) -> tuple[dict[str, Policy | None], Division]:
    """Turn what a clipper accepts into policies by name.

    Returns:
        The policies by name pattern, or by "group 0" and so on, and which of these. None leaves
        the parameters of a pattern or group alone.

    Raises:
        ArgumentTypeError: GC011, for what is neither number, policy, mapping of strings nor list.
        ArgumentValueError: GC010, for a number out of range, or nothing to clip.
    """
    if isinstance(value, list | tuple):
        division: Division = "by group"
        entries = [(f"group {n}", f"policy[{n}]", entry) for n, entry in enumerate(value)]
    elif isinstance(value, Mapping):
        division = "by name"
        for pattern in value:
            if not isinstance(pattern, str):
                raise ArgumentTypeError(f"policy has the key {pattern!r}: expected a name pattern")
        entries = [(name, f"policy[{name!r}]", entry) for name, entry in value.items()]
    else:
        return {"*": as_policy(value)}, "whole"
    if not entries:
        kind = "mapping" if division == "by name" else "list"
        raise ArgumentValueError(f"policy is an empty {kind}, so nothing would be clipped")
    if all(entry is None for _, _, entry in entries):
        raise ArgumentValueError(f"policy={value!r} bounds nothing: every entry is None")
    return {
        name: None if entry is None else as_policy(entry, label) for name, label, entry in entries
    }, division


def as_given(
    policies: Mapping[str, Policy | None], division: Division
) -> Policy | Mapping[str, Policy | None] | tuple[Policy | None, ...]:
    """Return policies in the form in which they are given; it cannot be changed."""
    if division == "by group":
        return tuple(policies.values())
    if division == "by name":
        return MappingProxyType(dict(policies))
    (policy,) = policies.values()
    assert policy is not None  # one that bounds nothing was refused
    return policy
