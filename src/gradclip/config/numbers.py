"""The numbers that bound gradients, checked the same way in a configuration and in a call."""

from collections.abc import Callable
from math import inf
from numbers import Real
from reprlib import Repr
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationInfo
from pydantic_core import PydanticCustomError

from gradclip.errors import ArgumentTypeError, ArgumentValueError

_repr = Repr()
_repr.maxstring = _repr.maxother = 60

__all__ = ["Ceiling", "NormOrder", "as_ceiling", "as_norm_order"]


def as_ceiling(value: object, name: str) -> float:
    """Check what gradients may reach: a number >= 0; ``inf`` or ``"inf"`` limits nothing.

    Args:
        value: A number, ``"inf"``, or a tensor with one element.
        name: The argument's name, for the message.

    Returns:
        The number, as a float.

    Raises:
        ArgumentValueError: GC010, negative, NaN, or not exactly one element.
        ArgumentTypeError: GC011, not a number; True, False and other strings are none.
    """
    number = _number(value, name)
    if number >= 0:
        return number + 0.0  # not -0.0
    raise ArgumentValueError(
        f"{name} is {number!r}: expected a number >= 0, because no norm is below zero or NaN; "
        "0 makes every gradient zero, inf measures and never scales"
    )


def as_norm_order(value: object, name: str = "norm_type") -> float:
    """Check the p of a p-norm: a number > 0, ``inf`` or ``"inf"``.

    Args:
        value: A number, ``"inf"``, or a tensor with one element.
        name: The argument's name, for the message.

    Returns:
        The number, as a float.

    Raises:
        ArgumentValueError: GC010, zero, negative, NaN, or not exactly one element.
        ArgumentTypeError: GC011, not a number.
    """
    number = _number(value, name)
    if number > 0:
        return number
    raise ArgumentValueError(
        f"{name} is {number!r}: expected a number > 0 or inf, because only those orders are norms; "
        "2 is the Euclidean norm, inf the largest element"
    )


def _number(value: Any, name: str) -> float:
    if type(value) is float:
        return value
    seen = _repr.repr(value)
    if hasattr(value, "numel"):  # a tensor: this module does not know torch
        if value.numel() != 1:
            raise ArgumentValueError(
                f"{name} is a tensor with {value.numel()} elements: expected one number"
            )
        value = value.item()
    if isinstance(value, str) and value == "inf":
        return inf
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError(
            f"{name} is {seen}, of type {type(value).__name__}: expected a number"
            + (', or "inf"' if isinstance(value, str) else "")
            + (_LIST if isinstance(value, list | tuple) else "")
        )
    try:
        return float(value)
    except OverflowError:
        raise ArgumentValueError(
            f"{name} is too large for a float; inf is a value of its own"
        ) from None


_LIST = (
    ". A list of limits, one for each param_group, goes to what knows the optimizer, such as "
    "gradclip.attach(optimizer, [0.5, 1.0])"
)


def _in_config(check: Callable[[object, str], float]) -> Callable[[object, ValidationInfo], float]:
    def validate(value: object, info: ValidationInfo) -> float:
        name = info.field_name or "the value"
        if hasattr(value, "numel"):
            raise PydanticCustomError(
                "tensor", f"{name} is a tensor: a configuration holds numbers"
            )
        try:
            return check(value, name)
        except ArgumentTypeError as error:  # a TypeError would pass through pydantic
            raise PydanticCustomError("number_type", "{error}", {"error": str(error)}) from None

    return validate


def _write(value: float) -> float | str:
    return "inf" if value == inf else value


_INFINITY_AS_TEXT = PlainSerializer(_write, when_used="json")

Ceiling = Annotated[
    float, Field(allow_inf_nan=True), BeforeValidator(_in_config(as_ceiling)), _INFINITY_AS_TEXT
]
"""A field >= 0 that may be infinite; written to a file as ``"inf"`` then."""

NormOrder = Annotated[
    float, Field(allow_inf_nan=True), BeforeValidator(_in_config(as_norm_order)), _INFINITY_AS_TEXT
]
"""A field > 0 that may be infinite; written to a file as ``"inf"`` then."""
