"""Checkpoints on disk: each is there whole or not at all, and says so itself.

A checkpoint is written in a hidden folder beside its place, flushed to the disk, and renamed into
place. Its ``manifest.json`` has the size and the SHA-256 of every file. A folder that a killed run
left half-written never gets a name that a reader looks at, and goes at the next save. One folder of
checkpoints belongs to one run at a time.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradclip import __version__
from gradclip.errors import CheckpointError
from gradclip.pipeline.checkpoint.progress import TrainerProgressState

__all__ = [
    "Manifest",
    "find",
    "holds_checkpoints",
    "last_step",
    "read_manifest",
    "verify",
    "write",
]

MANIFEST = "manifest.json"
_SCHEMA = 1
_NAME = re.compile(r"epoch-\d+-step-\d+(-\d+)?")
_DRAFT = re.compile(r"\.epoch-\d+-step-\d+(-\d+)?\.(tmp|old)")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself.

    Args:
        sequence: Counts the checkpoints of a folder in the order of writing.
        progress: How far the run was.
        files: Size and SHA-256 of every file, by its path inside the checkpoint.
    """

    sequence: int
    progress: TrainerProgressState
    files: dict[str, dict[str, Any]]


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
    with together():
        if main:
            root.mkdir(parents=True, exist_ok=True)
            _remove_drafts(root)
            draft.mkdir()
    with together():
        fill(draft)
    with together():
        return _finish(root, draft, name, progress, keep_last) if main else None


def _finish(
    root: Path, draft: Path, name: str, progress: TrainerProgressState, keep_last: int | None
) -> Path:
    """Seal what all processes wrote, give it its name, and remove the oldest."""
    complete = list(_complete(root))
    sequence = 1 + max((manifest.sequence for _, manifest in complete), default=0)
    _seal(draft, Manifest(sequence, progress, _hash_and_flush(draft)))
    place = _free_place(root, name)
    draft.rename(place)
    _flush_folder(root)
    complete.sort(key=lambda entry: entry[1].sequence)
    if keep_last is not None:
        for old, _ in complete[: max(0, len(complete) + 1 - keep_last)]:
            _remove(old)
    return place


def find(path: Path) -> tuple[Path, Manifest]:
    """Return a checkpoint that is complete and undamaged.

    Args:
        path: A checkpoint, or a folder of checkpoints, of which the last one is taken; damaged ones
            are passed over with a warning.

    Raises:
        CheckpointError: GC301, there is none, or the one that was named is incomplete or damaged.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path}: no such folder")
    if (path / MANIFEST).exists() or _NAME.fullmatch(path.name):
        return path, verify(path)
    found: list[tuple[int, Path]] = []
    for folder in _named(path):
        try:
            found.append((read_manifest(folder).sequence, folder))
        except CheckpointError as error:
            _warn_passed_over(error)
    for _, folder in sorted(found, reverse=True):
        try:
            return folder, verify(folder)
        except CheckpointError as error:
            _warn_passed_over(error)
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


def verify(path: Path) -> Manifest:
    """Check a checkpoint against its manifest, every byte of it.

    Raises:
        CheckpointError: GC301, it is incomplete or damaged.
    """
    manifest = read_manifest(path)
    for name, expected in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise _damaged(path, f"{name} is missing")
        found = _entry(file)
        if found != expected:
            raise _damaged(path, f"{name} is {found}, and the manifest says {expected}")
    return manifest


def read_manifest(path: Path) -> Manifest:
    """Read what a checkpoint says about itself, without checking its files.

    Raises:
        CheckpointError: GC301, there is no manifest, or none that this version can read.
    """
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _damaged(path, f"it has no {MANIFEST}: it was never finished") from None
    except (OSError, ValueError) as error:
        raise _damaged(path, f"its {MANIFEST} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != _SCHEMA:
        raise _damaged(path, f"its {MANIFEST} is not of schema {_SCHEMA}")
    sequence, progress, files = (content.get(key) for key in ("sequence", "progress", "files"))
    if not (isinstance(sequence, int) and isinstance(progress, dict) and isinstance(files, dict)):
        raise _damaged(path, f"its {MANIFEST} is incomplete")
    return Manifest(sequence, TrainerProgressState.from_state_dict(progress), files)


def _hash_and_flush(folder: Path) -> dict[str, dict[str, Any]]:
    files = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        _flush(file)
        files[file.relative_to(folder).as_posix()] = _entry(file)
    return files


def _entry(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"size": file.stat().st_size, "sha256": digest}


def _seal(draft: Path, manifest: Manifest) -> None:
    content = {"gradclip": __version__, "schema": _SCHEMA, **asdict(manifest)}
    file = draft / MANIFEST
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _flush(file)
    for folder in [folder for folder in draft.rglob("*") if folder.is_dir()]:
        _flush_folder(folder)
    _flush_folder(draft)


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
        if _DRAFT.fullmatch(folder.name):
            shutil.rmtree(folder)


def _named(root: Path) -> list[Path]:
    return sorted(f for f in root.iterdir() if f.is_dir() and _NAME.fullmatch(f.name))


def _complete(root: Path) -> Iterator[tuple[Path, Manifest]]:
    for folder in _named(root):
        with suppress(CheckpointError):
            yield folder, read_manifest(folder)


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {path} is incomplete or damaged: {found}. Resume from another one, or "
        "from the folder that holds them, which takes the last one that is whole."
    )


def _warn_passed_over(error: CheckpointError) -> None:
    warnings.warn(f"passed over: {error}", stacklevel=4)
