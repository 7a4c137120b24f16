"""A run in one file: one JSON object a line.

The first line is a header, ``{"gradclip": "0.1.0", "schema": 1, ...}``; each other line is one
optimizer step. Every line is flushed as it is written, so a run that is killed loses at most the
line it was writing. ``gradclip.record`` has the folder that ``record=`` writes, and what a line is.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from gradclip import __version__
from gradclip.errors import RecordError
from gradclip.record.reader import read_header, read_record
from gradclip.record.schema import SCHEMA, GroupRecord, StepRecord, line, step_line
from gradclip.whole_file import write_whole

__all__ = ["GroupRecord", "RunRecorder", "StepRecord", "read_header", "read_record"]


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
        header: dict[str, object] = {"gradclip": __version__, "schema": SCHEMA, **(meta or {})}
        kept: list[StepRecord] = []
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if start_step > 0 and self.path.exists():
                header = read_header(self.path)
                kept = [record for record in read_record(self.path) if record.step < start_step]
            # In one step: a kill here leaves the old record whole.
            write_whole(self.path, line(header) + "".join(map(step_line, kept)))
            self._file = self.path.open("a", encoding="utf-8", newline="\n")

    def write(self, record: StepRecord) -> None:
        """Append one step, and flush it."""
        with self._writing():
            self._file.write(step_line(record))
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
