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
from gradclip.record.columns import Steps as Steps
from gradclip.record.reader import read_events as read_events
from gradclip.record.reader import read_norms as read_norms
from gradclip.record.reader import read_steps as read_steps

if TYPE_CHECKING:
    from gradclip.diagnostics.readers import LoggedRun as LoggedRun
    from gradclip.diagnostics.readers import read_log as read_log

__all__ = [
    "GroupRecord",
    "LoggedRun",
    "RunRecorder",
    "RunSummary",
    "StepRecord",
    "Steps",
    "clipping_figure",
    "finding",
    "read_events",
    "read_header",
    "read_log",
    "read_norms",
    "read_record",
    "read_steps",
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
