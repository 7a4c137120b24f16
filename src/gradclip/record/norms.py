"""The norm of every parameter on disk: rows of one size, appended, and thinned by doubling.

A row is the step, int64, and log10 of each norm, float16, little endian: right to 0.45 % from 1e-12
to 1e8, and NaN, infinity and 0 stay distinct. So a torn last row is seen by its size.
"""

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from gradclip.record.own_file import OwnFile
from gradclip.whole_file import open_file, replacing

__all__ = ["MOST_EVENTS", "MOST_ROWS", "NormRows", "row_size"]

MOST_ROWS = 131_072
"""Rows of a file at which every other one is dropped."""

MOST_EVENTS = 20_000
"""Rows of events, and lines of each kind of event, that are kept: the first ones."""

_MOST_BYTES = 96 << 20
"""Bytes of a file at which every other row is dropped, however many there are."""

_STEP = struct.Struct("<q")
_BLOCK = 1 << 20


def row_size(parameters: int) -> int:
    """Return how many bytes a row has."""
    return _STEP.size + 2 * parameters


class NormRows:
    """Appends rows to a file, whose steps only grow.

    Args:
        path: The file; made if it is missing. A torn last row of it is cut off.
        parameters: How many norms a row has.
        every: Which steps it has rows of: those that this divides.
        thins: Whether to drop every other row of a full file; otherwise it takes no more rows.
        before: Rows of this step and later ones are cut off; None keeps all.
    """

    def __init__(
        self,
        path: Path,
        parameters: int,
        *,
        every: int = 1,
        thins: bool = True,
        before: int | None = None,
    ) -> None:
        self.path, self.every = path, every
        self._size, self._thins = row_size(parameters), thins
        self._most = min(MOST_ROWS if thins else MOST_EVENTS, max(_MOST_BYTES // self._size, 2))
        self._rows = cut_rows(path, self._size, before) if path.exists() else 0
        self._file = OwnFile(path)

    def append(self, rows: Sequence[tuple[int, bytes]]) -> bool:
        """Write rows, each a step and its norms, as far as there is room.

        Returns:
            Whether the file was thinned.
        """
        thinned = False
        kept = [row for row in rows if row[0] % self.every == 0]
        while self._thins and kept and self._rows + len(kept) > self._most:
            self._thin()
            kept, thinned = [row for row in kept if row[0] % self.every == 0], True
        del kept[self._most - self._rows :]
        if kept:
            self._file.append(b"".join(_STEP.pack(step) + norms for step, norms in kept))
            self._rows += len(kept)
        return thinned

    def close(self) -> None:
        """Close the file; harmless when it is closed."""
        self._file.close()

    def _thin(self) -> None:
        self.every *= 2
        self.close()
        kept = 0
        with replacing(self.path) as file:
            for step, row in _rows(self.path, self._size):
                if step % self.every == 0:
                    kept += 1
                    file.write(row)
        self._rows = kept
        self._file = OwnFile(self.path)


def _rows(path: Path, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield the step and bytes of each whole row."""
    with open_file(path) as file:
        while len(block := file.read(max(_BLOCK // size, 1) * size)) >= size:
            for start in range(0, len(block) - size + 1, size):
                row = block[start : start + size]
                yield _STEP.unpack_from(row)[0], row


def cut_rows(path: Path, size: int, before: int | None) -> int:
    """Cut a torn last row off, and rows of later steps; return how many are left.

    Args:
        path: A file of rows.
        size: Bytes of each.
        before: The first step that is cut off; None for none.
    """
    rows = path.stat().st_size // size
    with open_file(path) as file:
        while before is not None and rows:
            file.seek((rows - 1) * size)
            if _STEP.unpack(file.read(_STEP.size))[0] < before:
                break
            rows -= 1
    os.truncate(path, rows * size)
    return rows
