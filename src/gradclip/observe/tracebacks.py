"""Shows an error of the script without the frames of those who ran and watched it."""

import sys
from pathlib import Path
from types import CodeType, TracebackType

__all__ = ["drop_our_frames"]

_OURS = str(Path(__file__).parent)


def drop_our_frames(runs: CodeType) -> None:
    """Have the error that ends Python shown without our frames, by whatever hook there is.

    Args:
        runs: The function whose frame ran the script: it and all before it are dropped.
    """
    shown = sys.excepthook

    def show(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        frame = traceback
        while frame is not None and frame.tb_frame.f_code is not runs:
            frame = frame.tb_next
        traceback = _without_ours(traceback if frame is None else frame.tb_next)
        for each in _chain(error):
            each.__traceback__ = traceback if each is error else _without_ours(each.__traceback__)
        shown(kind, error, traceback)

    sys.excepthook = show


def _without_ours(traceback: TracebackType | None) -> TracebackType | None:
    kept = []
    while traceback is not None:
        if not traceback.tb_frame.f_code.co_filename.startswith(_OURS):
            kept.append(traceback)
        traceback = traceback.tb_next
    for at, each in enumerate(kept):
        each.tb_next = kept[at + 1] if at + 1 < len(kept) else None
    return kept[0] if kept else None


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and not any(each is one for one in found):
            found.append(each)
            waiting += [each.__cause__, each.__context__]
    return found
