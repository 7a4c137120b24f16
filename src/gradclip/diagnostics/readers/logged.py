"""A run as a log tells it, and the runs that a table holds."""

import math
from collections import deque
from dataclasses import dataclass

from gradclip.diagnostics.arrays import Flags, Numbers, Places, np
from gradclip.diagnostics.readers import keys
from gradclip.diagnostics.readers.columns import Columns
from gradclip.diagnostics.readers.frameworks import framework_of
from gradclip.diagnostics.readers.table import Table

__all__ = ["LoggedRun", "runs_of"]

_BEYOND = 1e150
_MANY_LEFT_OUT = 1.1
_REMEMBERED = 64
"""Rows among which one that is printed again, say by another rank, is found."""


@dataclass(frozen=True, eq=False)
class LoggedRun:
    """One run of a log: a number for each time that a norm was logged, NaN for what is missing.

    Args:
        norms: Norms of the gradients as they were logged, zeros, NaN and infinities too.
        steps: The step of each; of some logs the epoch, which is not whole.
        losses: The loss of each.
        rates: The learning rate of each.
        format: What the file is, in a word or two.
        framework: Which framework wrote it, where that is known; of a record "callback" or "hook",
            where one of these wrote it.
        norm_key: The column of the norms.
        step_key: The column of the steps, or None.
        loss_key: The column of the losses, or None.
        rate_key: The column of the learning rates, or None.
        limit: The limit that the run was clipped with, where the log says it.
    """

    norms: Numbers
    steps: Numbers
    losses: Numbers
    rates: Numbers
    format: str
    framework: str | None
    norm_key: str
    step_key: str | None
    loss_key: str | None
    rate_key: str | None
    limit: float | None = None

    @property
    def zeros(self) -> int:
        """How many norms are exactly 0."""
        return int((self.norms == 0).sum())

    @property
    def nonfinite(self) -> int:
        """How many norms are NaN or infinite, or as good as that."""
        return int((~self.is_norm).sum()) - self.zeros

    @property
    def is_norm(self) -> Flags:
        """Which norms say something: those that no gradients of numbers can have do not."""
        found: Flags = (self.norms > 1 / _BEYOND) & (self.norms < _BEYOND)
        return found

    @property
    def spacing(self) -> float | None:
        """How many steps lie between two norms; None if the log does not count steps."""
        if self.step_key is None or keys.canonical(self.step_key) == "epoch":
            return None
        return spacing_of(self.steps)

    @property
    def left_out(self) -> int:
        """How many steps between the first norm and the last one have none, where it is known."""
        if self.spacing is None:
            return 0
        known = np.unique(self.steps[np.abs(self.steps) < _BEYOND])
        return max(0, int(known[-1] - known[0]) + 1 - len(known))

    def __repr__(self) -> str:
        return (
            f"LoggedRun({len(self.norms)} norms from {self.norm_key!r}, format={self.format!r}, "
            f"spacing={self.spacing})"
        )


def spacing_of(steps: Numbers) -> float | None:
    """Return the usual distance of steps that differ, or None.

    Where it is 1, and yet many steps have no norm, as in a record of which some are left out later
    on, it is the mean distance.
    """
    known = steps[np.abs(steps) < _BEYOND]
    apart = np.diff(known)
    apart = apart[apart > 0]
    if not len(apart):
        return None
    usual, mean = float(np.median(apart)), float(apart.mean())
    return round(mean, 1) if usual == 1 and mean > _MANY_LEFT_OUT else usual


def runs_of(table: Table, columns: Columns) -> list[LoggedRun]:
    """Return the runs of a table: a step that goes back starts another one.

    A step that repeats does not, for epochs are rounded. A row that is printed again is dropped.
    """
    rows = table.rows_of(columns.norm)
    norms, steps, losses, rates = (
        table.column(name) for name in (columns.norm, columns.step, columns.loss, columns.rate)
    )
    if columns.step_is_above:
        steps = _carried_on(steps)
    counts_steps = columns.step is not None and keys.canonical(columns.step) != "epoch"
    if counts_steps:
        losses, rates = (_of_same_step(each, steps, rows) for each in (losses, rates))
    found = norms[rows]
    rows = rows[~((found < 0) & np.isfinite(found))]  # -1 stands for what was not measured
    if counts_steps and columns.epoch is not None:
        steps = _of_all_epochs(steps, table.column(columns.epoch), rows)
    pieces = _pieces(rows, steps, (norms, losses, rates), drop_repeated=counts_steps)
    framework = table.framework or framework_of(table.names)
    limit = _constant(table.column(columns.limit))
    return [
        LoggedRun(
            norms=norms[piece],
            steps=steps[piece],
            losses=losses[piece],
            rates=rates[piece],
            format=table.format,
            framework=framework,
            norm_key=columns.norm,
            step_key=columns.step,
            loss_key=None if np.isnan(losses[piece]).all() else columns.loss,
            rate_key=None if np.isnan(rates[piece]).all() else columns.rate,
            limit=limit,
        )
        for piece in pieces
    ]


def _carried_on(values: Numbers) -> Numbers:
    """Fill each place that has no number with the last one above it."""
    places = np.maximum.accumulate(np.where(np.isnan(values), 0, np.arange(len(values))))
    filled: Numbers = values[places]
    return filled


def _of_same_step(values: Numbers, steps: Numbers, rows: Places) -> Numbers:
    """Fill what a row of a norm lacks from rows beside it that are of the same step.

    Lightning, TensorBoard and MLflow write each number in a row of its own.
    """
    if not len(rows) or not np.isnan(values[rows]).any():
        return values
    values = values.copy()
    starts = np.concatenate([[True], steps[1:] != steps[:-1]])  # NaN differs from NaN: alone
    block_of = np.cumsum(starts) - 1
    norms_in = np.bincount(block_of[rows], minlength=block_of[-1] + 1)
    known = np.flatnonzero(~np.isnan(values))
    last_in = np.full(block_of[-1] + 1, math.nan)
    last_in[block_of[known]] = values[known]
    lacking = rows[np.isnan(values[rows]) & (norms_in[block_of[rows]] == 1)]
    values[lacking] = last_in[block_of[lacking]]
    return values


def _of_all_epochs(steps: Numbers, epochs: Numbers, rows: Places) -> Numbers:
    """Count on where steps begin anew with the next epoch."""
    known = rows[np.isfinite(steps[rows]) & np.isfinite(epochs[rows])]
    offsets = np.zeros(len(known))
    anew = (np.diff(steps[known]) < 0) & (np.diff(epochs[known]) > 0)
    offsets[1:][anew] = steps[known][:-1][anew]
    steps = steps.copy()
    steps[known] += np.cumsum(offsets)
    return steps


def _pieces(
    rows: Places,
    steps: Numbers,
    others: tuple[Numbers, ...],
    *,
    drop_repeated: bool,
) -> list[list[int]]:
    pieces: list[list[int]] = [[]]
    recent: deque[tuple[float | None, ...]] = deque(maxlen=_REMEMBERED)
    last = -math.inf
    for row in rows.tolist():
        step = float(steps[row])
        if drop_repeated:
            seen = (step, *(None if math.isnan(each[row]) else float(each[row]) for each in others))
            if step <= last and seen in recent:
                continue
            recent.append(seen)
        if step < last:
            pieces.append([])
            recent.clear()
        if math.isfinite(step):
            last = step
        pieces[-1].append(row)
    return [piece for piece in pieces if piece]


def _constant(limits: Numbers) -> float | None:
    known = limits[~np.isnan(limits)]
    if len(known) and known[0] == known.min() == known.max() and 0 < known[0] < math.inf:
        return float(known[0])
    return None
