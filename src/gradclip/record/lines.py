"""The lines of a record on disk: read one by one, appended together, kept small.

Finished segments of a folder's steps are gzipped. ``steps.jsonl`` becomes ``steps-00000.jsonl`` by
one rename, then ``steps-00000.jsonl.gz`` is moved into place and the plain one deleted: at any
moment each step is in one of them, and where both are there the gzipped one is whole.
"""

import gzip
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from shutil import copyfileobj

from gradclip.errors import ArgumentValueError
from gradclip.record.own_file import OwnFile
from gradclip.record.schema import not_a_record, parsed
from gradclip.whole_file import open_file, replacing

__all__ = ["SEGMENT", "Lines", "complete_lines", "ranked", "segments"]

SEGMENT = 65_536
"""Lines of a segment that is gzipped."""

_LONGEST = 1 << 23
"""Bytes of a line; it is far more than one with thousands of patterns has."""

_STEPS = "steps.jsonl"
_LEVEL = 6


def complete_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number and bytes of every line that has an end: the last one may be torn.

    Raises:
        ArgumentValueError: GC010, for a line that nobody would write, or a damaged archive.
    """
    number = 0
    try:
        with open_file(path) as raw:
            file = BufferedReader(gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw
            while read := file.readline(_LONGEST + 1):
                number += 1
                if number == 1:
                    read = read.removeprefix(b"\xef\xbb\xbf")
                if read.endswith(b"\n"):
                    yield number, read[:-1]
                elif len(read) > _LONGEST:
                    raise not_a_record(path, number, f"a line of more than {_LONGEST} bytes")
    except ArgumentValueError:
        raise
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise not_a_record(path, number or 1, str(error)) from None


def ranked(name: str, rank: int) -> str:
    """Return what a file is called that a rank has for itself: ``events.rank1.jsonl``."""
    stem, dot, ending = name.rpartition(".")
    return f"{stem}.rank{rank}{dot}{ending}" if rank else name


def segments(folder: Path) -> list[Path]:
    """Return the files that have the steps of a folder, in order."""
    numbered = {
        path.name.removesuffix(".gz"): path for path in sorted(folder.glob("steps-*.json*"))
    }
    last = folder / _STEPS
    finished = [path for name, path in sorted(numbered.items()) if name.endswith(".jsonl")]
    return [*finished, last] if last.exists() else finished


class Lines:
    """Appends lines to a file, many at once.

    Args:
        path: The file; made if it is missing. A torn last line of it is cut off.
        by_segment: Whether it is the newest segment of many.
    """

    def __init__(self, path: Path, *, by_segment: bool = False) -> None:
        self.path, self._by_segment = path, by_segment
        self.count = _mended(path)
        """How many lines the file has."""
        self._file = OwnFile(path)

    def append(self, texts: Sequence[str]) -> None:
        """Write lines, each with its end, in one go."""
        if not texts:
            return
        self._file.append("".join(texts).encode())
        self.count += len(texts)
        if self._by_segment and self.count >= SEGMENT:
            self._finish()

    def close(self) -> None:
        """Close the file; harmless when it is closed."""
        self._file.close()

    def _finish(self) -> None:
        self.close()
        number = 1 + max((_number(path) for path in segments(self.path.parent)), default=-1)
        finished = self.path.with_name(f"steps-{number:05}.jsonl")
        self.path.rename(finished)
        self._file, self.count = OwnFile(self.path), 0
        _pack(finished)


def pack_segments(folder: Path) -> None:
    """Finish what a killed run began: gzip each finished segment that is not."""
    for plain in folder.glob("steps-*.jsonl"):
        _pack(plain)


def drop_lines(path: Path, drops: Callable[[dict[str, object]], bool]) -> bool:
    """Write a file anew without some of its lines; return whether there were any.

    Args:
        path: A file of lines, gzipped or not.
        drops: Whether to drop what a line says.
    """
    lines = list(complete_lines(path))
    kept = [line for number, line in lines if not drops(parsed(path, number, line))]
    if len(kept) == len(lines):
        return False
    text = b"".join(line + b"\n" for line in kept)
    with replacing(path) as file:
        file.write(gzip.compress(text, _LEVEL) if path.suffix == ".gz" else text)
    return True


def _number(path: Path) -> int:
    digits = path.name.removeprefix("steps-").split(".")[0]
    return int(digits) if digits.isdecimal() else -1


def _pack(path: Path) -> None:
    """Replace a finished segment by a gzipped one."""
    with (
        replacing(path.with_name(f"{path.name}.gz")) as file,
        gzip.GzipFile("", "wb", _LEVEL, file, mtime=0) as packed,
        path.open("rb") as text,
    ):
        copyfileobj(text, packed, 1 << 20)
    path.unlink()


def _mended(path: Path) -> int:
    """Cut a torn last line off, and return how many lines there are."""
    if not path.exists():
        return 0
    count = end = 0
    with open_file(path) as file:
        while read := file.readline():
            if not read.endswith(b"\n"):
                break
            count, end = count + 1, end + len(read)
    os.truncate(path, end)
    return count
