"""A record that gradclip wrote."""

import json
from collections.abc import Mapping
from typing import Any

from gradclip.diagnostics.readers.source import Source
from gradclip.diagnostics.readers.table import Table
from gradclip.record.reader import read_header, read_steps

__all__ = ["claims", "read", "way_in"]

_WAYS_IN = {"GradientClippingCallback": "callback", "GradientClippingHook": "hook"}


def claims(source: Source) -> bool:
    """Return whether it is a folder of ``record=``, or the first line is the header of a record."""
    if source.path.is_dir():
        return True  # no other folder is read
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
    table = Table("gradclip record", _way_in(source))
    steps = read_steps(source.path)
    for number in sorted(set(steps.optimizer)):  # each is a run: its steps begin anew
        for each in steps:
            if each.optimizer == number:
                table.add(
                    {
                        "step": each.step,
                        "loss": each.loss,
                        "lr": each.lr,
                        "norm_pre": each.norm_pre,
                        # Limits by group are no limit of all gradients.
                        "threshold": each.threshold if len(each.groups) <= 1 else None,
                    }
                )
    return table


def _way_in(source: Source) -> str | None:
    """Return what wrote the record, where that needs a line of its own."""
    if not source.path.is_dir():
        return None
    optimizers = read_header(source.path)["optimizers"]
    return way_in(optimizers[0]) if optimizers else None


def way_in(optimizer: Mapping[str, Any]) -> str | None:
    """Return what wrote the steps of an optimizer, where its limit has a line of its own.

    Args:
        optimizer: What the record says of it.
    """
    called = str(optimizer.get("called"))
    return next((way for name, way in _WAYS_IN.items() if called.startswith(name)), None)
