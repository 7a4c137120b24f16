"""The numbers behind the lines: of each step, or of buckets of steps where there are very many.

A bucket keeps the smallest, the middle and the largest number of each series, so that nothing that
stands out is lost. Statistics come from all steps, never from buckets.
"""

from collections.abc import Callable, Mapping
from typing import Any

from gradclip.diagnostics.arrays import Flags, Numbers, Places, np
from gradclip.diagnostics.known import Group, Known

__all__ = ["Columns", "columns_of", "moving_share", "per_bucket"]

Columns = dict[str, np.ndarray[Any, Any]]

_BUCKETS = 10_000
_LARGEST = 3e38
"""Of a float32."""
_SMALLEST = 1e-37


def per_bucket(steps: int) -> int:
    """Return how many steps are taken together."""
    return 1 if steps <= 2 * _BUCKETS else -(-steps // _BUCKETS)


def columns_of(run: Known, shown_groups: Mapping[str, Group]) -> Columns:
    """Return what the charts draw and tell, by name.

    Args:
        run: The run.
        shown_groups: Those of its groups that are drawn.
    """
    of = {"norm": run.norm, "limit": run.limit, "loss": run.loss, "rate": run.rate}
    of["kept"] = run.kept
    for key, group in shown_groups.items():
        of |= {key: group.norm, f"{key}_limit": group.limit}
    of = {name: values for name, values in of.items() if np.isfinite(values).any()}
    flags = {"clipped": run.clipped, "skipped": run.skipped, "nonfinite": run.nonfinite}
    if run.lost.any():
        flags["lost"] = run.lost
    found: Columns = {}
    size = per_bucket(len(run))
    if size == 1:
        found["step"] = _whole(run.step)
        found |= {name: _small(values) for name, values in of.items()}
        found |= {name: flag.astype(np.uint8) for name, flag in flags.items()}
    else:
        starts = np.arange(0, len(run), size)
        ends = np.minimum(starts + size, len(run)) - 1
        places = {"step": (starts + ends) // 2, "step_lo": starts, "step_hi": ends}
        found |= {name: _whole(run.step[place]) for name, place in places.items()}
        for name, values in of.items():
            found |= _bucketed(name, values, size)
        if "norm" in of:
            found["norm_at"] = _whole(run.step[_largest_of_each(run.norm, size)])
        found |= {
            name: np.add.reduceat(flag, starts, dtype=np.int32) for name, flag in flags.items()
        }
    if run.tells_clipping:
        share = moving_share(run.clipped, window(len(run)))
        found["share"] = share[:: per_bucket(len(run))].astype(np.float32)
    return found


def window(steps: int) -> int:
    """Return over how many steps the share of clipped ones is taken."""
    return max(min(20, steps), steps // 100)


def moving_share(flags: Flags, width: int) -> Numbers:
    """Return the share of the steps around each that have a flag; at the ends of fewer.

    >>> moving_share(np.array([True, False, False, False]), 2).tolist()
    [1.0, 0.5, 0.0, 0.0]
    """
    counts = np.concatenate([[0], np.cumsum(flags)])
    at = np.arange(len(flags))
    low, high = np.maximum(at - width // 2, 0), np.minimum(at - width // 2 + width, len(flags))
    share: Numbers = (counts[high] - counts[low]) / (high - low)
    return share


def _bucketed(name: str, values: Numbers, size: int) -> Columns:
    short = -len(values) % size
    padded = np.concatenate([values, np.full(short, np.nan)]).reshape(-1, size)
    known = np.isfinite(padded)
    ordered = np.sort(np.where(known, padded, np.inf), axis=1)  # what is not known comes last
    count = known.sum(1)
    empty = count == 0

    def at(place: Callable[[Any], Any]) -> Numbers:
        taken = np.take_along_axis(ordered, place(np.maximum(count, 1))[:, None], axis=1)[:, 0]
        return np.where(empty, np.nan, taken)

    return {
        name: _small(at(lambda each: (each - 1) // 2)),
        f"{name}_lo": _small(at(lambda each: each * 0)),
        f"{name}_hi": _small(at(lambda each: each - 1)),
    }


def _largest_of_each(values: Numbers, size: int) -> Places:
    """Return the place of the largest number in each bucket."""
    heights = np.where(np.isfinite(values), values, -np.inf)
    padded = np.pad(heights, (0, -len(values) % size), constant_values=-np.inf).reshape(-1, size)
    found: Places = np.arange(len(padded)) * size + padded.argmax(1)
    return found


def _whole(steps: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return steps as int32, or as float64, which is exact up to 2 ** 53."""
    return steps.astype(np.int32 if abs(steps).max() < 2**31 else np.float64)


def _small(values: Numbers) -> np.ndarray[Any, Any]:
    """Return numbers as float32 where they fit."""
    known = np.abs(values[np.isfinite(values) & (values != 0)])
    fits = not len(known) or (known.max() < _LARGEST and known.min() > _SMALLEST)
    return values.astype(np.float32 if fits else np.float64)
