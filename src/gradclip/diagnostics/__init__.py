"""What a run did: recorded as JSONL, read back, summed up, drawn.

Importing this package is light, without torch; matplotlib is imported when a figure is made, numpy
when a log of others is read. Only ``gradclip.replay`` and ``gradclip.suggest`` need torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from gradclip.diagnostics.figure import clipping_figure as clipping_figure
from gradclip.diagnostics.figure import save_figure as save_figure
from gradclip.diagnostics.record import GroupRecord as GroupRecord
from gradclip.diagnostics.record import RunRecorder as RunRecorder
from gradclip.diagnostics.record import StepRecord as StepRecord
from gradclip.diagnostics.record import read_header as read_header
from gradclip.diagnostics.record import read_record as read_record
from gradclip.diagnostics.summary import RunSummary as RunSummary
from gradclip.diagnostics.summary import finding as finding
from gradclip.diagnostics.summary import summarise as summarise

if TYPE_CHECKING:
    from gradclip.diagnostics.readers import LoggedRun as LoggedRun
    from gradclip.diagnostics.readers import read_log as read_log

__all__ = [
    "GroupRecord",
    "LoggedRun",
    "RunRecorder",
    "RunSummary",
    "StepRecord",
    "clipping_figure",
    "finding",
    "read_header",
    "read_log",
    "read_record",
    "save_figure",
    "summarise",
]


def __getattr__(name: str) -> object:
    """Import what reads logs, and numpy with it, on the first use of one of its names."""
    if name not in ("LoggedRun", "read_log"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module("gradclip.diagnostics.readers"), name)
    globals()[name] = found
    return found
