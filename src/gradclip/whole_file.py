"""Files as a whole: replaced in one step, and read where they are files.

A file that is replaced holds, at any moment, the old text or the new.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

__all__ = ["open_file", "read_whole", "replacing", "write_whole"]


def open_file(path: Path) -> BinaryIO:
    """Open a file to read bytes.

    Raises:
        ValueError: It is no file. A pipe would be waited for, and a device has no end.
    """
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - the caller closes it
    if not S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("it is no file")
    return file


def read_whole(path: Path, most: int = -1) -> bytes:
    """Return the bytes of a file, and at most so many.

    Raises:
        ValueError: It is no file.
    """
    with open_file(path) as file:
        return file.read(most)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def write_whole(path: Path, text: str) -> None:
    """Write a text beside its place, flush it to the disk, and move it into place."""
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write bytes beside a place; they are flushed to the disk and moved there at the end.

    The draft has a name that nobody can guess, and is made anew: no link that somebody left there
    is followed.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with draft.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
