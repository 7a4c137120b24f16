"""Tables of ``| name | value |`` in a text, as stable-baselines prints them."""

from gradclip.diagnostics.readers.source import Source
from gradclip.diagnostics.readers.table import Table

__all__ = ["claims", "read"]

_CELLS = 2


def claims(source: Source) -> bool:  # noqa: ARG001 - as every reader has it
    """Return True: any text may have tables in it."""
    return True


def read(source: Source) -> Table:
    """Read each table as a row; a name that ends with a slash stands before those below it."""
    table = Table("tables of | name | value |")
    row: dict[str, object] = {}
    section = ""
    for _, line in source.lines():
        bare = line.strip()
        cells = [cell.strip() for cell in bare.strip("|").split("|")] if bare[:1] == "|" else []
        if len(cells) == _CELLS:
            name, value = cells
            if name.endswith("/") and not value:
                section = name
            else:
                row[f"{section}{name}"] = value
            continue
        if row:
            table.add(row)
        row, section = {}, ""
    if row:
        table.add(row)
    return table
