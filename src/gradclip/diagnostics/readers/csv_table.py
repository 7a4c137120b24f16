"""CSV with a header: Lightning's sparse ``metrics.csv``, exports of W&B, stable-baselines.

Tables whose columns are parted by bars or blanks are read, too.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from typing import Any

from gradclip.diagnostics.readers.source import Source
from gradclip.diagnostics.readers.table import Table
from gradclip.diagnostics.readers.values import as_number

__all__ = ["claims", "read"]

_DELIMITERS = ",;\t|"
_LOOKED_AT = 20
_MOST = 0.8
_LIKE_A_PAIR = re.compile(r"(?:[:=]|\s)\s*['\"]?[-+]?\.?\d[^\s]*$|[{}=]")
_RULE = re.compile(r"[\s|:+-]+")
"""A line between a header and its rows."""
_DECIMAL_COMMA = re.compile(r"\s*[-+]?\d+,\d+(?:[eE][-+]?\d+)?\s*")
_WITHOUT_END = "unexpected end of data"


def claims(source: Source) -> bool:
    """Return whether the first line names columns, and the next ones have as many cells."""
    lines = [line for line in source.first_lines(_LOOKED_AT) if _is_row(line)]
    if len(lines) < 2:  # noqa: PLR2004 - a header and a row
        return False
    delimiter = _delimiter(lines[0])
    try:
        header, *rows = (next(_reader([line], delimiter)) for line in lines)
    except (csv.Error, ValueError):
        return False
    if len(header) < 2 or not _are_names(header):  # noqa: PLR2004
        return False
    if sum(bool(_LIKE_A_PAIR.search(cell)) for cell in header) > len(header) / 2:
        return False
    alike = [len(row) == len(header) and (delimiter != " " or not _are_names(row)) for row in rows]
    return sum(alike) >= _MOST * len(alike)


def read(source: Source) -> Table:
    """Read the rows by the names of the header; a cell that is empty is missing."""
    numbers = [0]
    lines = _lines(source, numbers)
    first = next(lines)
    header = next(_reader([first], delimiter := _delimiter(first)))
    names = _names(header)
    table = Table("CSV" if delimiter not in "| " else "table")
    rows = _reader(lines, delimiter, strict=True)
    while True:
        begin, read_before = numbers[0] + 1, rows.line_num
        try:
            row = next(rows, None)
        except csv.Error as error:
            if str(error) == _WITHOUT_END and rows.line_num - read_before == 1:
                return table  # a last line that is cut off
            raise source.error(f"the line is not CSV, {error}", begin) from None
        if row is None:
            return table
        if len(row) > 1 and all(row) and _are_names(row) and not {*names}.isdisjoint(row):
            names = _names(row)  # another table is behind the first
            continue
        if delimiter == ";":
            row = [c.replace(",", ".") if _DECIMAL_COMMA.fullmatch(c) else c for c in row]
        table.add(dict(zip(names, row, strict=False)))


def _reader(lines: Iterable[str], delimiter: str, *, strict: bool = False) -> Any:
    # Blanks that align columns are one delimiter.
    return csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=strict)


def _names(header: list[str]) -> list[str]:
    return [name.strip() or f"column {place}" for place, name in enumerate(header, start=1)]


def _are_names(row: list[str]) -> bool:
    return all(as_number(cell) is None for cell in row)


def _is_row(line: str) -> bool:
    return bool(line.strip()) and not line.startswith("#") and not _RULE.fullmatch(line)


def _lines(source: Source, numbers: list[int]) -> Iterator[str]:
    """Yield the lines from the header on, and note the number of each."""
    for number, line in source.lines():
        numbers[0] = number
        if _is_row(line):
            yield line.strip(" ")


def _delimiter(header: str) -> str:
    found = max(_DELIMITERS, key=header.count)
    return found if found in header else " "
