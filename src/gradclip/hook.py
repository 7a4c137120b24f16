"""Hooks around a piece of work: contexts, the channels that run them, handles that remove them.

``with channel.begin(arg):`` runs the ``before`` of every registered context, the body, then every
``after``, each in the order of registration. What happens when one of them fails is written at
``HookContextChannel.begin``; it costs a few hundred nanoseconds, so it can stand around anything.
"""

import functools
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeVar

from gradclip.errors import ArgumentTypeError, ArgumentValueError
from gradclip.function_info import FunctionInfo

__all__ = [
    "FunctionInfo",
    "HookContext",
    "HookContextChannel",
    "HookContextFromCallable",
    "HookHandler",
    "RemovableHandle",
    "RemoveableHandle",
]

T = TypeVar("T")
CallableT = TypeVar("CallableT", bound=Callable[..., Any])


class RemoveableHandle(Generic[CallableT]):
    """Undoes a registration, once: by ``remove()``, by a call, or at the end of a ``with`` block.

    Args:
        hook: What undoes the registration. It is dropped after the first use, and every later one
            does nothing.
    """

    def __init__(self, hook: CallableT) -> None:
        self.hook: CallableT | None = hook

    def remove(self) -> None:
        """Unregister; harmless when that has already happened."""
        hook, self.hook = self.hook, None
        if hook is not None:
            hook()

    def __call__(self) -> None:
        """Unregister, like ``remove``."""
        self.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()


RemovableHandle = RemoveableHandle


class HookHandler(Generic[CallableT]):
    """A named list of callables that are all called with the same arguments, in order.

    Changing the list during a call takes effect at the next one.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._handlers: tuple[CallableT, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Call every handler; the first error ends the call."""
        for handler in self._handlers:
            handler(*args, **kwargs)

    def __len__(self) -> int:
        return len(self._handlers)

    def register(self, handler: CallableT) -> RemoveableHandle[Callable[[], None]]:
        """Add a handler; one that is already there keeps its place."""
        if handler not in self._handlers:
            self._handlers = (*self._handlers, handler)
        return RemoveableHandle(lambda: self._discard(handler))

    def register_once(self, handler: CallableT) -> RemoveableHandle[Callable[[], None]]:
        """Add a handler for the next call only."""

        @functools.wraps(handler, updated=())
        def once(*args: Any, **kwargs: Any) -> None:
            handle.remove()
            handler(*args, **kwargs)

        handle = self.register(once)  # type: ignore[arg-type]
        return handle

    def unregister_all(self) -> None:
        """Forget every handler."""
        self._handlers = ()

    def _discard(self, handler: CallableT) -> None:
        self._handlers = tuple(known for known in self._handlers if known != handler)

    def __repr__(self) -> str:
        infos = [FunctionInfo.from_callable(handler) for handler in self._handlers]
        return f"{type(self).__name__}({self.name!r}, {infos})"


class HookContext(ABC, Generic[T]):
    """Something to do before and after a piece of work; subclass it, or use ``from_callable``.

    Args:
        name: Shown in the ``repr``; None for an anonymous context.
    """

    name: str | None = None

    def __init__(self, name: str | None = None) -> None:
        self.name = name

    @abstractmethod
    def before(self, arg: T) -> None:
        """Run before the body; when it raises, the body does not run."""

    @abstractmethod
    def after(self, arg: T) -> None:
        """Run after the body, whether it failed or not, if ``before`` returned."""

    def begin(self, arg: T) -> "_Begin[T]":
        """Run this context alone around a ``with`` block, as a channel that holds only it would."""
        begin: _Begin[T] = _Begin()
        begin.hooks = (self,)
        begin.arg = arg
        return begin

    @property
    def before_info(self) -> FunctionInfo | None:
        """What runs before, and where it is written."""
        return FunctionInfo.from_callable(self.before)

    @property
    def after_info(self) -> FunctionInfo | None:
        """What runs after, and where it is written."""
        return FunctionInfo.from_callable(self.after)

    @staticmethod
    def from_callable(
        name: str | None = None,
        before: Callable[[T], Any] | None = None,
        after: Callable[[T], Any] | None = None,
    ) -> "HookContextFromCallable[T]":
        """Make a context of one or two callables; their results are ignored."""
        return HookContextFromCallable(name=name, before=before, after=after)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}"
            f"(name={self.name!r}, before={self.before_info}, after={self.after_info})"
        )


class HookContextFromCallable(HookContext[T]):
    """A context made of one or two callables."""

    def __init__(
        self,
        name: str | None = None,
        before: Callable[[T], Any] | None = None,
        after: Callable[[T], Any] | None = None,
    ) -> None:
        super().__init__(name)
        self._before = before
        self._after = after

    def before(self, arg: T) -> None:
        """Call the first callable, if there is one."""
        if self._before is not None:
            self._before(arg)

    def after(self, arg: T) -> None:
        """Call the second callable, if there is one."""
        if self._after is not None:
            self._after(arg)

    @property
    def before_info(self) -> FunctionInfo | None:
        """The first callable; None if there is none."""
        return None if self._before is None else FunctionInfo.from_callable(self._before)

    @property
    def after_info(self) -> FunctionInfo | None:
        """The second callable; None if there is none."""
        return None if self._after is None else FunctionInfo.from_callable(self._after)


# The ids of the args with an `exception` attribute that some begin() has not left yet; each such
# begin() holds its arg, so an id cannot come to mean another object meanwhile.
_in_flight: set[int] = set()
_ABSENT = object()


class _Begin(Generic[T]):
    """The context manager of ``begin``, written for speed.

    A generator costs twice as much, and so does an ``__init__``: ``begin`` fills the slots.
    """

    __slots__ = ("arg", "hooks", "key")
    arg: T
    hooks: tuple[HookContext[T], ...]
    key: int
    """The id of the arg where this is the outermost begin on it, else 0."""

    def __enter__(self) -> T:
        arg: Any = self.arg
        self.key = 0
        if getattr(arg, "exception", _ABSENT) is not _ABSENT:
            key = id(arg)
            if key not in _in_flight:
                arg.exception = None
                _in_flight.add(key)
                self.key = key
        if self.hooks:
            entered = 0
            try:
                for hook in self.hooks:
                    hook.before(arg)
                    entered += 1
            except BaseException as error:
                self.hooks = self.hooks[:entered]
                self.__exit__(type(error), error, None)
                raise
        return self.arg

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        first = exc
        if exc is not None:
            self._keep(exc)
        if self.hooks:
            for hook in self.hooks:
                try:
                    hook.after(self.arg)
                except BaseException as error:  # noqa: BLE001, every other `after` must still run
                    if first is None:
                        first = error
                        self._keep(error)
                    elif error is not first:
                        first.add_note(_note(hook, error))
        if self.key:
            _in_flight.discard(self.key)
        if first is not exc:
            try:
                raise first  # type: ignore[misc]
            finally:
                # Or the error and this frame, with the whole arg, would keep each other alive.
                del first

    def _keep(self, error: BaseException) -> None:
        arg: Any = self.arg
        # A nested begin leaves an earlier error in place; without the attribute there is none.
        if self.key or getattr(arg, "exception", _ABSENT) is None:
            arg.exception = error


def _note(hook: HookContext[Any], error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    what = "".join(traceback.format_exception_only(error)).strip()
    return f"Afterwards, the `after` of {HookContext.__repr__(hook)} raised{where}: {what}"


class HookContextChannel(Generic[T]):
    """An ordered set of contexts that run around the same piece of work.

    A context runs in a channel at most once (by identity), at its first place. What a channel that
    is registered here gains or loses later counts here too, from the next ``begin`` on.

    Args:
        name: What the channel stands for, such as ``"on_step"``.
    """

    _changes: ClassVar[int] = 0
    """Counts the changes of all channels, so that none need know who holds it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._entries: tuple[HookContext[T] | HookContextChannel[T], ...] = ()
        self._last: tuple[HookContextChannel[T], ...] = ()
        # Replaced, never changed: a begin() that is under way keeps what it started with.
        self._hooks: tuple[HookContext[T], ...] = ()
        self._seen = 0

    def __len__(self) -> int:
        return len(self._current())

    def __getitem__(self, item: int) -> HookContext[T]:
        return self._current()[item]

    def __iter__(self) -> Iterator[HookContext[T]]:
        return iter(self._current())

    def register(self, hook: HookContext[T]) -> RemoveableHandle[Callable[[], None]]:
        """Add a context at the end, from the next ``begin`` on.

        Returns:
            A handle that removes the context again.

        Raises:
            ArgumentTypeError: GC011, ``hook`` is not a ``HookContext``.
        """
        if not isinstance(hook, HookContext):
            raise ArgumentTypeError(
                f"channel {self.name!r} takes a HookContext, not {_shown(hook)}; make one of a "
                "function with HookContext.from_callable(before=...) or (after=...)"
            )
        return self._add(hook)

    def register_hook_channel(
        self, channel: "HookContextChannel[T]"
    ) -> RemoveableHandle[Callable[[], None]]:
        """Add the contexts of another channel of the same name, those of now and of later.

        Returns:
            A handle that removes all of them again.

        Raises:
            ArgumentValueError: GC010, the channels have different names.
        """
        if channel.name != self.name:
            raise ArgumentValueError(
                f"channel {channel.name!r} cannot be registered in channel {self.name!r}: its "
                "hooks would run at another time than they were written for"
            )
        return self._add(channel)

    def move_to_end(self, channel: "HookContextChannel[T]") -> None:
        """Let the contexts of a channel that is registered here run after all others."""
        self._set(last=(*self._last, channel))

    def _add(
        self, entry: "HookContext[T] | HookContextChannel[T]"
    ) -> RemoveableHandle[Callable[[], None]]:
        if not any(entry is known for known in self._entries):
            self._set(entries=(*self._entries, entry))
        return RemoveableHandle(
            lambda: self._set(entries=tuple(each for each in self._entries if each is not entry))
        )

    def _set(
        self,
        entries: "tuple[HookContext[T] | HookContextChannel[T], ...] | None" = None,
        last: "tuple[HookContextChannel[T], ...] | None" = None,
    ) -> None:
        self._entries = self._entries if entries is None else entries
        self._last = self._last if last is None else last
        HookContextChannel._changes += 1

    def _current(self) -> tuple[HookContext[T], ...]:
        """Return the contexts that a ``begin`` would run now."""
        if self._seen != HookContextChannel._changes:
            found: dict[int, HookContext[T]] = {}
            self._collect(found, set())
            ending: dict[int, HookContext[T]] = {}
            for channel in self._last:
                channel._collect(ending, set())  # noqa: SLF001, the same class
            ordered = [hook for key, hook in found.items() if key not in ending]
            self._hooks = (*ordered, *(hook for key, hook in ending.items() if key in found))
            self._seen = HookContextChannel._changes
        return self._hooks

    def _collect(self, found: dict[int, HookContext[T]], visited: set[int]) -> None:
        """Add the contexts of this channel and of those below it, each once; rings end."""
        if id(self) in visited:
            return
        visited.add(id(self))
        for entry in self._entries:
            if isinstance(entry, HookContextChannel):
                entry._collect(found, visited)  # noqa: SLF001, the same class
            else:
                found.setdefault(id(entry), entry)

    def __iadd__(self, other: "HookContextChannel[T] | HookContext[T]") -> Self:
        if isinstance(other, HookContextChannel):
            self.register_hook_channel(other)
        else:
            self.register(other)
        return self

    def unregister_all(self) -> None:
        """Remove every context, from the next ``begin`` on."""
        self._set(entries=(), last=())

    def begin(self, arg: T) -> _Begin[T]:
        """Run the registered contexts around a ``with`` block, which is given ``arg``.

        When a ``before`` raises, neither the body nor the contexts after it run. Every ``after``
        of a context whose ``before`` returned runs, whatever failed. The first error is raised;
        later ones are attached to it as notes.

        When ``arg`` has an attribute ``exception``, the first error is put there, so that every
        later ``after`` sees it. The outermost ``begin`` on an arg sets it to None on entry and
        leaves it readable on exit; one nested in another on the same arg only ever fills it in.
        """
        begin: _Begin[T] = _Begin()
        begin.hooks = self._hooks if self._seen == HookContextChannel._changes else self._current()
        begin.arg = arg
        return begin

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}({self.name!r}, hooks: {len(self)})"]
        return "\n  ".join([*lines, *(f"{i}: {hook!r}" for i, hook in enumerate(self))])


def _shown(value: object) -> str:
    """Name a value whose own ``repr`` may be long, or fail."""
    return f"an object of type {type(value).__qualname__}"
