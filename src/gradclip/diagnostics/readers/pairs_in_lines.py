"""Names and numbers in lines of text: Megatron, nanoGPT, torchtitan, lerobot, verl, others."""

import re
from collections.abc import Iterator

from gradclip.diagnostics.readers.source import Source
from gradclip.diagnostics.readers.table import Table

__all__ = ["claims", "read"]

_LONGEST = 2**16
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
_WORD = r"(?!(?:nan|inf|None)\b)[A-Za-z_][\w./#@%&-]{0,100}+"
_NUMBER = (
    r"[-+]?1\.\#\w+"
    r"|[-+]?(?>\d{1,3}(?:,\d{3})++(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)(?>[eE][-+]?\d+)?[KMB]?"
    r"|[-+]?(?:nan|NaN|NAN|[iI]nf(?:inity)?|INF)|None|\?"
)
_PAIR = re.compile(
    rf"(?<![\w./\#@%&-])(?P<name>{_WORD}(?:\ {_WORD}){{0,4}}+(?:\ ?\([^()]{{0,20}}\))?)"
    r"(?>\s{0,40}(?:[:=]|\.{3,80})\s{0,40}|\s{1,40})"
    rf"(?P<wrapped>\w[\w.]{{0,30}}\()?(?P<value>(?>{_NUMBER}))(?![\w]|[-:.]\d)"
)
_GROUP = re.compile(r"(?P<name>[A-Za-z_][\w./]{0,60}+)\((?P<inner>\s?\w{1,30}\s?=[^()]{1,200})\)")
_LEVEL = re.compile(r"(?:(?:INFO|WARNING|WARN|DEBUG|ERROR|\S+\.py) )+")


def claims(source: Source) -> bool:  # noqa: ARG001 - as every reader has it
    """Return True: any text may have pairs in it."""
    return True


def read(source: Source) -> Table:
    """Read each line as a row, and each piece of a line that a carriage return begins."""
    table = Table("text")
    for _, line in source.lines():
        for piece in line.split("\r"):
            if len(piece) <= _LONGEST:
                row = dict(_pairs(_ESCAPE.sub("", piece)))
                if row:
                    table.add(row)
    return table


def _pairs(line: str) -> Iterator[tuple[str, str]]:
    """Yield names with their values; ``Grad(P=1, V=2)`` has two, the first is ``Grad(P)``."""
    if "(" in line and "=" in line:
        for group in _GROUP.finditer(line):
            for pair in group["inner"].split(","):
                name, _, value = pair.partition("=")
                yield f"{group['name']}({name.strip()})", value
        line = _GROUP.sub(" ", line)
    for found in _PAIR.finditer(line):
        yield _LEVEL.sub("", found["name"]), found["value"]
