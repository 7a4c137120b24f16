"""How a wrong configuration is shown: what, where in the file, the values seen, what to do.

The text of an error is its headline, then one line each for a suggestion and for what else helps;
this module adds the code, the place and the source line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from reprlib import Repr
from typing import Any, TypeAlias

from pydantic import ValidationError

from gradclip.errors import ClassTypeError, ConfigError, ConfigFileError

__all__ = ["KEY", "Document", "Path", "Span", "explain", "file_error"]

Key: TypeAlias = str | int
Path: TypeAlias = tuple[Key, ...]
KEY = "\0key"
"""Ends a path that means the key and not its value; YAML has no such character."""
_SUGGESTION = "did you mean"
_LINE_WIDTH = 100
_MESSAGE_WIDTH = 400
_SHOWN_PROBLEMS = 10
_repr = Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60


@dataclass(frozen=True)
class Span:
    """A place in a text: line and column from 1, and how many characters of that line."""

    line: int
    column: int
    length: int = 1

    @classmethod
    def at(cls, text: str, offset: int) -> "Span":
        """Return the place of the character at an offset."""
        start = text.rfind("\n", 0, offset) + 1
        return cls(text.count("\n", 0, offset) + 1, offset - start + 1)


@dataclass(frozen=True)
class Document:
    """A parsed file: its data, and where in the text each part is, if the parser could tell."""

    name: str
    text: str
    data: Any
    spans: Mapping[Path, Span] = field(default_factory=dict)
    """The place of each value by its path, and of its key by that path and ``KEY``."""


def file_error(
    name: str, message: str, text: str = "", span: Span | None = None
) -> ConfigFileError:
    """Make the error for a file that is no configuration at all."""
    return ConfigFileError(_render(ConfigFileError, message, name, text, span))


def explain(error: ValidationError, document: Document) -> ConfigError:
    """Turn what pydantic found into one error that points into the file."""
    blocks = []
    kind: type[ConfigError] = ConfigError
    problems = error.errors(include_url=False)
    for problem in problems[:_SHOWN_PROBLEMS]:
        cause = problem.get("ctx", {}).get("error")
        refused = isinstance(cause, ClassTypeError) or problem["type"] == "is_subclass_of"
        kind = ClassTypeError if refused else kind
        path, absent = _follow(document.data, problem["loc"])
        message = (
            str(cause) if isinstance(cause, ClassTypeError) else _worded(problem, path, absent)
        )
        target = (*path, KEY) if problem["type"] == "unknown_field" else path
        place = document.name if document.spans else f"{document.name}: {_dotted(path)}"
        span = document.spans.get(target)
        blocks.append(
            _render(ClassTypeError if refused else ConfigError, message, place, document.text, span)
        )
    if len(problems) > _SHOWN_PROBLEMS:
        blocks.append(f"... and {len(problems) - _SHOWN_PROBLEMS} more errors")
    return kind("\n\n".join(blocks))


def _follow(data: Any, loc: Sequence[Key]) -> tuple[Path, Key | None]:
    """Walk the data along pydantic's location, which also names union members on the way."""
    path: list[Key] = []
    absent: Key | None = None
    for key in loc:
        inside = key in data if isinstance(data, dict) else False
        if inside or (isinstance(data, list) and isinstance(key, int) and key < len(data)):
            data = data[key]
            path.append(key)
            absent = None
        else:
            absent = key
    return tuple(path), absent


def _worded(problem: Mapping[str, Any], path: Path, absent: Key | None) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    kind = problem["type"]
    if kind == "missing":
        return f"`{absent}` is missing"
    value = problem["input"]
    if kind == "is_subclass_of" and isinstance(value, type):
        name = f"{value.__module__}:{value.__qualname__}"
        return f"`{_dotted(path)}` is {name}, which is no subclass of {problem['ctx']['class']}"
    if kind == "union_tag_not_found" and isinstance(value, Mapping):
        field = problem["ctx"]["discriminator"].strip("'")
        return f"`{_dotted(path)}` has no `{field}`\nit says which kind this is, and so its fields"
    if kind in {"unknown_field", "number_type", "value_error", "tensor"}:
        return str(message)
    return f"`{_dotted(path)}` is {_repr.repr(value)}\n{message}"


def _dotted(path: Path) -> str:
    text = "".join(
        f"[{key}]" if isinstance(key, int) else f".{key}" if key.isidentifier() else f"[{key!a}]"
        for key in path
    )
    return text.removeprefix(".") or "top level"


def _render(kind: type[ConfigError], message: str, place: str, text: str, span: Span | None) -> str:
    headline, *notes = (_cut(line) for line in message.split("\n"))
    suggestion = notes.pop(0) if notes and notes[0].startswith(_SUGGESTION) else ""
    lines = [f"error[{kind.code}]: {headline}"]
    margin = "  "
    if span is None:
        lines.append(f"  --> {_cut(place)}")
        if suggestion:
            notes.insert(0, suggestion)
    else:
        margin = " " * (len(str(span.line)) + 1)
        source, indent = _excerpt(text, span)
        caret = indent + "^" * max(1, min(span.length, len(source) - len(indent)))
        lines += [
            f"{margin}--> {place}:{span.line}:{span.column}",
            f"{margin} |",
            f" {span.line} | {source}",
            f"{margin} | {caret} {suggestion}".rstrip(),
        ]
    if notes:
        lines += [f"{margin} |", *(f"{margin} = {note}" for note in notes)]
    return "\n".join(lines)


def _cut(line: str) -> str:
    return line if len(line) <= _MESSAGE_WIDTH else line[:_MESSAGE_WIDTH] + "..."


def _excerpt(text: str, span: Span) -> tuple[str, str]:
    """Cut the source line to the part around the span; also return the blanks before it."""
    lines = text.split("\n")
    line = lines[span.line - 1].rstrip("\r") if span.line <= len(lines) else ""
    start = max(0, span.column - 1 - _LINE_WIDTH // 2)
    source = "".join(c if c.isprintable() else " " for c in line[start : start + _LINE_WIDTH])
    return source, " " * (span.column - 1 - start)
