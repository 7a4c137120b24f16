"""The distribution of the norm with its limit, as an SVG that needs no script."""

import math

from gradclip.diagnostics.arrays import Numbers, np
from gradclip.report.words import number

__all__ = ["histogram"]

_WIDTH, _HEIGHT = 480, 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 8, 8, 26, 24
_BINS = 60
_LABEL = 70
"""Room for the label of a tick."""


def histogram(norms: Numbers, limit: float) -> str:
    """Draw norms that are above 0, on a log scale; nothing where they do not differ.

    Args:
        norms: Finite ones.
        limit: The last limit, or NaN.
    """
    logs = np.log10(norms[norms > 0])
    if len(logs) < 2 or logs.min() == logs.max():  # noqa: PLR2004
        return ""
    counts, edges = np.histogram(logs, bins=min(_BINS, max(8, len(logs) // 4)))
    first, last = float(edges[0]), float(edges[-1])
    has_limit = math.isfinite(limit) and limit > 0
    if has_limit:  # it is in the picture, unless it is far away
        place = math.log10(limit)
        margin = 0.03 * (last - first)
        first = min(first, max(place - margin, first - (last - first)))
        last = max(last, min(place + margin, last + (last - first)))
        has_limit = first <= place <= last
    inner = _HEIGHT - _TOP - _BOTTOM

    def x(value: float) -> float:
        return _LEFT + (value - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    drawn = []
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            height = max(1.0, count / counts.max() * inner)
            drawn.append(
                f'<rect class="bar-{"above" if has_limit and low >= place else "below"}" '
                f'x="{x(low):.1f}" y="{_TOP + inner - height:.1f}" '
                f'width="{max(1.0, x(high) - x(low) - 1):.1f}" height="{height:.1f}"/>'
            )
    base = _TOP + inner
    drawn.append(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>'
    )
    drawn += [
        f'<text x="{x(math.log10(tick)):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">'
        f"{number(tick)}</text>"
        for tick in _ticks(first, last)
    ]
    if has_limit:
        at = x(place)
        anchor, text = ("end", at - 6) if at > _WIDTH - _LABEL - 40 else ("start", at + 6)
        drawn.append(
            f'<line class="line c-limit dashed" x1="{at:.1f}" x2="{at:.1f}" y1="6" y2="{base}"/>'
            f'<text class="label c-limit" x="{text:.1f}" y="16" text-anchor="{anchor}">'
            f"limit {number(limit)}</text>"
        )
    low, high = number(float(norms.min())), number(float(norms.max()))
    told = f"Histogram of the norms on a log scale, from {low} to {high}"
    return (
        f'<svg class="histogram" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{told}">{"".join(drawn)}</svg>'
    )


def _ticks(first: float, last: float) -> list[float]:
    """Choose powers of ten, or finer steps where they are few, not too close to each other."""
    room = (_WIDTH - _LEFT - _RIGHT) // _LABEL
    exponents = range(math.floor(first), math.ceil(last) + 1)
    inside = 0.02 * (last - first)
    ticks: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10)), tuple(np.arange(1, 10, 0.2))):
        values = [float(f"{step * 10.0**exponent:.6g}") for exponent in exponents for step in steps]
        ticks = [v for v in values if first + inside <= math.log10(v) <= last - inside]
        if len(ticks) >= 3:  # noqa: PLR2004
            break
    return ticks[:: max(1, -(-len(ticks) // room))]
