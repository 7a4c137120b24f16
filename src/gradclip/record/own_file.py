"""A file that one process appends to, and that it notices not to be its own any more."""

import os
from errno import ESTALE
from pathlib import Path

__all__ = ["OwnFile"]

_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)


class OwnFile:
    """Appends bytes to a file that nobody else writes.

    Args:
        path: The file; made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, _FLAGS, 0o666)
        self._size = os.fstat(self._file).st_size

    def append(self, data: bytes) -> None:
        """Write bytes at the end.

        Raises:
            OSError: The disk fails, or the file is gone or not as long as this process left it:
                what is written would be lost, or stand among the lines of others.
        """
        if not self._path.exists() or self._path.stat().st_size != self._size:
            raise OSError(ESTALE, "its files were deleted, or another process writes them")
        write_all(self._file, data)
        self._size += len(data)

    def close(self) -> None:
        """Close the file; harmless when it is closed."""
        opened, self._file = self._file, -1
        if opened >= 0:
            os.close(opened)


def write_all(file: int, data: bytes) -> None:
    """Write bytes to a descriptor, however many it takes at a time."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
