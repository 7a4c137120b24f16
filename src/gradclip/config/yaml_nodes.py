"""YAML without what surprises in it: tags, anchors, aliases, merge keys, dates, octal, base 60.

Numbers are read as in YAML 1.2 where PyYAML would give text (``1e-3``), every key is text and is
there once, and every key and value has its place, for errors. PyYAML takes some 20 microseconds for
a token, so a text may have only so many of them.
"""

import re
from typing import Any, Final

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from gradclip.config.literals import AMBIGUOUS_IN_YAML, as_number, why_ambiguous
from gradclip.config.report import KEY, Path, Span, file_error

__all__ = ["MAX_TOKENS", "TOO_MANY", "read_yaml", "write_yaml"]

MAX_TOKENS: Final = 20_000
"""No configuration has more keys, values and brackets: about a thousand groups of limits."""

TOO_MANY: Final = f"more than {MAX_TOKENS} keys, values and brackets are no configuration"

_TAG = "tag:yaml.org,2002:"
_AMBIGUOUS = "ambiguous"
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)\Z")
_FLOAT = re.compile(
    r"""(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:e[-+]?[0-9]+)?
                 |\.[0-9][0-9_]*(?:e[-+]?[0-9]+)?
                 |[0-9][0-9_]*e[-+]?[0-9]+
                 |\.inf)
         |\.nan)\Z""",
    re.VERBOSE | re.IGNORECASE,
)


class _RefusedError(Exception):
    """What a configuration may not hold, and where it stands."""

    def __init__(self, message: str, mark: Any) -> None:
        super().__init__(message)
        self.mark = mark


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012, PyYAML's own way
        first: [
            (tag, pattern) for tag, pattern in resolvers if tag in {f"{_TAG}bool", f"{_TAG}null"}
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth_left = 0

    def fetch_more_tokens(self) -> None:
        if self.tokens_taken > MAX_TOKENS:
            raise _RefusedError(
                TOO_MANY,
                self.get_mark(),
            )
        super().fetch_more_tokens()

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _RefusedError(
                "a configuration has no anchors and aliases: write the value out", event.start_mark
            )
        if event.tag is not None:
            raise _RefusedError(
                f"a configuration has no tags, and this is {event.tag!a}", event.start_mark
            )
        nests = isinstance(event, yaml.CollectionStartEvent)
        if nests and self.depth_left == 0:
            raise _RefusedError("nested too deep for a configuration", event.start_mark)
        self.depth_left -= nests
        node = super().compose_node(parent, index)
        self.depth_left += nests
        return node


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002, PyYAML's signature
        return True

    def represent_str(self, data: str) -> ScalarNode:
        # PyYAML's other styles lose some of what it takes for line breaks.
        style = None if data.isprintable() else '"'
        return self.represent_scalar(f"{_TAG}str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)
for _yaml in (_Loader, _Dumper):
    for _tag, _pattern in (
        (f"{_TAG}int", _INT),
        (f"{_TAG}float", _FLOAT),
        (_AMBIGUOUS, AMBIGUOUS_IN_YAML),
    ):
        _yaml.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))


def read_yaml(text: str, name: str, max_depth: int) -> tuple[Any, dict[Path, Span]]:
    """Read one YAML document.

    Returns:
        The data, and the place of each value by its path (of each key by its path and ``KEY``).

    Raises:
        ConfigFileError: GC003, it is not YAML, or more of YAML than a configuration needs.
    """
    spans: dict[Path, Span] = {(): Span(1, 1)}
    try:
        loader = _Loader(text)
        loader.depth_left = max_depth
        node = loader.get_single_node()
        return (None if node is None else _convert(loader, node, (), spans)), spans
    except _RefusedError as error:
        raise file_error(name, str(error), text, _span(error.mark, error.mark)) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        span = None if mark is None else _span(mark, mark)
        raise file_error(name, f"not valid YAML: {error.problem}", text, span) from None
    except yaml.reader.ReaderError as error:
        message = f"not valid YAML: {error.reason}"
        raise file_error(name, message, text, Span.at(text, error.position)) from None


def _convert(loader: _Loader, node: Node, path: Path, spans: dict[Path, Span]) -> Any:
    spans[path] = _span(node.start_mark, node.end_mark)
    if isinstance(node, SequenceNode):
        return [_convert(loader, item, (*path, i), spans) for i, item in enumerate(node.value)]
    if isinstance(node, MappingNode):
        data = {}
        for key_node, value_node in node.value:
            if key_node.tag != f"{_TAG}str":
                raise _RefusedError("a key must be text: put it in quotes", key_node.start_mark)
            key = key_node.value
            if key in data:
                raise _RefusedError(f"the key {key!a} is repeated", key_node.start_mark)
            spans[*path, key, KEY] = _span(key_node.start_mark, key_node.end_mark)
            data[key] = _convert(loader, value_node, (*path, key), spans)
        return data
    try:
        return _scalar(loader, node)
    except ValueError as error:  # also an integer of thousands of digits
        raise _RefusedError(str(error), node.start_mark) from None


def _scalar(loader: _Loader, node: Node) -> Any:
    if node.tag == _AMBIGUOUS:
        raise ValueError(why_ambiguous(node.value))
    if node.tag != f"{_TAG}float":
        return loader.construct_object(node)
    literal = node.value.replace("_", "")
    named = literal.lower().endswith((".inf", ".nan"))
    return as_number(literal.lower().replace(".", "") if named else literal)


def _span(start: Any, end: Any) -> Span:
    length = end.column - start.column if end.line == start.line else 1
    return Span(start.line + 1, start.column + 1, length)


def write_yaml(data: object) -> str:
    """Write data so that ``read_yaml`` reads the same again."""
    text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    assert isinstance(text, str)
    return text
