"""How numbers and names are written in the sentences of the report."""

import math
from collections.abc import Sequence

from gradclip.diagnostics.summary import compact

__all__ = ["begun", "counted", "joined", "number", "share", "titled"]


def number(value: float) -> str:
    """Write a number in three digits, and a dash for none.

    >>> number(0.2034), number(1190.4), number(2.5e7), number(math.nan)
    ('0.203', '1,190', '2.5e7', '\N{EN DASH}')
    """
    if not math.isfinite(value):
        return "\N{EN DASH}"
    if 1000 <= abs(value) < 1e5:  # noqa: PLR2004
        return f"{float(f'{value:.3g}'):,.0f}"
    return compact(value)


def share(part: float) -> str:
    """Write a share in per cent, in two digits below 10 %.

    >>> share(0.0164), share(0.4142), share(0.9996), share(0.0), share(1.0)
    ('1.6 %', '41 %', '99.9 %', '0 %', '100 %')
    """
    cent = 100 * part
    if 99 < cent < 100:  # noqa: PLR2004 - not all of it
        return f"{min(cent, 99.9):.1f} %"
    if cent >= 9.95 or cent == 0:  # noqa: PLR2004
        return f"{cent:.0f} %"
    return f"{cent:.2g} %" if cent >= 0.01 else "below 0.01 %"  # noqa: PLR2004


def counted(count: int, what: str = "step") -> str:
    """Write a number of things.

    >>> counted(1), counted(5000, "logged step")
    ('1 step', '5,000 logged steps')
    """
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def joined(names: Sequence[str]) -> str:
    """Write a list.

    >>> joined(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def begun(text: str) -> str:
    """Begin a sentence."""
    return text[:1].upper() + text[1:]


def titled(layer: str) -> str:
    """Begin a sentence with a layer; names of modules stay as they are."""
    return begun(layer) if layer.startswith("layer ") else layer
