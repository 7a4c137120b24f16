"""MLflow's file of one metric: time, value and step a line; its name is that of the file."""

import re

from gradclip.diagnostics.readers.source import Source
from gradclip.diagnostics.readers.table import Table

__all__ = ["claims", "read"]

_LINE = re.compile(r"\d{12,14} \S+ \d+")
_LOOKED_AT = 20


def claims(source: Source) -> bool:
    """Return whether the first lines are three numbers, of which one is a time."""
    lines = source.first_lines(_LOOKED_AT)
    complete = lines[:-1] or lines  # the last one may be cut off
    return bool(lines) and all(_LINE.fullmatch(line) for line in complete)


def read(source: Source) -> Table:
    """Read the values. A metric with slashes in its name is a file in folders."""
    parts = source.path.absolute().parts
    folders = parts[:-1]
    begin = len(folders) - folders[::-1].index("metrics") if "metrics" in folders else -1
    name = "/".join(parts[begin:])
    table = Table("MLflow metric")
    broken = None
    for number, line in source.lines():
        if broken is not None:
            raise broken
        if _LINE.fullmatch(line.strip()):
            _, value, step = line.split()
            table.add({name: value, "step": step})
        elif line.strip():  # the last one may be cut off
            broken = source.error("the line is not a time, a value and a step", number)
    return table
