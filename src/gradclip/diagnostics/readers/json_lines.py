"""One JSON object a line, or several glued to each other; among them perhaps a whole state."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from gradclip.diagnostics.readers import keys
from gradclip.diagnostics.readers.source import Source
from gradclip.diagnostics.readers.table import Table
from gradclip.diagnostics.readers.values import load_json

__all__ = ["claims", "read"]

_LOOKED_AT = 50
_MOST = 0.9


def claims(source: Source) -> bool:
    """Return whether the first lines are objects."""
    lines = source.first_lines(_LOOKED_AT)
    if not lines:  # one line that is longer than the head
        return source.head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b'{"')
    begun = [line.startswith('{"') for line in lines]
    return begun[0] and lines[0].endswith("}") and sum(begun) >= _MOST * len(begun)


def read(source: Source) -> Table:
    """Read the objects. A last line that is cut off is left out."""
    table = Table("JSONL")
    history: list[Any] = []
    for value in _objects(source):
        if isinstance(value.get("log_history"), list):
            history = value["log_history"]
        else:
            table.add(value)
    if not any(keys.rank(name, keys.NORMS) is not None for name in table.names):
        # Else it is a copy of what the other lines have.
        table.format = "trainer_state.json" if history else table.format
        for row in history:
            if isinstance(row, Mapping):
                table.add(row)
    return table


def _objects(source: Source) -> Iterator[Mapping[str, Any]]:
    broken, count = None, 0
    for number, line in source.lines():
        if not line.strip():
            continue
        if broken is not None:
            raise broken
        try:
            values = load_json(line)
        except json.JSONDecodeError as error:
            broken = source.error(f"the line is not JSON: {error.msg}", number)
            continue
        except RecursionError:
            raise source.error("the line is nested too deep", number) from None
        count += len(values)
        yield from (value for value in values if isinstance(value, Mapping))
    if broken is not None and not count:
        raise broken
