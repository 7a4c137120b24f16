"""What a record says about its run, checked: ``run.json``, or the first line of a file."""

from pathlib import Path
from typing import Any

from gradclip.errors import ArgumentValueError
from gradclip.record.lines import ranked
from gradclip.record.schema import FOLDER_SCHEMA, not_a_record, parsed, short
from gradclip.whole_file import read_whole

__all__ = ["checked_schema", "read_about"]

_LONGEST = 1 << 27
"""Bytes of what is said of a run: a million parameters with long names take less."""


def read_about(folder: Path, rank: int) -> dict[str, Any]:
    """Return what a rank says about the run in a folder.

    Raises:
        ArgumentValueError: GC010, it is not there, damaged, or of another schema.
    """
    path = folder / ranked("run.json", rank)
    try:
        text = read_whole(path, _LONGEST + 1)
    except (OSError, ValueError) as error:
        if not folder.exists():
            raise ArgumentValueError(f"there is no {folder}: expected a record") from None
        found = "is no file" if isinstance(error, ValueError) else error.strerror
        raise ArgumentValueError(
            f"{folder} is no gradclip record: {path.name}, which says what the rest is of, {found}."
        ) from None
    if len(text) > _LONGEST:
        raise not_a_record(path, 1, f"more than {_LONGEST} bytes")
    about = checked_schema(path, parsed(path, 1, text), FOLDER_SCHEMA)
    entries = about.get("optimizers")
    if not isinstance(entries, list) or not all(map(_is_optimizer, entries)):
        raise not_a_record(path, 1, "its optimizers are not what gradclip writes")
    return about


def checked_schema(path: Path, header: dict[str, Any], schema: int) -> dict[str, Any]:
    """Return a header of a schema.

    Raises:
        ArgumentValueError: GC010, it is of another.
    """
    if type(header.get("schema")) is not int or header["schema"] != schema:
        found = f"schema {short.repr(header['schema'])}" if "schema" in header else "no schema"
        raise not_a_record(path, 1, f"the header has {found}; this version reads {schema}")
    return header


def _is_optimizer(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and _is_count(entry.get("optimizer"))
        and isinstance(parts := entry.get("norms"), list)
        and all(map(_is_part, parts))
    )


def _is_part(part: Any) -> bool:
    """Return whether this tells all of a file of norms, which is beside it."""
    if not isinstance(part, dict):
        return False
    lists: list[Any] = [part.get(name) for name in ("names", "sizes", "orders", "weights")]
    names, sizes, orders, weights = lists
    return (
        all(isinstance(each, list) for each in lists)
        and all(isinstance(name, str) for name in names)
        and all(map(_is_count, sizes))
        and len(sizes) == len(names)
        and all(len(each) in {1, len(names)} for each in (orders, weights))
        and all(each == "inf" or _is_positive(each) for each in (*orders, *weights))
        and all(_is_beside(part.get(name)) for name in ("file", "events"))
        and _is_count(part.get("first_step"))
        and _is_count(part.get("every"))
        and part["every"] > 0
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_positive(value: Any) -> bool:
    return type(value) in {int, float} and 0 < value < float("inf")


def _is_beside(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".f16") and Path(name).name == name
