"""From the text of a file to plain data, refusing what a configuration has no use for."""

import json
import re
import tomllib
from collections.abc import Callable
from typing import Final, Literal, TypeAlias

from gradclip.config.literals import as_number
from gradclip.config.report import Document, Span, file_error
from gradclip.config.robo_orchard import with_nulls
from gradclip.config.yaml_nodes import MAX_TOKENS, TOO_MANY, read_yaml

__all__ = ["MAX_BYTES", "MAX_DEPTH", "Format", "parse"]

Format: TypeAlias = Literal["json", "yaml", "toml"]

MAX_BYTES: Final = 2**18
"""No configuration is larger; to read and check something larger may take seconds."""
MAX_DEPTH: Final = 32
"""No configuration nests deeper; a parser may run out of stack on what does."""

# Possessive and open-ended, so that no text takes more than linear time.
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}:]|[^\s\[\]{}:",]++', re.DOTALL)
_TOML_KEY = r"""(?:[A-Za-z0-9_-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')"""
_TOML_TOKEN = re.compile(
    r'"""(?:[^\\]|\\.)*?(?:"""|\Z)'
    r"|'''.*?(?:'''|\Z)"
    r"|(?P<comment>\#[^\n]*+)"
    rf"|(?P<deep>{_TOML_KEY}(?:[ \t]*+\.[ \t]*+{_TOML_KEY}){{{MAX_DEPTH},}})"
    rf"|{_TOML_KEY}"
    r"|(?P<open>[\[{])|(?P<close>[\]}])"
    r"|(?P<between>[^\"'\#A-Za-z0-9_\[\]{}-]++)",
    re.DOTALL,
)
_TOML_PLACE = re.compile(r"(?P<what>.*) \(at line (?P<line>\d+), column (?P<column>\d+)\)")


def parse(text: str, format: Format, name: str) -> Document:  # noqa: A002, the word users know
    """Read a text as data made of dicts with text keys, lists, text, numbers, booleans and None.

    Args:
        text: What the file holds.
        format: Which language that is.
        name: The file's name, for errors.

    Returns:
        The data, with the places of its parts where the format's parser tells them.

    Raises:
        ConfigFileError: GC003, the text is too large, too deep, not in the format, repeats a key,
            or holds NaN, a number that no float is near, a number that versions of YAML read
            differently, a YAML tag or a YAML alias.
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        raise file_error(name, f"{size} bytes are more than the {MAX_BYTES} of a configuration")
    return _PARSERS[format](text, name)


def _parse_yaml(text: str, name: str) -> Document:
    data, spans = read_yaml(text, name, MAX_DEPTH)
    return Document(name, text, data, spans)


def _parse_json(text: str, name: str) -> Document:
    data = None
    try:
        data = json.loads(text, parse_float=as_number)
    except json.JSONDecodeError as error:
        span = Span(error.lineno, error.colno)
        raise file_error(name, f"not valid JSON: {error.msg}", text, span) from None
    except RecursionError:
        pass  # the scan says where
    except ValueError as error:
        raise file_error(name, f"not valid JSON: {error}", text) from None
    _scan_json(text, name)
    return Document(name, text, data)


def _scan_json(text: str, name: str) -> None:
    """Refuse, with its place, what Python's parser takes: deep nesting, repeated keys, NaN."""
    nesting: list[set[str] | None] = []  # the keys so far of each open object; None for a list
    last = ("", 0)
    for number, match in enumerate(_JSON_TOKEN.finditer(text)):
        part, offset = match[0], match.start()
        if number == MAX_TOKENS:
            raise file_error(name, TOO_MANY, text, Span.at(text, offset))
        if part in {"{", "["}:
            nesting.append(set() if part == "{" else None)
            if len(nesting) > MAX_DEPTH:
                raise file_error(name, _TOO_DEEP, text, Span.at(text, offset))
        elif part in {"}", "]"}:
            nesting.pop()
        elif part == ":" and (keys := nesting[-1]) is not None:
            key = json.loads(last[0])
            if key in keys:
                raise file_error(name, f"the key {key!a} is repeated", text, Span.at(text, last[1]))
            keys.add(key)
        elif part in {"NaN", "Infinity", "-Infinity"}:
            message = f'{part} is not JSON\nan infinite limit is written "inf"; NaN is no limit'
            raise file_error(name, message, text, Span.at(text, offset))
        last = (part, offset)


def _parse_toml(text: str, name: str) -> Document:
    depth = tokens = 0
    for match in _TOML_TOKEN.finditer(text):
        tokens += not (match["comment"] or match["between"])
        if tokens > MAX_TOKENS:
            raise file_error(name, TOO_MANY, text, Span.at(text, match.start()))
        depth += bool(match["open"]) - bool(match["close"])
        if match["deep"] or depth > MAX_DEPTH:
            raise file_error(name, _TOO_DEEP, text, Span.at(text, match.start()))
    try:
        data = tomllib.loads(text, parse_float=as_number)
    except ValueError as error:
        place = _TOML_PLACE.fullmatch(str(error))
        if place is None:
            raise file_error(name, f"not valid TOML: {error}", text) from None
        span = Span(int(place["line"]), int(place["column"]))
        raise file_error(name, f"not valid TOML: {place['what']}", text, span) from None
    if _too_deep(data, MAX_DEPTH):  # a table's name and the keys in it add up
        raise file_error(name, _TOO_DEEP)
    return Document(name, text, with_nulls(data))


def _too_deep(data: object, left: int) -> bool:
    if not isinstance(data, dict | list):
        return False
    children = data.values() if isinstance(data, dict) else data
    return left == 0 or any(_too_deep(child, left - 1) for child in children)


_TOO_DEEP: Final = f"nested more than {MAX_DEPTH} deep"
_PARSERS: Final[dict[Format, Callable[[str, str], Document]]] = {
    "json": _parse_json,
    "toml": _parse_toml,
    "yaml": _parse_yaml,
}
