"""A run on disk: one JSON object a line, the source of truth for every figure and summary.

The first line is a header, ``{"gradclip": "0.1.0", "schema": 1, ...}``; each other line is one
optimizer step. Every line is flushed as it is written, so a run that is killed loses at most the
line it was writing. JSON has no infinity and no NaN: they are ``"inf"``, ``"-inf"``, ``"nan"``.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from reprlib import Repr
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from gradclip import __version__
from gradclip.errors import ArgumentValueError, RecordError
from gradclip.whole_file import read_whole, write_whole

if TYPE_CHECKING:
    from gradclip.clipping import ClipStats

__all__ = ["GroupRecord", "RunRecorder", "StepRecord", "read_header", "read_record"]

_SCHEMA = 1
_TOO_LARGE = 2**63
_short = Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRecord:
    """What one optimizer step did to some of the gradients; ``None`` is what was not measured.

    Attributes:
        norm_pre: The gradient norm before clipping.
        norm_post: The gradient norm after clipping.
        threshold: The norm that was allowed; infinite where nothing was bounded. Where there are
            several limits (by name pattern, by tensor), the one of what was scaled down most.
        coefficient: What the gradients were multiplied by; where there are several limits, the
            smallest one.
        clipped: Whether the gradients were scaled down.
        skipped: Whether the update was left out.
        nonfinite: How many gradient tensors held a NaN or an infinity.
    """

    norm_pre: float | None = None
    norm_post: float | None = None
    threshold: float | None = None
    coefficient: float | None = None
    clipped: bool = False
    skipped: bool = False
    nonfinite: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord(GroupRecord):
    """What one optimizer step did to all gradients; ``None`` is what was not measured.

    Attributes:
        step: The optimizer step, counted from 0.
        loss: The loss of the step.
        lr: The learning rate of the step.
        elapsed_ms: Time since the previous step ended, or since the run began.
        groups: The same numbers for each name pattern or ``param_group``, where limits were given
            by these.
        new_policy: The policy in words, at the first step after another one was assigned.
    """

    step: int
    loss: float | None = None
    lr: float | None = None
    elapsed_ms: float | None = None
    groups: Mapping[str, GroupRecord] = field(default_factory=dict, hash=False)
    new_policy: str | None = None

    @classmethod
    def from_stats(
        cls,
        step: int,
        stats: "ClipStats | None",
        *,
        loss: float | None = None,
        lr: float | None = None,
        elapsed_ms: float | None = None,
    ) -> Self:
        """Make the record of a step from what the clipper reported about it.

        Args:
            step: The optimizer step, counted from 0.
            stats: ``ClipResult.to_host()``, or None where nothing was clipped or measured.
            loss: The loss of the step.
            lr: The learning rate of the step.
            elapsed_ms: Time since the previous step ended.
        """
        if stats is None:
            return cls(step=step, loss=loss, lr=lr, elapsed_ms=elapsed_ms)
        return cls(
            step=step,
            loss=loss,
            lr=lr,
            elapsed_ms=elapsed_ms,
            groups={name: GroupRecord(**_measured(each)) for name, each in stats.groups.items()},
            new_policy=stats.new_policy,
            **_measured(stats),
        )


def _measured(stats: "ClipStats") -> dict[str, Any]:
    return {each.name: getattr(stats, each.name) for each in fields(GroupRecord)}


_Record = TypeVar("_Record", bound=GroupRecord)


class RunRecorder:
    """Writes the steps of a run to a file, each flushed at once; use it with ``with``.

    Args:
        path: The file; its folder is made if it is missing.
        start_step: The step the run starts or resumes at. Steps before it that are already in the
            file stay, with their header; those at or beyond it are dropped. 0 starts afresh.
        meta: What else the header should say; plain JSON values.

    Raises:
        ArgumentValueError: The run resumes on a file that is not a record; the file is left alone.
        RecordError: GC302, the file cannot be written; an old one is left alone. So does ``write``.
    """

    def __init__(
        self, path: str | Path, *, start_step: int = 0, meta: Mapping[str, object] | None = None
    ) -> None:
        self.path = Path(path)
        header: dict[str, object] = {"gradclip": __version__, "schema": _SCHEMA, **(meta or {})}
        kept: list[StepRecord] = []
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if start_step > 0 and self.path.exists():
                header = read_header(self.path)
                kept = [record for record in read_record(self.path) if record.step < start_step]
            # In one step: a kill here leaves the old record whole.
            write_whole(self.path, _line(header) + "".join(map(_step_line, kept)))
            self._file = self.path.open("a", encoding="utf-8", newline="\n")

    def write(self, record: StepRecord) -> None:
        """Append one step, and flush it."""
        with self._writing():
            self._file.write(_step_line(record))
            self._file.flush()

    def close(self) -> None:
        """Close the file; harmless when it is closed."""
        with self._writing():
            self._file.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn an error of the disk into one that says what to do."""
        try:
            yield
        except OSError as error:
            raise RecordError(
                f"the record {self.path} cannot be written: {error.strerror or error}. Make room "
                "there, or give another path."
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_record(path: str | Path) -> list[StepRecord]:
    """Read the steps of a run, in the order they were written.

    A last line that a killed run left unfinished is left out. Fields that this version does not
    know are ignored.

    Raises:
        ArgumentValueError: The file is not a record, or of a newer schema.
    """
    _, *steps = _entries(Path(path))
    return [_step(Path(path), number, entry) for number, entry in steps]


def read_header(path: str | Path) -> dict[str, object]:
    """Read what the first line says about the run.

    Raises:
        ArgumentValueError: The file is not a record, or of a newer schema.
    """
    return next(_entries(Path(path)))[1]


def _entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of the header and of every complete line after it."""
    # Bytes, for a text would also be split at the line breaks of Unicode, which JSON allows inside.
    try:
        lines = read_whole(path).removeprefix(b"\xef\xbb\xbf").split(b"\n")[:-1]
    except ValueError as error:
        raise _not_a_record(path, 1, str(error)) from None
    if not lines:
        raise _not_a_record(path, 1, "the file is empty")
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            shown = line[:60].decode(errors="replace").strip()
            raise _not_a_record(path, number, f"not JSON: {shown!r}") from error
        if not isinstance(entry, dict):
            raise _not_a_record(path, number, f"not a JSON object: {_short.repr(entry)}")
        if number == 1 and (type(entry.get("schema")) is not int or entry["schema"] != _SCHEMA):
            found = f"schema {_short.repr(entry['schema'])}" if "schema" in entry else "no schema"
            raise _not_a_record(path, 1, f"the header has {found}; this version reads {_SCHEMA}")
        yield number, entry


def _step(path: Path, number: int, entry: Mapping[str, Any]) -> StepRecord:
    try:
        return _read(StepRecord, entry)
    except ValueError as error:
        raise _not_a_record(path, number, str(error)) from None


def _read(kind: type[_Record], entry: Mapping[str, Any]) -> _Record:
    """Make a record of what a line says; what it leaves out, or calls null, is as by default.

    Raises:
        ValueError: It says something that the field cannot be.
    """
    values = {
        each.name: _value(each, entry[each.name])
        for each in fields(kind)
        if entry.get(each.name) is not None
    }
    if kind is StepRecord and "step" not in values:
        raise ValueError("it has no step")
    return kind(**values)


def _value(of: Field[Any], value: Any) -> Any:
    if of.type is bool or of.name == "new_policy":
        kind, expected = (bool, "true or false") if of.type is bool else (str, "a text")
        if isinstance(value, kind):
            return value
    elif of.type is int:
        expected = "a whole number of 0 or more"
        if type(value) is int and 0 <= value < _TOO_LARGE:
            return value
    elif of.name == "groups":
        expected = "numbers by pattern"
        if isinstance(value, dict) and all(isinstance(each, dict) for each in value.values()):
            return {pattern: _read(GroupRecord, each) for pattern, each in value.items()}
    else:
        expected = "a number that a float can hold"
        if value in ("inf", "-inf", "nan") or isinstance(value, float):
            return float(value)
        if type(value) is int and abs(value) <= sys.float_info.max:
            return float(value)
    raise ValueError(f"{of.name} is {_short.repr(value)}, not {expected}")


def _step_line(record: StepRecord) -> str:
    entry = {"step": record.step, "loss": record.loss, **asdict(record)}
    for name in ("groups", "new_policy"):  # of most runs, and of most steps
        if not entry[name]:
            del entry[name]
    return _line(entry)


def _line(entry: Mapping[str, object]) -> str:
    return json.dumps(_plain(entry), allow_nan=False) + "\n"


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _not_a_record(path: Path, number: int, found: str) -> ArgumentValueError:
    return ArgumentValueError(
        f"{path}:{number} is not part of a gradclip record: {found}.\n"
        "  A record is a JSONL file that RunRecorder or RecordHook wrote."
    )
