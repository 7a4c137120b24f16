"""Reads a record: a folder that ``record=`` wrote, or one file of ``RunRecorder``.

A last line or row that a killed run left unfinished is left out, and fields that this version does
not know are ignored.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import inf, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gradclip.errors import ArgumentValueError, MissingDependencyError
from gradclip.record.columns import Steps
from gradclip.record.header import checked_schema, read_about
from gradclip.record.lines import complete_lines, segments
from gradclip.record.norms import row_size
from gradclip.record.schema import (
    SCHEMA,
    StepRecord,
    not_a_record,
    parsed,
    read_step,
)

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Norms", "read_events", "read_header", "read_norms", "read_record", "read_steps"]


class Norms(NamedTuple):
    """The norm of each parameter at some steps.

    Attributes:
        steps: Which, int64 (n,).
        names: Of the parameters.
        norms: float64 (n, parameters); right to half a per cent.
    """

    steps: "np.ndarray[Any, Any]"
    names: list[str]
    norms: "np.ndarray[Any, Any]"


def read_record(path: str | Path) -> list[StepRecord]:
    """Read the steps of a run, in the order they were written.

    Raises:
        ArgumentValueError: GC010, this is not a record, or of a newer schema.
    """
    return [read_step(*place, entry) for place, entry in _lines(Path(path))]


def read_steps(path: str | Path) -> Steps:
    """Read the steps of a run into columns, which take much less memory than ``read_record``.

    Raises:
        ArgumentValueError: GC010, this is not a record, or of a newer schema.
    """
    steps = Steps()
    for place, entry in _lines(Path(path)):
        try:
            steps.add(entry)
        except ValueError as error:
            raise not_a_record(*place, str(error)) from None
    return steps


def read_header(path: str | Path) -> dict[str, Any]:
    """Read what a record says about the run: ``run.json``, or the first line of a file.

    Raises:
        ArgumentValueError: GC010, this is not a record, or of a newer schema.
    """
    path = Path(path)
    with _reading(path):
        return read_about(path, 0) if path.is_dir() else _header_of(path, complete_lines(path))


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """Read what happened in a run, on all ranks, in the order of steps.

    Args:
        path: A folder; a record that is one file has no events.

    Raises:
        ArgumentValueError: GC010, this is not a record.
    """
    events: list[dict[str, Any]] = []
    if not Path(path).is_dir():
        read_header(path)
    with _reading(path):
        for file in sorted(Path(path).glob("events*.jsonl")):
            for number, line in complete_lines(file):
                entry = parsed(file, number, line)
                if type(entry.get("step")) is not int or not isinstance(entry.get("event"), str):
                    raise not_a_record(file, number, "an event has a step and a kind")
                events.append(entry)
    return sorted(events, key=lambda event: event["step"])


def read_norms(path: str | Path, *, optimizer: int = 0, rank: int | None = None) -> Norms:
    """Read the norm of each parameter, at those steps that the record has them of.

    Where ranks hold parts of a parameter, the parts are added up, at steps that all of them have.

    Args:
        path: A folder; a record that is one file has no such norms.
        optimizer: Which, where several are recorded together.
        rank: Only what this one wrote, while others may still write.

    Raises:
        ArgumentValueError: GC010, this is not a record, or has no such optimizer.
        MissingDependencyError: GC401, numpy is not installed.
    """
    np, folder = _numpy(), Path(path)
    with _reading(folder):
        ranks = []
        for each_rank in _ranks(folder) if rank is None else [rank]:
            entries = read_about(folder, each_rank)["optimizers"]
            parts = [part for e in entries if e["optimizer"] == optimizer for part in e["norms"]]
            ranks += [_of_rank(folder, parts)] if parts else []
    if not ranks:
        raise ArgumentValueError(f"{folder} has no norms of an optimizer {optimizer}")
    if len(ranks) == 1:  # what this rank answers for is all there is
        return Norms(ranks[0].steps, list(ranks[0].places), ranks[0].norms)
    steps = ranks[0].steps
    for each in ranks[1:]:
        steps = np.intersect1d(steps, each.steps)
    rows = [np.isin(each.steps, steps) for each in ranks]
    tables = [each.norms[having] for each, having in zip(ranks, rows, strict=True)]
    names = list(dict.fromkeys(name for each in ranks for name in each.places))
    norms = np.empty((len(steps), len(names)))
    for at, name in enumerate(names):
        having = [number for number, each in enumerate(ranks) if name in each.places]
        places = [ranks[number].places[name] for number in having]
        found = np.stack([tables[n][:, place] for n, place in zip(having, places, strict=True)])
        order = ranks[having[0]].orders[places[0]]
        if order == inf:
            norms[:, at] = found.max(0)
        elif len(having) == 1:
            norms[:, at] = found[0]
        else:
            weights = [ranks[n].weights[place] for n, place in zip(having, places, strict=True)]
            largest = found.max(0)
            scale = np.where(np.isfinite(largest) & (largest > 0), largest, 1.0)
            parts = np.array(weights)[:, None] * (found / scale) ** order
            norms[:, at] = scale * parts.sum(0) ** (1 / order)
    return Norms(steps, names, norms)


class _OfRank(NamedTuple):
    """The norms that one rank wrote.

    Attributes:
        steps: Which, (n,).
        places: The column of each parameter.
        norms: (n, parameters); NaN where a parameter was not clipped.
        orders: p of each.
        weights: How much of each this rank answers for.
    """

    steps: "np.ndarray[Any, Any]"
    places: dict[str, int]
    norms: "np.ndarray[Any, Any]"
    orders: list[float]
    weights: list[float]


def _of_rank(folder: Path, parts: Iterable[Mapping[str, Any]]) -> _OfRank:
    np = _numpy()
    steps, tables, places = [], [], dict[str, int]()
    orders, weights = dict[str, float](), dict[str, float]()
    for part in parts:
        names = part["names"]
        row = np.dtype([("step", "<i8"), ("norms", "<f2", (len(names),))])
        for name in names:
            places.setdefault(name, len(places))
        for path in (folder / part["file"], folder / part["events"]):
            rows = path.stat().st_size // row_size(len(names)) if path.exists() else 0
            table = np.fromfile(path, row, rows) if rows else np.empty(0, row)
            steps.append(table["step"])
            tables.append((names, table["norms"]))
        orders.update(zip(names, map(float, _of_each(part["orders"], names)), strict=True))
        weights.update(zip(names, map(float, _of_each(part["weights"], names)), strict=True))
    every, first = np.unique(np.concatenate(steps), return_index=True)
    norms, begin = np.full((len(every), len(places)), nan), 0
    for names, table in tables:
        mine = (first >= begin) & (first < begin + len(table))
        columns = [places[name] for name in names]
        norms[np.ix_(mine, columns)] = 10.0 ** table[first[mine] - begin].astype(np.float64)
        begin += len(table)
    return _OfRank(every, places, norms, list(orders.values()), list(weights.values()))


def _of_each(values: list[Any], names: list[str]) -> list[Any]:
    return values * len(names) if len(values) == 1 else values


def _ranks(folder: Path) -> list[int]:
    """Return which ranks wrote, in order."""
    found = [path.name.split(".")[1] for path in folder.glob("run*.json")]
    numbers = (name.removeprefix("rank") for name in found)
    return sorted({int(number) if number.isdecimal() else 0 for number in numbers})


def _header_of(path: Path, lines: Iterator[tuple[int, bytes]]) -> dict[str, Any]:
    number, line = next(lines, (1, None))
    if line is None:
        raise not_a_record(path, 1, "the file is empty")
    return checked_schema(path, parsed(path, number, line), SCHEMA)


def _lines(path: Path) -> Iterator[tuple[tuple[Path, int], dict[str, Any]]]:
    """Yield the place and the object of every line that is a step."""
    with _reading(path):
        if path.is_dir():
            read_about(path, 0)
            files = segments(path)
        else:
            _header_of(path, complete_lines(path))
            files = [path]
        for file in files:
            for number, line in complete_lines(file):
                if file is not path or number > 1:
                    yield (file, number), parsed(file, number, line)


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Say that a file is none, or may not be read, as of all else that is no record."""
    try:
        yield
    except OSError as error:
        found = error.strerror or error
        raise ArgumentValueError(
            f"{error.filename or path} cannot be read as a gradclip record: {found}"
        ) from None


def _numpy() -> Any:
    try:
        import numpy  # noqa: PLC0415, ICN001 - reading steps needs none
    except ImportError as error:
        raise MissingDependencyError(
            "the norms of parameters are read with numpy, which is not installed.\n  pip install "
            '"gradclip[report]"'
        ) from error
    return numpy
