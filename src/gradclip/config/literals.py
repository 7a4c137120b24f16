"""Numbers as files spell them: what some reader would take for another number is refused."""

import re
from math import isfinite
from typing import Final

__all__ = ["AMBIGUOUS_IN_YAML", "as_number", "why_ambiguous"]

AMBIGUOUS_IN_YAML: Final = re.compile(
    r"[-+]?(?:0o?[0-9_]+|[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?)\Z"
)
"""What YAML 1.1 and YAML 1.2 read differently: ``010``, ``0o10``, ``1:30``."""
_SHOWN = 40


def as_number(literal: str) -> float:
    """Read a decimal number.

    Raises:
        ValueError: It is NaN, or too large or too small for a float. ``inf`` is a number.

    Example:
        >>> as_number("1e-3"), as_number("-inf")
        (0.001, -inf)
    """
    value = float(literal)
    no_number = f"{_short(literal)} is not a number that a configuration can hold"
    if not isfinite(value) and literal.lstrip("+-") != "inf":
        raise ValueError(f'{no_number}\nan infinite limit is written "inf"; NaN is no limit')
    if value == 0 and re.search("[1-9]", re.split("[eE]", literal)[0]):
        raise ValueError(f"{no_number}: no float is so close to zero\nzero is written 0.0")
    return value


def why_ambiguous(literal: str) -> str:
    """Say how the versions of YAML read such a number, and how to write it."""
    readings = "a number in base 60, or text" if ":" in literal else "octal, decimal, or text"
    return (
        f"{_short(literal)} means different things in YAML 1.1 and YAML 1.2: {readings}\n"
        "write the decimal number without a leading zero, or put it in quotes where it is text"
    )


def _short(literal: str) -> str:
    return literal if len(literal) <= _SHOWN else literal[:_SHOWN] + "..."
