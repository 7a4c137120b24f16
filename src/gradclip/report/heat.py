"""The heat map's numbers: the norm of each parameter, the largest of each column of steps.

Codes of 16 bits: 0 is not recorded, 1 a norm of 0, 65535 not finite; the rest is log10 of the norm
in steps of half a per cent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradclip.diagnostics.arrays import Numbers, Places, np
from gradclip.record.reader import Norms

__all__ = ["Heat", "Rows", "heat_of", "rows_of"]

_COLUMNS = 1000
_ROWS = 600
_FINEST = 0.00217
"""log10 of 1.005."""
_FIRST, _LAST, _BAD = 2, 65_000, 65_535


@dataclass(frozen=True, eq=False)
class Rows:
    """What each row of the map is: a parameter, or several beside each other.

    Attributes:
        names: Of the rows.
        starts: The first parameter of each.
        are: What a row is, in a word.
    """

    names: list[str]
    starts: Places
    are: str


@dataclass(frozen=True, eq=False)
class Heat:
    """The map.

    Attributes:
        codes: uint16 (rows, columns).
        low: log10 of the norm that has the first code.
        unit: log10 of the factor from one code to the next.
        per_column: Steps of a column.
    """

    codes: np.ndarray[Any, Any]
    low: float
    unit: float
    per_column: float


def rows_of(names: Sequence[str]) -> Rows:
    """Return the rows: parameters, or where those are very many, the modules they are of."""
    if len(names) <= _ROWS:
        return Rows(list(names), np.arange(len(names)), "parameter")
    for depth in range(max(name.count(".") for name in names), 0, -1):
        starts = [".".join(name.split(".")[:depth]) for name in names]
        first = [at for at, name in enumerate(starts) if not at or name != starts[at - 1]]
        if len(first) <= _ROWS:
            return Rows([starts[at] for at in first], np.array(first), "module")
    first = np.linspace(0, len(names), _ROWS, endpoint=False).astype(np.int64).tolist()
    return Rows([f"{names[at]} and on" for at in first], np.array(first), "run of parameters")


def heat_of(norms: Norms, rows: Rows, first: int, last: int) -> Heat:
    """Pool the norms into columns.

    Args:
        norms: Of each parameter, by step.
        rows: Which belong to a row, whose norm is that of all.
        first: The run's first step, where the first column begins.
        last: The run's last step.
    """
    span = last - first + 1
    apart = np.diff(norms.steps)
    usual = float(np.quantile(apart, 0.95)) if len(apart) else 1.0
    columns = int(max(1, min(_COLUMNS, span, -(-span // max(usual, 1.0)))))
    column = (norms.steps - first) * columns // span
    inside = (column >= 0) & (column < columns)
    column, values = column[inside], norms.norms[inside]
    begins = np.flatnonzero(np.diff(column, prepend=-1))
    pooled = np.empty((len(begins), len(rows.starts)))
    for place, (start, end) in enumerate(
        zip(begins, [*begins[1:], len(column)], strict=True)  # a few rows at a time
    ):
        part = _together(values[start:end], rows.starts)
        pooled[place] = np.where(np.isfinite(part), part, np.inf).max(0)
    known = pooled[np.isfinite(pooled) & (pooled > 0)]
    low = float(np.log10(known.min())) if len(known) else 0.0
    high = float(np.log10(known.max())) if len(known) else 0.0
    unit = max(_FINEST, (high - low) / (_LAST - _FIRST))
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.round((np.log10(pooled) - low) / unit) + _FIRST
    codes = np.where(pooled == 0, 1, np.where(np.isfinite(pooled), codes, _BAD))
    held = np.searchsorted(column[begins], np.arange(columns), side="right") - 1
    full = np.where(held[:, None] >= 0, codes[np.maximum(held, 0)], 0)  # a gap: as before it
    return Heat(full.T.astype(np.uint16), low, unit, span / columns)


def _together(norms: Numbers, starts: Places) -> Numbers:
    if len(starts) == norms.shape[1]:
        return norms
    largest = np.maximum.reduceat(norms, starts, axis=1)
    counts = np.diff(np.append(starts, norms.shape[1]))
    scale = np.where(np.isfinite(largest) & (largest > 0), largest, 1.0)
    scaled = (norms / np.repeat(scale, counts, axis=1)) ** 2
    together: Numbers = scale * np.sqrt(np.add.reduceat(scaled, starts, axis=1))
    return together
