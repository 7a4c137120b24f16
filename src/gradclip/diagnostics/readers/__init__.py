"""Logs of training runs, ours and others', told apart by what is in them.

A format is one file with ``claims`` and ``read``, and its name in one of the two lists here.
"""

from pathlib import Path

from gradclip.diagnostics.readers import (
    csv_table,
    dicts_in_lines,
    json_document,
    json_lines,
    mlflow_metric,
    own_record,
    pairs_in_lines,
    tables_in_lines,
    tensorboard_events,
)
from gradclip.diagnostics.readers.columns import Columns, choose
from gradclip.diagnostics.readers.logged import LoggedRun, runs_of
from gradclip.diagnostics.readers.reader import Reader
from gradclip.diagnostics.readers.source import Source, open_log
from gradclip.diagnostics.readers.table import Table
from gradclip.errors import LogError

__all__ = ["LoggedRun", "read_log"]

_BY_THEIR_BEGINNING: tuple[Reader, ...] = (
    tensorboard_events,
    own_record,
    json_lines,
    json_document,
    mlflow_metric,
    csv_table,
)
"""Formats that the first lines tell; the first that claims a file reads it."""
_OF_LINES: tuple[Reader, ...] = (dicts_in_lines, pairs_in_lines, tables_in_lines)
"""Formats that stand in a text among other lines; the one that finds most norms is taken."""
_NEARLY_AS_MANY = 0.5
_MOST_RUNS = 20
_FEWEST_A_RUN = 5
"""Norms of a run in the mean, where there are so many runs."""


def read_log(
    path: str | Path,
    *,
    norm_key: str | None = None,
    step_key: str | None = None,
    loss_key: str | None = None,
) -> list[LoggedRun]:
    """Read the gradient norms of a log, of whatever format; several runs where it holds several.

    Args:
        path: The file: transformers' ``trainer_state.json``, CSV, JSON, JSONL, TensorBoard events,
            an MLflow metric, a record of gradclip, or a text with norms in its lines.
        norm_key: The column of the norms, where its name is not a known one.
        step_key: The column of the steps.
        loss_key: The column of the losses.

    Raises:
        LogError: GC303, it cannot be read, or no column is known as the norm of the gradients.
        MissingDependencyError: GC401, it is a TensorBoard event file, and tensorboard is missing.
    """
    source = open_log(path)
    table, columns = _read(source, norm_key, step_key, loss_key)
    runs = runs_of(table, columns)
    if not runs:
        raise source.error(f"the column {columns.norm!r} has no norm")
    norms = sum(len(run.norms) for run in runs)
    if len(runs) > _MOST_RUNS and norms < _FEWEST_A_RUN * len(runs):
        raise source.error(
            f"the column {columns.step!r} goes back {len(runs) - 1} times among {norms} norms, so "
            "it does not count steps. Name one that does with step_key (--step-key)"
        )
    return runs


def _read(
    source: Source, norm_key: str | None, step_key: str | None, loss_key: str | None
) -> tuple[Table, Columns]:
    named = (norm_key, step_key, loss_key)
    refused: LogError | None = None
    for reader in _BY_THEIR_BEGINNING:
        if reader.claims(source):
            try:
                table = reader.read(source)
                return table, choose(table, source.path, *named)
            except LogError as error:
                if reader is not csv_table:
                    raise
                refused = error  # a text with commas looks like CSV, too
    tables = sorted((reader.read(source) for reader in _OF_LINES), key=lambda each: -each.rows)
    found: list[tuple[Table, Columns]] = []
    for table in tables:
        try:
            found.append((table, choose(table, source.path, *named)))
        except LogError as error:
            refused = refused or error
    if not found:
        assert refused is not None
        raise refused
    most = max(table.count(columns.norm) for table, columns in found)
    many = [each for each in found if each[0].count(each[1].norm) >= _NEARLY_AS_MANY * most]
    return max(many, key=lambda each: (_counts_steps(each[1]), each[0].count(each[1].norm)))


def _counts_steps(columns: Columns) -> bool:
    return columns.step is not None and columns.step.lower() != "epoch"
