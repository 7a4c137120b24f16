"""CSV with a header: Lightning's sparse ``metrics.csv``, exports of W&B, stable-baselines."""

import csv
import re
from collections.abc import Iterator

from gradclip.diagnostics.readers.source import Source
from gradclip.diagnostics.readers.table import Table
from gradclip.diagnostics.readers.values import as_number

__all__ = ["claims", "read"]

_DELIMITERS = ",;\t"
_LOOKED_AT = 20
_MOST = 0.8
_LIKE_A_PAIR = re.compile(r"(?:[:=]|\s)\s*[-+]?\.?\d[^\s]*$|[{}=]")


def claims(source: Source) -> bool:
    """Return whether the first line names columns, and the next ones have as many cells."""
    lines = [line for line in source.first_lines(_LOOKED_AT) if not line.startswith("#")]
    if len(lines) < 2:  # noqa: PLR2004 - a header and a row
        return False
    delimiter = _delimiter(lines[0])
    try:
        header, *rows = csv.reader(lines, delimiter=delimiter)
    except (csv.Error, ValueError):
        return False
    if len(header) < 2 or any(as_number(cell) is not None for cell in header):  # noqa: PLR2004
        return False
    if sum(bool(_LIKE_A_PAIR.search(cell)) for cell in header) > len(header) / 2:
        return False
    alike = [len(row) == len(header) for row in rows]
    return sum(alike) >= _MOST * len(alike)


def read(source: Source) -> Table:
    """Read the rows by the names of the header; a cell that is empty is missing."""
    numbers = [0]
    lines = _lines(source, numbers)
    first = next(lines)
    header = next(csv.reader([first], delimiter=(delimiter := _delimiter(first))))
    names = [name.strip() or f"column {place}" for place, name in enumerate(header, start=1)]
    table = Table("CSV")
    try:
        for row in csv.reader(lines, delimiter=delimiter):
            table.add(dict(zip(names, row, strict=False)))
    except csv.Error as error:
        raise source.error(f"the line is not CSV, {error}", numbers[0]) from None
    return table


def _lines(source: Source, numbers: list[int]) -> Iterator[str]:
    """Yield the lines from the header on, and note the number of each."""
    for number, line in source.lines():
        numbers[0] = number
        if line.strip() and not line.startswith("#"):
            yield line


def _delimiter(header: str) -> str:
    return max(_DELIMITERS, key=header.count)
