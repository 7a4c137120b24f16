"""A record that gradclip wrote."""

import json

from gradclip.diagnostics.readers.source import Source
from gradclip.diagnostics.readers.table import Table
from gradclip.diagnostics.record import read_record

__all__ = ["claims", "read"]


def claims(source: Source) -> bool:
    """Return whether the first line is the header of a record."""
    try:
        header = json.loads(next(iter(source.first_lines(1)), ""))
    except (ValueError, RecursionError):
        return False
    return isinstance(header, dict) and {"gradclip", "schema"} <= {*header}


def read(source: Source) -> Table:
    """Read the norms before clipping.

    Raises:
        ArgumentValueError: GC010, a line is damaged, or the record is of a newer version.
    """
    table = Table("gradclip record")
    for each in read_record(source.path):
        table.add(
            {
                "step": each.step,
                "loss": each.loss,
                "lr": each.lr,
                "norm_pre": each.norm_pre,
                "threshold": each.threshold,
            }
        )
    return table
