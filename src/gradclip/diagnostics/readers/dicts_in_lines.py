"""Dictionaries in a text: what transformers prints, and JSON behind the prefix of a logger."""

import re

from gradclip.diagnostics.readers.source import Source
from gradclip.diagnostics.readers.table import Table

__all__ = ["claims", "read"]

_DICT = re.compile(r"\{[^{}]*+\}")
_ITEM = re.compile(
    r"""(?P<quote>['"])(?P<key>[^'"]{1,200})(?P=quote)\s*:\s*"""
    r"""(?:(?P<quoted>['"])(?P<text>[^'"]{0,200})(?P=quoted)"""
    r"""|(?:[A-Za-z_][\w.]{0,40}+\()?(?P<plain>[^,{}'"()]{1,200}))"""
)
_LONGEST = 2**20


def claims(source: Source) -> bool:  # noqa: ARG001 - as every reader has it
    """Return True: any text may have dictionaries in it."""
    return True


def read(source: Source) -> Table:
    """Read each dictionary as a row; what is behind a carriage return is a line, too."""
    table = Table("dictionaries in lines")
    for _, line in source.lines():
        if "{" not in line or ":" not in line or len(line) > _LONGEST:
            continue
        for found in _DICT.findall(line):
            row = {
                item["key"]: item["plain"] if item["text"] is None else item["text"]
                for item in _ITEM.finditer(found)
            }
            if row:
                table.add(row)
    return table
