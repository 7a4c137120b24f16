"""Files as a whole: replaced in one step, and read where they are files.

A file that is replaced holds, at any moment, the old text or the new.
"""

import os
import secrets
from pathlib import Path
from stat import S_ISREG

__all__ = ["read_whole", "write_whole"]


def read_whole(path: Path, most: int = -1) -> bytes:
    """Return the bytes of a file, and at most so many.

    Raises:
        ValueError: It is no file. A pipe would be waited for, and a device has no end.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        if not S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no file")
        return file.read(most)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def write_whole(path: Path, text: str) -> None:
    """Write a text beside its place, flush it to the disk, and move it into place.

    The draft has a name that nobody can guess, and is made anew: no link that somebody left there
    is followed.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with draft.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
