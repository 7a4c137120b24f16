"""A file that may be anything, opened with care: its beginning, its lines, its whole text."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from stat import S_ISDIR, S_ISREG

from gradclip.errors import LogError

__all__ = ["Source", "open_log"]

_HEAD = 64 * 1024
_LONGEST_HEAD = 4 * _HEAD
_LONGEST_LINE = 32 * 2**20
_LARGEST_DOCUMENT = 256 * 2**20
_LIKELY = ("*trainer_state.json", "*.csv", "*.jsonl", "*tfevents*", "*.log", "*.out", "*.json")
_NAMED = 3
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_EVENTS = b"brain.Event:"


@dataclass(frozen=True)
class Source:
    """A file to read.

    Args:
        path: Where it is.
        head: Its first bytes.
        encoding: How its text is encoded.
    """

    path: Path
    head: bytes
    encoding: str

    @property
    def holds_events(self) -> bool:
        """Whether it is a TensorBoard event file, which is not text."""
        return _EVENTS in self.head[:100]

    def lines(self) -> Iterator[tuple[int, str]]:
        r"""Yield the number and the text of each line, without its end; only ``\n`` ends one.

        Raises:
            LogError: A line is too long to be one of a log.
        """
        with self.path.open(encoding=self.encoding, errors="replace", newline="\n") as file:
            number = 0
            while line := file.readline(_LONGEST_LINE):
                number += 1
                if len(line) == _LONGEST_LINE:
                    raise self.error(f"the line is longer than {_LONGEST_LINE} characters", number)
                yield number, line.rstrip("\r\n")

    def first_lines(self, count: int) -> list[str]:
        """Return the first lines that are not blank, as far as they are in the head."""
        text = self.head.decode(self.encoding, errors="replace")
        lines = text.split("\n")
        if len(self.head) in (_HEAD, _LONGEST_HEAD) and len(lines) > 1:
            del lines[-1]  # cut off
        return list(islice((line.strip() for line in lines if line.strip()), count))

    def text(self) -> str:
        """Return the whole text.

        Raises:
            LogError: It is too long to be read at once, or has a line that is.
        """
        size = self.path.stat().st_size
        if size > _LARGEST_DOCUMENT:
            raise self.error(
                f"it is one JSON value of {size >> 20} MiB, and {_LARGEST_DOCUMENT >> 20} MiB are "
                "read at once. Write one JSON object a line"
            )
        return "\n".join(line for _, line in self.lines())

    def error(self, what: str, line: int | None = None) -> LogError:
        """Return an error that names the file, and the line where it is known."""
        where = f"{self.path}:{line}" if line else str(self.path)
        return LogError(f"{where} cannot be read as a log: {what}.")


def open_log(path: str | Path) -> Source:
    """Look at a file.

    Raises:
        LogError: It is missing, empty, a folder that is no record, no file, or neither text nor
            TensorBoard events.
    """
    where = Path(path)
    try:
        mode = where.stat().st_mode
        if S_ISDIR(mode):
            if not (where / "run.json").is_file():
                raise _is_a_folder(where)
            return Source(where, b"", "utf-8")  # of ``record=``
        if not S_ISREG(mode):
            raise Source(where, b"", "utf-8").error("it is no file")
        with where.open("rb") as file:
            head = file.read(_HEAD)
            if head.count(b"\n") < 2:  # noqa: PLR2004 - lines of many columns
                head += file.read(_LONGEST_HEAD - _HEAD)
    except (OSError, ValueError) as error:
        if isinstance(error, LogError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise LogError(f"{where} cannot be read: {reason}.") from None
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    source = Source(where, head, encoding)
    if not head.strip():
        raise source.error("it is empty")
    if name := next((_COMPRESSED[each] for each in _COMPRESSED if head.startswith(each)), None):
        raise source.error(f"it is compressed by {name}; unpack it first")
    if encoding != "utf-16" and b"\0" in head and not source.holds_events:
        raise source.error("it is neither text nor a TensorBoard event file")
    return source


def _is_a_folder(where: Path) -> LogError:
    logs = {file for pattern in _LIKELY for file in where.glob(pattern) if file.is_file()}
    records = {each.parent for depth in ("*", "*/*") for each in where.glob(f"{depth}/run.json")}
    found = sorted(records) + sorted(logs)
    named = "".join(f"\n  {file}" for file in found[:_NAMED])
    more = f"\n  and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return LogError(
        f"{where} is a folder of other things: name a record or a log in it.{named}{more}"
    )
