"""What every reader makes of a file: numbers by column, most of which are missing."""

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

from gradclip.diagnostics.arrays import Numbers, Places, np
from gradclip.diagnostics.readers.values import as_number

__all__ = ["Table"]

_DEEPEST = 4
_LONGEST_NAME = 200
_MOST_COLUMNS = 20_000
"""Names beyond these are left out: something counts in them."""
_NAMES_OF_ONE = ("key", "metric", "tag")


@dataclass
class _Column:
    rows: "array[int]" = field(default_factory=lambda: array("q"))
    values: "array[float]" = field(default_factory=lambda: array("d"))


class Table:
    """Rows of numbers by name.

    Args:
        format: What the file is, in a word or two.
        framework: Which framework wrote it, where the file says so.
    """

    def __init__(self, format: str, framework: str | None = None) -> None:  # noqa: A002 - the word users know
        self.format = format
        self.framework = framework
        self.rows = 0
        self._columns: dict[str, _Column] = {}

    @property
    def names(self) -> list[str]:
        """The columns that hold a number anywhere, in the order of their first ones."""
        return list(self._columns)

    def add(self, row: Mapping[str, object]) -> None:
        """Add a row; cells that are no numbers are left out, and mappings in it are opened."""
        name = next((row[key] for key in _NAMES_OF_ONE if isinstance(row.get(key), str)), None)
        if isinstance(name, str) and "value" in row:  # one measurement a row, as MLflow has them
            row = {**row, name: row["value"]}
        self._put(row, "", _DEEPEST)
        self.rows += 1

    def count(self, name: str) -> int:
        """Return how many rows have a number in a column."""
        return len(self._columns[name].rows)

    def column(self, name: str | None) -> Numbers:
        """Return a column, with NaN where it has no number."""
        full = np.full(self.rows, math.nan)
        if name is not None:
            found = self._columns[name]
            full[np.frombuffer(found.rows, np.int64)] = np.frombuffer(found.values, np.float64)
        return full

    def rows_of(self, name: str) -> Places:
        """Return the rows that have a number in a column."""
        return np.frombuffer(self._columns[name].rows, np.int64).copy()

    def _put(self, row: Mapping[str, object], prefix: str, depth: int) -> None:
        for key, cell in row.items():
            name = f"{prefix}{key}"
            if isinstance(cell, Mapping):
                if depth:
                    self._put(cell, f"{name}/", depth - 1)
                continue
            value = as_number(cell)
            if value is None or len(name) > _LONGEST_NAME:
                continue
            column = self._columns.get(name)
            if column is None:
                if len(self._columns) == _MOST_COLUMNS:
                    continue
                column = self._columns[name] = _Column()
            if column.rows and column.rows[-1] == self.rows:  # named twice in a row: the last
                column.values[-1] = value
            else:
                column.rows.append(self.rows)
                column.values.append(value)
