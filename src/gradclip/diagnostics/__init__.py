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

__all__ = [
    "GroupRecord",
    "RunRecorder",
    "RunSummary",
    "StepRecord",
    "clipping_figure",
    "finding",
    "read_header",
    "read_record",
    "save_figure",
    "summarise",
]
