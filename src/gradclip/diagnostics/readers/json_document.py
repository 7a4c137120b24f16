"""One JSON value of many lines: transformers' ``trainer_state.json``, a list, lists by name."""

import json
import re
from collections.abc import Iterable, Mapping
from itertools import chain, zip_longest
from typing import Any

from gradclip.diagnostics.readers.source import Source
from gradclip.diagnostics.readers.table import Table
from gradclip.diagnostics.readers.values import load_json

__all__ = ["claims", "read"]

_ASSIGNED = re.compile(
    r"\s*+(?:(?:export\s+)?(?:const|let|var)\s+)?[\w$.]{1,100}+\s*+=\s*+(?=[\[{])"
)
_BEGINS = re.compile(r'\s*(?:\{\s*(?:"|$)|\[\s*(?:[{\[]|$))')


def claims(source: Source) -> bool:
    """Return whether the file begins with a JSON value, and not with a line that is one."""
    text = _value_in(source.head.decode(source.encoding, errors="replace"))
    if not _BEGINS.match(text):
        return False
    try:
        _, end = json.JSONDecoder().raw_decode(text, len(text) - len(text.lstrip()))
    except (ValueError, RecursionError):  # most are longer than what is looked at
        return True
    # A log may begin with its configuration.
    return text[end:].lstrip(" \t\r\n,;")[:1] in ("", "{", "[")


def read(source: Source) -> Table:
    """Read the rows of the value."""
    try:
        values = load_json(_value_in(source.text()))
    except json.JSONDecodeError as error:
        raise source.error(f"it is not JSON: {error.msg}", error.lineno) from None
    except RecursionError:
        raise source.error("it is nested too deep", 1) from None
    is_state = any(isinstance(each, Mapping) and "log_history" in each for each in values)
    table = Table("trainer_state.json" if is_state else "JSON")
    for row in chain.from_iterable(map(_rows, values)):
        if isinstance(row, Mapping):
            table.add(row)
    return table


def _value_in(text: str) -> str:
    """Return a text without what JavaScript has before a value, in as many lines."""
    begin = _ASSIGNED.match(text)
    return "\n" * begin[0].count("\n") + text[begin.end() :] if begin else text


def _rows(value: Any) -> Iterable[Any]:
    """Return the rows: of a list, of the longest list in an object, of lists by name; or itself."""
    if isinstance(value, list):
        return value
    if not isinstance(value, Mapping):
        return ()
    if isinstance(value.get("log_history"), list):
        return _rows(value["log_history"])
    lists = {name: each for name, each in value.items() if isinstance(each, list)}
    of_rows = [each for each in lists.values() if each and isinstance(each[0], Mapping)]
    if of_rows:
        return max(of_rows, key=len)
    if not lists:
        return (value,)
    columns = {name: each for name, each in lists.items() if each}
    return (dict(zip(columns, row, strict=True)) for row in zip_longest(*columns.values()))
