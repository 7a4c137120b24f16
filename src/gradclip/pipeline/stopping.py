"""How a run ends before its limits: a hook asks for it, or a signal; all processes end at one step.

Ctrl-C and SIGTERM are noted, and the run ends where the accumulation window under way ends, so that
what is saved then is a finished step. A second Ctrl-C ends it at once, but never between the
optimizer's step and the note that it was made.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

__all__ = ["StopRequest", "noting_signals", "raise_for_signal"]

_BY_HOOK = 1
_REASONS = (_BY_HOOK, int(signal.SIGINT), int(signal.SIGTERM))
"""In order: where processes have different ones, the last of them holds."""
_AGAIN_S = 1.0
"""torchrun passes a Ctrl-C on that its processes got themselves; that is no second one."""
_NOTICE = (
    b"\nThe run ends where this optimizer step ends, and is saved if it has SaveCheckpoint."
    b" Ctrl-C once more ends it at once, and saves nothing.\n"
)


class StopRequest:
    """Whether a run should end, and why; the arguments of all hooks of a run share one.

    Attributes:
        wanted: Why this process wants an end: 1 for a hook, or the number of a signal; 0 if not.
        agreed: Why all processes end; 0 if they do not.
        at_once: Whether a second Ctrl-C ended the run where it was.
    """

    def __init__(self) -> None:
        self.wanted = self.agreed = 0
        self.at_once = False
        self._holds = 0
        self._late = False
        self._first_at = 0.0
        self._exchanged: Tensor | None = None

    def request(self) -> None:
        """Ask for an end where the accumulation window under way ends."""
        self.wanted = self.wanted or _BY_HOOK

    def clear(self) -> None:
        """Forget what was asked before a run begins."""
        self.wanted = self.agreed = 0
        self.at_once = self._late = False
        self._exchanged = None

    def agree(self, accelerator: "Accelerator", *, wait: bool) -> bool:
        """Return whether the run ends here; all processes call it, and all are told the same.

        Args:
            accelerator: Knows the processes.
            wait: Whether to wait for what is asked now. Otherwise, where there are several
                processes, what was asked at the last call is looked at, which is there already.
        """
        if accelerator.num_processes == 1:
            self.agreed = self.wanted
            return bool(self.agreed)
        asked = torch.tensor([self.wanted == reason for reason in _REASONS], dtype=torch.float32)
        before = self._exchanged
        self._exchanged = accelerator.reduce(asked.to(accelerator.device), reduction="sum")
        looked_at = self._exchanged if wait else before
        if looked_at is not None:
            found = zip(_REASONS, looked_at.tolist(), strict=True)
            self.agreed = max((reason for reason, count in found if count), default=0)
        return bool(self.agreed)

    def held(self) -> Self:
        """Return a context in which a second Ctrl-C waits until it ends; it may be nested."""
        return self

    def __enter__(self) -> None:
        self._holds += 1

    def __exit__(self, *exc_info: object) -> None:
        self._holds -= 1
        if self._late and not self._holds:
            self._end_at_once()

    def note(self, number: int) -> bool:
        """Take a signal; return whether it is the first one.

        Raises:
            KeyboardInterrupt: It is a second Ctrl-C.
        """
        first = self.wanted not in _REASONS[1:]
        if first:
            self._first_at = monotonic()
        elif number == signal.SIGINT and monotonic() - self._first_at >= _AGAIN_S:
            if not self._holds:
                self._end_at_once()
            self._late = True
        self.wanted = max(self.wanted, number)
        return first

    def _end_at_once(self) -> None:
        self.at_once, self._late = True, False
        raise KeyboardInterrupt


@contextmanager
def noting_signals(stop: StopRequest, *, tell: bool) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM ask for an end while the context lasts.

    A handler that is not Python's own stays: it may call ``arg.request_stop()``. In a thread that
    is not the main one nothing can be handled.

    Args:
        stop: What is asked.
        tell: Whether this process says that it was.
    """
    own: dict[signal.Signals, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }
    if threading.current_thread() is not threading.main_thread():
        own = {}
    taken = {each: handler for each, handler in own.items() if signal.getsignal(each) == handler}
    process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        # The workers of a DataLoader have this handler too, and go on until they are told.
        if stop.note(number) and tell and os.getpid() == process:
            os.write(2, _NOTICE)  # print() may be in use where the signal came

    for number in taken:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)


def raise_for_signal(reason: int) -> None:
    """Raise what the signal that ended a run means; nothing if none did.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        SystemExit: SIGTERM, with the status that a shell gives to it.
    """
    if reason == signal.SIGINT:
        raise KeyboardInterrupt
    if reason == signal.SIGTERM:
        raise SystemExit(128 + signal.SIGTERM)
