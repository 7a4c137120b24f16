"""Checkpoints on disk: each is there whole or not at all, and says so itself.

A checkpoint is written in a hidden folder beside its place, flushed to the disk, and renamed into
place. Its manifest knows every file. A folder that a killed run left half-written never gets a name
that a reader looks at, and goes at the next save. One folder of checkpoints belongs to one run at a
time.
"""

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from gradclip.errors import CheckpointError, GradClipError, warn
from gradclip.pipeline.checkpoint.manifest import (
    MANIFEST,
    NAME,
    Manifest,
    file_entry,
    read_manifest,
    seal,
    verify,
)
from gradclip.pipeline.checkpoint.progress import TrainerProgressState

__all__ = ["find", "holds_checkpoints", "last_step", "write"]

logger = logging.getLogger(__name__)

_DRAFT = re.compile(rf"\.{NAME.pattern}\.(?:tmp|old)")


def write(
    root: Path,
    progress: TrainerProgressState,
    fill: Callable[[Path], None],
    *,
    keep_last: int | None = None,
    main: bool = True,
    together: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Path | None:
    """Write a checkpoint, whole or not at all; every process of the run calls it.

    Args:
        root: The folder of checkpoints; made if it is missing.
        progress: How far the run is; names the checkpoint.
        fill: Writes the files of this process into the folder that it is given.
        keep_last: How many of the last complete checkpoints to keep; None for all.
        main: Whether this process is the one that names, hashes and removes.
        together: Makes a context that ends on all processes at once, and raises on all of them
            what was raised in it on one.

    Returns:
        Where the checkpoint is; None on the other processes.
    """
    name = f"epoch-{progress.epoch_id:04d}-step-{progress.global_step_id:08d}"
    draft = root / f".{name}.tmp"
    try:
        with together(), _to_disk(root / name):
            if main:
                root.mkdir(parents=True, exist_ok=True)
                _remove_drafts(root)
                draft.mkdir()
        with together(), _to_disk(root / name):
            fill(draft)
        with together(), _to_disk(root / name):
            return _finish(root, draft, name, progress, keep_last) if main else None
    except Exception:
        if main:  # what was written fills a disk that may be full
            shutil.rmtree(draft, ignore_errors=True)
        raise


@contextmanager
def _to_disk(place: Path) -> Iterator[None]:
    """Say of an error of the disk which checkpoint it prevents, and what to do."""
    try:
        yield
    except GradClipError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__  # torch reports a full disk as its own
        if cause is None:
            raise
        raise CheckpointError(
            f"the checkpoint {place} cannot be written: {cause}. Make room there, or set another "
            "save_root. The checkpoints that were there are as they were: resume from their folder."
        ) from error


def _finish(
    root: Path, draft: Path, name: str, progress: TrainerProgressState, keep_last: int | None
) -> Path:
    """Seal what all processes wrote, give it its name, and remove the oldest."""
    complete = list(_complete(root))
    sequence = 1 + max((manifest.sequence for _, manifest in complete), default=0)
    file = draft / MANIFEST
    file.write_bytes(seal(Manifest(sequence, progress, _hash_and_flush(draft))))
    _flush(file)
    for folder in [*(folder for folder in draft.rglob("*") if folder.is_dir()), draft]:
        _flush_folder(folder)
    place = _free_place(root, name)
    draft.rename(place)
    _flush_folder(root)
    complete.sort(key=lambda entry: entry[1].sequence)
    if keep_last is not None:
        for old, _ in complete[: max(0, len(complete) + 1 - keep_last)]:
            try:
                _remove(old)
                logger.info("Remove checkpoint %s: the last %s are kept", old, keep_last)
            except OSError as error:  # the new one is there
                warn(f"the checkpoint {old} is one too many, and cannot be removed: {error}")
    return place


def find(path: Path) -> tuple[Path, Manifest]:
    """Return a checkpoint that is complete and undamaged.

    Args:
        path: A checkpoint, or a folder of checkpoints, of which the last one is taken; damaged ones
            are passed over with a warning.

    Raises:
        CheckpointError: GC301, there is none, or the one that was named is incomplete or damaged.
    """
    try:
        folders = _named(path)
    except OSError as error:
        raise CheckpointError(
            f"there is no checkpoint at {path}: no such folder, or none that can be read "
            f"({error.strerror})"
        ) from error
    # A folder of checkpoints may have the name of one.
    if not folders and ((path / MANIFEST).exists() or NAME.fullmatch(path.name)):
        return path, verify(path)
    found: list[tuple[int, Path]] = []
    for folder in folders:
        try:
            found.append((read_manifest(folder).sequence, folder))
        except CheckpointError as error:
            warn(f"passed over: {error}")
    for _, folder in sorted(found, reverse=True):
        try:
            return folder, verify(folder)
        except CheckpointError as error:
            warn(f"passed over: {error}")
    raise CheckpointError(
        f"there is no complete checkpoint in {path}. Leave resume_from out to start from scratch, "
        "in another folder where there are damaged ones."
    )


def holds_checkpoints(root: Path) -> bool:
    """Whether there is a checkpoint in a folder, be it damaged."""
    return root.is_dir() and bool(_named(root))


def last_step(root: Path) -> int:
    """Return how many batches the run that got farthest had trained on; -1 if none is complete."""
    return max((each.progress.global_step_id for _, each in _complete(root)), default=-1)


def _hash_and_flush(folder: Path) -> dict[str, dict[str, Any]]:
    files = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        _flush(file)
        files[file.relative_to(folder).as_posix()] = file_entry(file)
    return files


def _flush(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _flush_folder(folder: Path) -> None:
    # Not every system can open a folder; the rename is still atomic there.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _free_place(root: Path, name: str) -> Path:
    """Return a name that no checkpoint has: replacing one would leave a moment without either."""
    place, number = root / name, 1
    while place.exists():
        number += 1
        place = root / f"{name}-{number}"
    return place


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that a kill on the way leaves no damaged one behind."""
    hidden = folder.with_name(f".{folder.name}.old")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _remove_drafts(root: Path) -> None:
    for folder in root.iterdir():
        if not _DRAFT.fullmatch(folder.name):
            continue
        if folder.is_symlink() or not folder.is_dir():
            folder.unlink()
        else:
            shutil.rmtree(folder, ignore_errors=True)  # a removed one that stays is in nobody's way


def _named(root: Path) -> list[Path]:
    return sorted(f for f in root.iterdir() if f.is_dir() and NAME.fullmatch(f.name))


def _complete(root: Path) -> Iterator[tuple[Path, Manifest]]:
    for folder in _named(root):
        with suppress(CheckpointError):
            yield folder, read_manifest(folder)
