"""What decides the coefficient: one file per policy, each named in the union here."""

from collections.abc import Mapping
from typing import Annotated, TypeAlias

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
            "NormClip(max_norm=1.0), or a mapping of name patterns to those"
        )
    return NormClip(max_norm=as_ceiling(value, name))


def any_writes(policies: Mapping[str, Policy | None]) -> bool:
    """Return whether any of these policies can change a gradient; else they only measure."""
    return any(policy.writes for policy in policies.values() if policy)


def as_policies(value: object) -> tuple[dict[str, Policy | None], bool]:
    """Turn what a clipper accepts into policies by pattern.

    Returns:
        The policies by name pattern, and whether patterns were given at all. None leaves the
        parameters of a pattern alone.

    Raises:
        ArgumentTypeError: GC011, for what is neither number, policy nor mapping of strings.
        ArgumentValueError: GC010, for a number out of range, or an empty mapping.
    """
    if not isinstance(value, Mapping):
        return {"*": as_policy(value)}, False
    if not value:
        raise ArgumentValueError("policy is an empty mapping, so nothing would be clipped")
    for pattern in value:
        if not isinstance(pattern, str):
            raise ArgumentTypeError(f"policy has the key {pattern!r}: expected a name pattern")
    if all(entry is None for entry in value.values()):
        raise ArgumentValueError(f"policy={value!r} bounds nothing: every pattern has None")
    return {
        pattern: None if entry is None else as_policy(entry, f"policy[{pattern!r}]")
        for pattern, entry in value.items()
    }, True
