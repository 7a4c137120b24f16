"""What a run did: recorded as JSONL, read back, summed up, drawn.

Importing this package is light, without torch; matplotlib is imported when a figure is made. Only
``gradclip.diagnostics.replay``, which is ``gradclip.replay``, needs torch.
"""

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

__all__ = [
    "GroupRecord",
    "RunRecorder",
    "RunSummary",
    "StepRecord",
    "Steps",
    "clipping_figure",
    "finding",
    "read_events",
    "read_header",
    "read_norms",
    "read_record",
    "read_steps",
    "save_figure",
    "summarise",
]
