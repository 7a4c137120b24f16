"""One cell of a log as a number: every spelling that training scripts print."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

__all__ = ["as_number", "load_json"]

_LONGEST = 10_000
_MISSING = frozenset({"", "none", "null", "n/a", "na", "?", "-", "--", "<na>"})
_NOT_FINITE = {
    "nan(ind)": math.nan,
    "nan(snan)": math.nan,
    "1.#qnan": math.nan,
    "1.#ind": math.nan,
    "1.#inf": math.inf,
}
_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9}
_SUFFIXED = re.compile(r"([-+]?[\d.]+)([KMB])")
_FRACTION = re.compile(r"(\d+)\s*/\s*\d+")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d*)?")
_WRAPPED = re.compile(r"[A-Za-z_][\w.]*\(([^(),]+)(?:,[^()]*)?\)")
_DECODER = json.JSONDecoder(parse_int=float)
_BETWEEN = re.compile(r"[\s,;]*")
_STRING_OR_WORD = re.compile(
    r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)'  # one without an end goes on to the end, once
    r"|(?<![\w.])(?P<missing>None|undefined)(?![\w.])"
    r"|(?<![\w.])(?P<bool>True|False)(?![\w.])"
    r"|(?<![\w.])(?P<nan>[-+]?(?:nan|NaN|NAN)(?:\((?:ind|snan)\))?)(?![\w.(])"
    r"|(?<![\w.])(?P<inf>(?P<sign>[-+]?)(?:[iI]nf|INF|[iI]nfinity))(?![\w.])",
    re.DOTALL,
)


def as_number(cell: object) -> float | None:
    """Return a cell as a number: NaN and infinity are numbers, None is no number.

    >>> as_number("1.01e+04"), as_number("10/438"), as_number("10K"), as_number("np.float64(0.5)")
    (10100.0, 10.0, 10000.0, 0.5)
    >>> as_number("Infinity"), as_number("None"), as_number("warm-up")
    (inf, None, None)
    """
    if isinstance(cell, bool):
        return None
    if isinstance(cell, int | float):
        try:
            return float(cell)
        except OverflowError:
            return math.copysign(math.inf, cell)
    return _of_text(cell.strip()) if isinstance(cell, str) and len(cell) < _LONGEST else None


def _of_text(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        lower = text.lower()
    if lower in _MISSING:
        return None
    if (known := _NOT_FINITE.get(lower.lstrip("+-"))) is not None:
        return -known if lower.startswith("-") else known
    if found := _SUFFIXED.fullmatch(text):
        number = as_number(found[1])
        return None if number is None else number * _SUFFIXES[found[2]]
    if _THOUSANDS.fullmatch(text):
        return float(text.replace(",", ""))
    found = _FRACTION.fullmatch(text) or _WRAPPED.fullmatch(text)
    return as_number(found[1]) if found else None


def load_json(text: str) -> list[Any]:
    """Read JSON values one behind the other, and in them also ``nan``, ``-inf`` and ``None``.

    A whole number of any length is read as a float.

    Raises:
        ValueError: It is not JSON.
        RecursionError: It is nested too deep.

    >>> load_json('{"a": nan}{"a": 1}')
    [{'a': nan}, {'a': 1.0}]
    """
    try:
        return list(_values(text))
    except ValueError:
        mended = _STRING_OR_WORD.sub(_json_word, text)
        if mended == text:
            raise
        return list(_values(mended))


def _values(text: str) -> Iterator[Any]:
    place = _BETWEEN.match(text).end()  # type: ignore[union-attr]  # it matches nothing, too
    while place < len(text):
        value, place = _DECODER.raw_decode(text, place)
        yield value
        place = _BETWEEN.match(text, place).end()  # type: ignore[union-attr]


def _json_word(found: re.Match[str]) -> str:
    if found["missing"]:
        return "null"
    if found["bool"]:
        return found["bool"].lower()
    if found["nan"]:
        return "NaN"
    return f"{found['sign'].rstrip('+')}Infinity" if found["inf"] else found[0]
