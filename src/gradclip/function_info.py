"""What a callable is called and where it is written, whatever kind of callable it is."""

import functools
import inspect
from contextlib import suppress
from dataclasses import dataclass
from types import CodeType
from typing import Any, Self

__all__ = ["FunctionInfo"]

# A ring of wrappers must not hold a repr up.
_MAX_LAYERS = 16


@dataclass(frozen=True, repr=False)
class FunctionInfo:
    """What a callable is called and where it is written; ``from_callable`` never fails."""

    func: Any
    """The callable itself."""
    owner: Any
    """What a bound method is bound to, else None."""
    name: str
    """The qualified name; ``partial(...)`` around it for a partial."""
    source_file: str | None
    """None for what is not written in Python."""
    source_lineno: int | None
    """The first line of the definition, counted from 1."""

    @classmethod
    def from_callable(cls, func: Any) -> Self:
        """Describe any callable: functions, methods, partials, builtins, classes, instances."""
        code = None
        # Any attribute of a foreign object may raise anything, and a repr may not.
        with suppress(Exception):
            code = _code(func)
        return cls(
            func=func,
            owner=func.__self__ if inspect.ismethod(func) else None,
            name=_name(func),
            source_file=code.co_filename if code else None,
            source_lineno=code.co_firstlineno if code else None,
        )

    @property
    def source_file_lineno(self) -> str:
        """``file:line``, or ``<no Python source>``."""
        if self.source_file is None:
            return "<no Python source>"
        return f"{self.source_file}:{self.source_lineno}"

    @property
    def signature(self) -> inspect.Signature | None:
        """The signature, where Python can tell it."""
        with suppress(Exception):
            return inspect.signature(self.func)
        return None

    @property
    def source_code(self) -> str | None:
        """The text of the definition, where its file can be read."""
        with suppress(Exception):
            code = _code(self.func)
            return None if code is None else inspect.getsource(code)
        return None

    def __repr__(self) -> str:
        return f"<{self.name} at {self.source_file_lineno}>"


def _code(func: Any) -> CodeType | None:
    """Find the Python code behind partials, wrappers, methods, classes and callable objects."""
    for _ in range(_MAX_LAYERS):
        code = getattr(func, "__code__", None)
        if isinstance(func, functools.partial):
            func = func.func
        elif hasattr(func, "__wrapped__"):
            func = func.__wrapped__
        elif isinstance(code, CodeType):
            return code
        elif isinstance(func, type):
            func = func.__dict__.get("__init__")
        else:
            func = type(func).__call__
    return None


def _name(func: Any) -> str:
    if isinstance(func, functools.partial):
        return f"partial({_name(func.func)})"
    with suppress(Exception):
        if isinstance(func.__qualname__, str):
            return func.__qualname__
    return type(func).__qualname__
