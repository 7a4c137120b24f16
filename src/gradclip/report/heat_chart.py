"""The chart of the heat map: its numbers for the script, its rows, and its words."""

import base64
import zlib
from html import escape
from typing import Any

from gradclip.diagnostics.arrays import Places, np
from gradclip.diagnostics.blame import Blame
from gradclip.diagnostics.known import Known
from gradclip.diagnostics.layers import layers_of, short_names
from gradclip.report.faults import Faults
from gradclip.report.heat import Heat, heat_of, rows_of
from gradclip.report.html import chart, section

__all__ = ["deflated", "heat_chart"]

_HOT = 8
"""Rows that are named."""
_FLOOR = 0.01
"""The least share that makes a parameter hot."""
_FAULTS = 4000
"""Norms that are not finite, and are drawn as dots."""
_ROW, _LOWEST, _HIGHEST = 18, 90, 500
"""Heights, in pixels."""
_POOLED = 1.5
"""Steps of a column from which on it says so."""
_KEY = (
    '<p class="key">{maker}<span>0.1 \N{MULTIPLICATION SIGN}</span>'
    '<canvas class="scale" width="180" height="1" role="img" '
    'aria-label="Colours: blue is a tenth of the usual norm, pale the usual one, orange '
    'ten times and dark a hundred times that"></canvas>'
    "<span>100 \N{MULTIPLICATION SIGN} usual</span>{faults}</p>"
)
_NOT_FINITE = '<span class="bad">\N{BLACK CIRCLE} not finite</span>'
_BAR = "\N{LEFT HALF BLOCK}"
_COMPARED = (
    '<span class="versus">Compared with <select class="compared" aria-label="Compared with">'
    '<option value="both">its own median, and the others at that step</option>'
    '<option value="own">its own median</option></select></span>'
)


def heat_chart(
    run: Known, found: Blame | None, faults: Faults, level: int
) -> tuple[str, dict[str, Any]]:
    """Return the part of the heat map, and what the script draws there.

    Args:
        run: A run with the norms of parameters.
        found: Which layer has how much of them.
        faults: Where they are not finite.
        level: Of the heading.
    """
    assert run.parameters is not None
    names = run.parameters.names
    rows, layers = rows_of(names), layers_of(names)
    heat = heat_of(run.parameters, rows, int(run.step[0]), int(run.step[-1]))
    row_of = np.searchsorted(rows.starts, np.arange(len(names)), side="right") - 1
    bad = {(step, int(row_of[column])) for step, column in faults.points}
    data = {
        **_numbers(heat),
        "names": rows.names,
        "labels": short_names(rows.names),
        "ticks": [
            [int(row_of[np.argmax(layers.of == at)]), tick]
            for at, tick in enumerate(layers.ticks)
            if tick
        ],
        "hot": _hot(found, row_of),
        "makers": _makers(found, row_of),
        "bad": sorted(bad)[:_FAULTS],
    }
    told = "Heat map of the norms by step"
    if found is not None:
        told += f"; {found.layers.names[found.layer]} has the most; the table below has the numbers"
    height = min(_HIGHEST, max(_LOWEST, _ROW * len(rows.names) + 26))
    is_pooled = heat.per_column >= _POOLED
    each = f", the largest of each {heat.per_column:,.0f} steps" if is_pooled else ""
    note = f"Each row is a {rows.are}, in the model's order{each}. {_COMPARED}"
    title = "Which layer explodes" if len(layers.names) > 1 else "The norm of each parameter"
    maker = ""
    if found is not None and data["makers"]:
        name = escape(found.layers.names[found.layer])
        maker = f'<span class="maker">{_BAR}</span><span class="whose">{name}</span>'
    key = _KEY.format(faults=_NOT_FINITE if bad else "", maker=maker)
    return section(title, level, chart("heat", told, height=height) + key, note), data


def deflated(data: bytes) -> str:
    """Return bytes as text, which the script unpacks."""
    return base64.b64encode(zlib.compress(data, 9)).decode("ascii")


def _numbers(heat: Heat) -> dict[str, Any]:
    """Return the codes, first the high bytes of all, which compress well, then the low ones."""
    planes = np.concatenate([heat.codes >> 8, heat.codes & 255]).astype(np.uint8)
    return {
        "rows": heat.codes.shape[0],
        "columns": heat.codes.shape[1],
        "low": heat.low,
        "unit": heat.unit,
        "perColumn": heat.per_column,
        "codes": deflated(planes.tobytes()),
    }


def _makers(found: Blame | None, row_of: Places) -> list[int]:
    """Return the rows of the layer that makes the spikes, which are marked."""
    if found is None or found.verdict != "makes":
        return []
    return sorted(set(row_of[found.layers.of == found.layer].tolist()))


def _hot(found: Blame | None, row_of: Places) -> list[int]:
    """Return the rows to name: by share, where that is above the usual."""
    if found is None:
        return []
    part, usual = found.of_parameters, found.usual_of_parameters
    floor = max(_FLOOR, 3 * float(np.median(part)))
    first = np.argsort(-part, kind="stable")[:_HOT]
    hot = first[(part[first] > floor) & ((part[first] > usual[first]) | (not found.steps))]
    return sorted(set(row_of[hot].tolist()))
