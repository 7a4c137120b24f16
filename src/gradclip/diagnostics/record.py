"""A run on disk: one JSON object a line, the source of truth for every figure and summary.

The first line is a header, ``{"gradclip": "0.1.0", "schema": 1, ...}``; each other line is one
optimizer step. Every line is flushed as it is written, so a run that is killed loses at most the
line it was writing. JSON has no infinity and no NaN: they are ``"inf"``, ``"-inf"``, ``"nan"``.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from gradclip import __version__
from gradclip.errors import ArgumentValueError

if TYPE_CHECKING:
    from gradclip.clipping import ClipStats

__all__ = ["RunRecorder", "StepRecord", "read_header", "read_record"]

_SCHEMA = 1
_NONFINITE = ("inf", "-inf", "nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What one optimizer step did; ``None`` is what was not measured.

    Attributes:
        step: The optimizer step, counted from 0.
        loss: The loss of the step.
        norm_pre: The gradient norm before clipping.
        norm_post: The gradient norm after clipping.
        threshold: The norm that was allowed; infinite where nothing was.
        coefficient: What the gradients were multiplied by.
        clipped: Whether the gradients were scaled down.
        skipped: Whether the update was left out.
        nonfinite: How many gradient tensors held a NaN or an infinity.
        lr: The learning rate of the step.
        elapsed_ms: Time since the previous step ended, or since the run began.
    """

    step: int
    loss: float | None = None
    norm_pre: float | None = None
    norm_post: float | None = None
    threshold: float | None = None
    coefficient: float | None = None
    clipped: bool = False
    skipped: bool = False
    nonfinite: int = 0
    lr: float | None = None
    elapsed_ms: float | None = None

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
            norm_pre=stats.norm_pre,
            norm_post=stats.norm_post,
            threshold=stats.threshold,
            coefficient=stats.coefficient,
            clipped=stats.clipped,
            skipped=stats.skipped,
            nonfinite=stats.nonfinite,
            lr=lr,
            elapsed_ms=elapsed_ms,
        )


_FIELDS = frozenset(field.name for field in fields(StepRecord))


class RunRecorder:
    """Writes the steps of a run to a file, each flushed at once; use it with ``with``.

    Args:
        path: The file; its folder is made if it is missing.
        start_step: The step the run starts or resumes at. Steps before it that are already in the
            file stay, with their header; those at or beyond it are dropped. 0 starts afresh.
        meta: What else the header should say; plain JSON values.

    Raises:
        ArgumentValueError: The run resumes on a file that is not a record; the file is left alone.
    """

    def __init__(
        self, path: str | Path, *, start_step: int = 0, meta: Mapping[str, object] | None = None
    ) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header: dict[str, object] = {"gradclip": __version__, "schema": _SCHEMA, **(meta or {})}
        kept: list[StepRecord] = []
        if start_step > 0 and self.path.exists():
            header = read_header(self.path)
            kept = [record for record in read_record(self.path) if record.step < start_step]
        # Written aside and moved into place: a kill here leaves the old record whole.
        draft = self.path.with_name(self.path.name + ".tmp")
        draft.write_text(
            "".join(_line(entry) for entry in (header, *map(asdict, kept))), encoding="utf-8"
        )
        draft.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8", newline="\n")

    def write(self, record: StepRecord) -> None:
        """Append one step, and flush it."""
        self._file.write(_line(asdict(record)))
        self._file.flush()

    def close(self) -> None:
        """Close the file; harmless when it is closed."""
        self._file.close()

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


def _entries(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield (line number, object) of the header and of every complete line after it."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    if not lines:
        raise _not_a_record(path, 1, "the file is empty")
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise _not_a_record(path, number, f"not JSON: {line.strip()[:60]!r}") from error
        if not isinstance(entry, dict):
            raise _not_a_record(path, number, f"not a JSON object: {line.strip()[:60]!r}")
        if number == 1 and entry.get("schema") != _SCHEMA:
            found = f"schema {entry['schema']!r}" if "schema" in entry else "no schema"
            raise _not_a_record(path, 1, f"the header has {found}; this version reads {_SCHEMA}")
        yield number, entry


def _step(path: Path, number: int, entry: dict[str, object]) -> StepRecord:
    values = {
        name: float(value) if isinstance(value, str) and value in _NONFINITE else value
        for name, value in entry.items()
        if name in _FIELDS
    }
    for name, value in values.items():
        if not isinstance(value, int | float | None):
            raise _not_a_record(path, number, f"{name} is {value!r}, not a number")
    if not isinstance(values.get("step"), int):
        raise _not_a_record(path, number, "it has no step")
    return StepRecord(**values)  # type: ignore[arg-type]


def _line(entry: Mapping[str, object]) -> str:
    return (
        json.dumps({name: _plain(value) for name, value in entry.items()}, allow_nan=False) + "\n"
    )


def _plain(value: object) -> object:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _not_a_record(path: Path, number: int, found: str) -> ArgumentValueError:
    return ArgumentValueError(
        f"{path}:{number} is not part of a gradclip record: {found}.\n"
        "  A record is a JSONL file that RunRecorder or RecordHook wrote."
    )
