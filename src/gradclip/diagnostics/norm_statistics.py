"""What the norms of a run say about a limit: where they settle, how they spread, how they move.

``advice.py`` has the rule that these numbers enter, and ``docs/how-to/choosing-a-limit.md`` its
evidence.
"""

import math
from dataclasses import dataclass

from gradclip.diagnostics.arrays import Numbers, np

__all__ = [
    "Level",
    "before_the_fall",
    "drift",
    "guard_limit",
    "has_collapsed",
    "has_plateau",
    "level",
    "round_up",
    "smoothed",
    "thirds",
]

_TIGHT = 1e-9


@dataclass(frozen=True)
class Level:
    """The level of a run's norms, after what came before it settled.

    Args:
        cut: How many norms were before that.
        median: The usual norm.
        p90: The norm that a tenth of the steps exceed.
        p99: Likewise a hundredth; None below 1000 norms, of which it is too uncertain.
        grid: The finest step of the log's numbers, where it is coarse; else 0.
        distinct: The share of norms that differ from all others before them.
        drift: The last third's median by the first third's.
        moves: Whether large norms are spread unevenly over the thirds.
        breadth: p90 by the median, of the middle one of five parts.
        lowest: The smallest median of five parts.
    """

    cut: int
    median: float
    p90: float
    p99: float | None
    grid: float
    distinct: float
    drift: float
    moves: bool
    breadth: float
    lowest: float


def level(norms: Numbers, rates: Numbers) -> Level:
    """Describe norms that are finite and above 0.

    Args:
        norms: At least 30 of them.
        rates: The learning rate of each; NaN where it is not known.
    """
    cut = min(max(_warmed_up(rates), _settled(np.log(norms))), int(0.3 * len(norms)))
    after = norms[cut:]
    median, p90 = (float(np.quantile(after, q)) for q in (0.5, 0.9))
    q = 1 - min(max(30 / len(after), 0.1), 0.3)
    above = [int((part > np.quantile(after, q)).sum()) for part in np.array_split(after, 3)]
    fifths = np.array_split(after, 5)
    distinct = np.unique(after)
    share = len(distinct) / len(after)
    return Level(
        cut=cut,
        median=median,
        p90=p90,
        p99=float(np.quantile(after, 0.99)) if len(after) >= 1000 else None,  # noqa: PLR2004
        grid=_grid(distinct, p90) if share < 0.5 else 0.0,  # noqa: PLR2004
        distinct=share,
        drift=drift(after),
        moves=(max(above) + 1) / (min(above) + 1) >= 4,  # noqa: PLR2004
        breadth=float(np.median([np.quantile(part, 0.9) / np.median(part) for part in fifths])),
        lowest=float(min(np.median(part) for part in fifths)),
    )


def guard_limit(found: Level) -> float:
    """Return the limit of a guard."""
    return round_up(min(2 * found.p90, 10 * found.median), found.grid)


def drift(norms: Numbers) -> float:
    """Return the last third's median by the first third's."""
    first, _, last = np.array_split(norms, 3)
    return float(np.median(last) / np.median(first))


def has_plateau(norms: Numbers) -> bool:
    """Return whether over 5 % of the norms are the largest one: they were taken after a clip."""
    return float((norms >= 0.999 * norms.max()).mean()) > 0.05  # noqa: PLR2004


def has_collapsed(norms: Numbers) -> bool:
    """Return whether the last fifth lies below 1 % of what the norms once were."""
    # Whole windows alone: of the six norms in the first one, three spikes would make the median.
    smooth = smoothed(norms, 11)[5:-5]
    return float(np.median(norms[-max(6, len(norms) // 5) :])) < 0.01 * float(smooth.max())


def before_the_fall(norms: Numbers) -> Numbers:
    """Return the part before norms that collapsed were below a tenth of what they once were."""
    smooth = smoothed(norms, 11)[5:-5]
    top = int(smooth.argmax())
    return norms[: top + 5 + int((smooth[top:] < 0.1 * smooth[top]).argmax())]


def thirds(is_above: Numbers) -> tuple[float, float, float]:
    """Return the mean of each third."""
    first, middle, last = (
        float(part.mean()) if len(part) else 0.0 for part in np.array_split(is_above, 3)
    )
    return first, middle, last


def round_up(value: float, grid: float = 0.0) -> float:
    """Return the next number of two digits that is not finer than a grid.

    >>> round_up(1.2345), round_up(0.0435, grid=0.01), round_up(160.0)
    (1.3, 0.05, 160.0)
    """
    digit = max(10.0 ** (math.floor(math.log10(value)) - 1), grid)
    return float(f"{math.ceil(value / digit - _TIGHT) * digit:.12g}")


def _warmed_up(rates: Numbers) -> int:
    """Return the first place where the learning rate is nearly at its highest."""
    if np.isnan(rates).all():
        return 0
    return int(np.argmax(rates >= 0.98 * np.nanmax(rates)))


def _settled(logs: Numbers) -> int:
    """Return the first place where the norms are as they are in the middle of the run."""
    latest = int(0.3 * len(logs))
    reference = logs[latest : int(0.6 * len(logs))]
    middle = float(np.median(reference))
    scatter = 1.4826 * float(np.median(np.abs(reference - middle)))
    near = np.abs(smoothed(logs, 5)[:latest] - middle) <= max(scatter, 0.05)
    return int(np.argmax(near)) if near.any() else latest


def smoothed(values: Numbers, width: int) -> Numbers:
    """Return the running median; at the ends of what is there."""
    half = width // 2
    padded = np.pad(values, half, constant_values=math.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)
    smooth: Numbers = np.nanmedian(windows, axis=1)
    return smooth


def _grid(distinct: Numbers, near: float) -> float:
    """Return the smallest step between numbers around a value."""
    around = distinct[(distinct > 0.5 * near) & (distinct < 2 * near)]
    return float(np.diff(around).min()) if len(around) > 1 else 0.0
