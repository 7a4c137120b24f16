"""The field of a configuration that has a policy, one for each name pattern, or a list of them."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import (
    BeforeValidator,
    Discriminator,
    SerializerFunctionWrapHandler,
    Tag,
    WrapSerializer,
)

from gradclip.clipping import AnyPolicy, Policy
from gradclip.clipping.policies import BUILT_IN
from gradclip.config import Ceiling, ConfigOf

__all__ = ["PolicyByGroup", "PolicyByPattern", "PolicyField", "PolicyOrNumber"]


def _read_none(policies: Any) -> Any:
    if isinstance(policies, list | tuple):
        return [None if each == "none" else each for each in policies]
    if not isinstance(policies, Mapping):
        return policies
    return {pattern: None if each == "none" else each for pattern, each in policies.items()}


def _write_none(policies: Any, write: SerializerFunctionWrapHandler) -> Any:
    written = write(policies)
    if not isinstance(written, Mapping):
        return ["none" if each is None else each for each in written]
    return {pattern: "none" if each is None else each for pattern, each in written.items()}


_SAYS_WHICH = {"clip_mode", "class_type"}
_FIELDS = {"class_type", *(name for policy in BUILT_IN for name in policy.model_fields)}


def _kind(value: Any) -> str:
    """Tell what a policy was given as, so that an error speaks of that alone."""
    if isinstance(value, Mapping):
        return "named" if "class_type" in value else "policy"
    if isinstance(value, Policy):
        return "policy" if type(value) in BUILT_IN else "named"
    return "number"


def _kind_or_patterns(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "groups"
    if not isinstance(value, Mapping):
        return _kind(value)
    # A parameter may be called "z" or "q": one name of a field makes no policy of patterns.
    names = value.keys()
    by_pattern = not (_SAYS_WHICH & names or (names and names <= _FIELDS))
    return "patterns" if by_pattern else _kind(value)


PolicyOrNumber: TypeAlias = Annotated[
    Annotated[AnyPolicy, Tag("policy")]
    | Annotated[ConfigOf[Policy], Tag("named")]
    | Annotated[Ceiling, Tag("number")],
    Discriminator(_kind),
]
PolicyByPattern: TypeAlias = Annotated[
    dict[str, PolicyOrNumber | None],
    BeforeValidator(_read_none),
    # TOML has no null, and a pattern that is left out would mean something else.
    WrapSerializer(_write_none, when_used="json"),
]
PolicyByGroup: TypeAlias = Annotated[
    tuple[PolicyOrNumber | None, ...],
    BeforeValidator(_read_none),
    WrapSerializer(_write_none, when_used="json"),
]
PolicyField: TypeAlias = Annotated[
    Annotated[AnyPolicy, Tag("policy")]
    | Annotated[ConfigOf[Policy], Tag("named")]
    | Annotated[Ceiling, Tag("number")]
    | Annotated[PolicyByPattern, Tag("patterns")]
    | Annotated[PolicyByGroup, Tag("groups")],
    Discriminator(_kind_or_patterns),
]
