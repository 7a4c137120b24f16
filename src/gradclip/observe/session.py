"""Begins to watch a process, and says at its end what was found."""

import atexit
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gradclip.observe.folder import RUNS
from gradclip.observe.imports import when_imported
from gradclip.observe.wrapping import wrap_all

if TYPE_CHECKING:
    from gradclip.observe.watch import Watch

__all__ = ["Session", "begin"]

_IN_CHILD = """
try:
    from gradclip.observe.session import begin_in_child
except ImportError:
    pass
else:
    begin_in_child({folder!r}, {about!r}, {every!r})
"""


def begin(folder: Path, about: dict[str, Any], every: int | None) -> "Session":
    """Watch this process from now on, and those that it spawns, until it ends.

    Args:
        folder: Where the record goes.
        about: What ``run.json`` says of the run.
        every: Which steps to measure; None to choose it.
    """
    session = Session(folder, about, every)
    atexit.register(session.end)  # the first to be registered is the last to be called
    wrap_all(session.ask)
    _follow_spawned(str(folder), about, every)
    return session


def begin_in_child(folder: str, about: dict[str, Any], every: int | None) -> None:
    """Watch a process that was spawned; without a rank it has a folder of its own."""
    session = Session(Path(folder), about, every, is_child=True)
    wrap_all(session.ask)
    _follow_spawned(folder, about, every)
    import multiprocessing.util  # noqa: PLC0415 - it is there: it started this process

    # Children of multiprocessing leave by os._exit: only its own finalizers are called.
    multiprocessing.util.Finalize(None, session.end, exitpriority=-100)


class Session:
    """The watch of a process: made when the script first does something that is watched.

    Attributes:
        is_paused: Whether nobody watches now.
    """

    def __init__(
        self, folder: Path, about: dict[str, Any], every: int | None, *, is_child: bool = False
    ) -> None:
        self._folder, self._about, self._every = folder, about, every
        self._is_child = is_child
        self._process = os.getpid()
        self.watch: Watch | None = None
        self._problem: str | None = None
        self.is_paused = self._is_finished = False

    def ask(self) -> "Watch | None":
        """Return who watches; None in a fork, in what is compiled or captured, and at the end."""
        import torch  # noqa: PLC0415 - the script has imported it

        if torch.compiler.is_compiling() or self.is_paused or os.getpid() != self._process:
            return None
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return None
        if self.watch is None:
            self._begin()
        return self.watch

    def _begin(self) -> None:
        try:
            from gradclip.observe.watch import Watch  # noqa: PLC0415 - it imports torch

            folder = self._folder
            if self._is_child and not _has_rank():
                folder = folder.with_name(f"{folder.name}-process-{os.getpid()}")
            self.watch = Watch(folder, self._about, self._every)
        except Exception as error:  # noqa: BLE001 - whatever it is, the script goes on
            self._problem, self.is_paused = repr(error), True

    def end(self) -> None:
        """Write what there is, and say what was found. The script is over."""
        if os.getpid() != self._process or self._is_finished:
            return
        self.is_paused = self._is_finished = True
        if self.watch is not None:
            self.watch.finish()
        problem = self._problem or (None if self.watch is None else self.watch.error)
        if self.watch is None or not self.watch.tracks:
            if self._folder.parent.name == RUNS:
                with suppress(OSError):  # it is not empty: others that it spawned were watched
                    self._folder.rmdir()
            if problem is None and (self._is_child or (self._folder / "run.json").exists()):
                return
        try:
            from gradclip.observe.ending import lines  # noqa: PLC0415 - it imports what advises

            said = lines(self.watch, self._problem)
        except Exception as error:  # noqa: BLE001 - the exit code is the script's
            said = [f"gradclip run: no finding can be given: {error!r}"]
        if said:
            with suppress(OSError, ValueError, AttributeError):  # it may be closed, or None
                sys.stderr.write("\n".join(said) + "\n")
                sys.stderr.flush()
        if getattr(sys, "last_type", None) is KeyboardInterrupt:
            # The interpreter notes that it was interrupted, to end by that signal, and forgets it
            # when a string is executed, as imports above did. So it is told again.
            with suppress(KeyboardInterrupt):
                exec("raise KeyboardInterrupt")  # noqa: S102


def _has_rank() -> bool:
    dist = sys.modules.get("torch.distributed")
    return "RANK" in os.environ or (
        dist is not None and dist.is_available() and dist.is_initialized()
    )


class _ToChild:
    """Travels to a spawned process with what that needs to begin, and begins to watch there.

    It is pickled as a call of ``exec``: a process that does not find gradclip goes on without.
    """

    def __init__(self, source: str) -> None:
        self._source = source

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return exec, (self._source,)


def _follow_spawned(folder: str, about: dict[str, Any], every: int | None) -> None:
    """Send it along with whatever ``multiprocessing`` tells a process that it spawns."""
    to_child = _ToChild(_IN_CHILD.format(folder=folder, about=about, every=every))

    def follow(spawn: ModuleType) -> None:
        prepare = spawn.get_preparation_data

        def get_preparation_data(name: str) -> dict[str, Any]:
            return {**prepare(name), "gradclip": to_child}

        vars(spawn)["get_preparation_data"] = get_preparation_data

    when_imported("multiprocessing.spawn", follow)
