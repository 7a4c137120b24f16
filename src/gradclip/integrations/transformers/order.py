"""What a callback adds to a log reaches every logger, though loggers stand before it."""

import sys
from typing import Any
from weakref import ref

__all__ = ["handler_of_caller", "log_first", "log_in_order"]


class _LogFirst:
    """Stands for ``on_log`` of a trainer's ``CallbackHandler``.

    A callback is called in its turn, and TensorBoard and Weights & Biases come before those of the
    user. So some are called first, and once more in their turn.

    Args:
        handler: It is not kept alive.
    """

    def __init__(self, handler: Any) -> None:
        self._handler = ref(handler)
        self.callbacks: list[Any] = []

    def __call__(self, args: Any, state: Any, control: Any, logs: Any, **options: Any) -> Any:
        for callback in self.callbacks:
            callback.on_log(args, state, control, logs=logs)
        handler: Any = self._handler()
        return type(handler).on_log(handler, args, state, control, logs, **options)


def handler_of_caller() -> Any:
    """Return the ``CallbackHandler`` that calls a callback just now; None if there is none.

    A callback is given neither its trainer nor its handler.
    """
    from transformers.trainer_callback import CallbackHandler  # noqa: PLC0415 - it may be missing

    frame = sys._getframe(1)  # noqa: SLF001 - a public name for it comes with Python 3.12
    while (caller := frame.f_back) is not None:
        frame = caller
        if isinstance(handler := frame.f_locals.get("self"), CallbackHandler):
            return handler
    return None


def log_first(handler: Any, callback: object) -> None:
    """Have a handler call ``on_log`` of a callback before that of all others."""
    if handler is None:
        return
    if not isinstance(handler.on_log, _LogFirst):
        handler.on_log = _LogFirst(handler)
    handler.on_log.callbacks.append(callback)


def log_in_order(handler: Any, callback: object) -> None:
    """Undo ``log_first``; harmless where there was none."""
    first = None if handler is None else handler.on_log
    if isinstance(first, _LogFirst):
        first.callbacks = [each for each in first.callbacks if each is not callback]
        if not first.callbacks:
            del handler.on_log
