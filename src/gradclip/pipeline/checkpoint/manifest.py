"""What a checkpoint says about itself, and whether it is so.

``manifest.json`` has the size and the SHA-256 of every file, and in its last entry the SHA-256 of
its own bytes before that entry. So no bit of a checkpoint changes unseen. That finds damage; it is
no proof of who wrote the checkpoint.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from reprlib import Repr
from typing import Any, Final, TypeGuard

from gradclip import __version__
from gradclip.errors import CheckpointError
from gradclip.pipeline.checkpoint.progress import TrainerProgressState
from gradclip.whole_file import read_whole

__all__ = ["MANIFEST", "NAME", "Manifest", "file_entry", "read_manifest", "seal", "verify"]

MANIFEST: Final = "manifest.json"
NAME: Final = re.compile(r"epoch-([0-9]{4,})-step-([0-9]{8,})(?:-[0-9]+)?")
_SCHEMA = 2
_UNSIGNED = 1
"""The schema of manifests that do not sign themselves: still read, not written any more."""
_MAX_BYTES = 2**21
"""Enough for 15,000 processes; a larger file would take long to read, and is no manifest."""
_SIGNATURE = b',\n "sha256": "'

_short = Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80


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


def seal(manifest: Manifest) -> bytes:
    """Return the text of a manifest, which ends in the SHA-256 of what is before."""
    content = {"gradclip": __version__, "schema": _SCHEMA, **asdict(manifest)}
    return _signed(json.dumps(content, indent=1).removesuffix("\n}").encode())


def verify(path: Path) -> Manifest:
    """Check a checkpoint against its manifest, every byte of it.

    Raises:
        CheckpointError: GC301, it is incomplete or damaged.
    """
    manifest = read_manifest(path)
    for name, expected in manifest.files.items():
        try:
            found = file_entry(path / name) if (path / name).is_file() else None
        except OSError as error:
            raise _damaged(path, f"{_cut(name)} cannot be read: {error.strerror}") from error
        if found is None:
            raise _damaged(path, f"{_cut(name)} is missing")
        if found != expected:
            said = _short.repr(expected)
            raise _damaged(path, f"{_cut(name)} is {found}, and the manifest says {said}")
    return manifest


def read_manifest(path: Path) -> Manifest:
    """Read what a checkpoint says about itself, without checking its files.

    Raises:
        CheckpointError: GC301, there is no manifest, it is damaged, it is of another checkpoint, or
            this version cannot read it.
    """
    try:
        data = _bytes(path / MANIFEST)
        content = json.loads(data.decode(), object_pairs_hook=_each_key_once)
    except FileNotFoundError:
        raise _damaged(path, f"it has no {MANIFEST}: it was never finished") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, f"its {MANIFEST} cannot be read: {error}") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if not _is_count(schema) or schema not in (_UNSIGNED, _SCHEMA):
        raise _damaged(path, f"its {MANIFEST} is not of schema {_UNSIGNED} or {_SCHEMA}")
    if schema == _SCHEMA and _signed(data.rpartition(_SIGNATURE)[0]) != data:
        raise _damaged(path, f"its {MANIFEST} is not what was written: its SHA-256 is another")
    manifest = _manifest(path, content)
    named, progress = NAME.fullmatch(path.name), manifest.progress
    if named and (int(named[1]), int(named[2])) != (progress.epoch_id, progress.global_step_id):
        says = f"epoch {progress.epoch_id} and step {progress.global_step_id}"
        raise _damaged(path, f"its {MANIFEST} is of {says}: of another checkpoint")
    return manifest


def file_entry(file: Path) -> dict[str, Any]:
    """Return what a manifest says of a file."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"size": file.stat().st_size, "sha256": digest}


def _manifest(path: Path, content: Mapping[str, Any]) -> Manifest:
    sequence, progress, files = (content.get(key) for key in ("sequence", "progress", "files"))
    if not (_is_count(sequence) and isinstance(progress, dict) and isinstance(files, dict)):
        raise _damaged(path, f"its {MANIFEST} is incomplete")
    if not files:
        raise _damaged(path, f"its {MANIFEST} names no file")
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or not isinstance(entry, dict):
            raise _damaged(path, f"its {MANIFEST} has no valid {_short.repr({name: entry})}")
    try:
        return Manifest(sequence, TrainerProgressState.from_state_dict(progress), files)
    except CheckpointError as error:
        raise _damaged(path, str(error)) from None


def _signed(body: bytes) -> bytes:
    return body + _SIGNATURE + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


def _bytes(file: Path) -> bytes:
    data = read_whole(file, _MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES} bytes")
    return data


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key is repeated")
    return content


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _cut(name: str) -> str:
    return name if name.isprintable() and len(name) <= _short.maxstring else _short.repr(name)


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {path} is incomplete or damaged: {found}. Resume from another one, or "
        "from the folder that holds them, which takes the last one that is whole."
    )
