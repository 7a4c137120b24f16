"""Shows errors of the script without the frames of those who ran and watched it."""

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any

__all__ = ["drop_first_frames", "unseen"]

_OURS = str(Path(__file__).parent)


def unseen(original: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return what makes a function stand for another one: errors come out without our frames.

    Args:
        original: The function that it is around, whose name and signature it gets.
    """

    def around(wrapper: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return wrapper(*args, **kwargs)
            except BaseException as error:
                error.__traceback__ = _without_ours(error.__traceback__)
                raise  # which adds no frame, as ``raise error`` would

        return call

    return around


def drop_first_frames(runs: CodeType) -> None:
    """Have the error that ends Python shown without the frames that ran the script.

    Args:
        runs: The function whose frame ran it: that one and all before it are dropped.
    """
    shown = sys.excepthook

    def show(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        frame = traceback
        while frame is not None and frame.tb_frame.f_code is not runs:
            frame = frame.tb_next
        traceback = _without_ours(traceback if frame is None else frame.tb_next)
        shown(kind, error.with_traceback(traceback), traceback)

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
