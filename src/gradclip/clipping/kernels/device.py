"""What ``torch.compile`` must not look into."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def untraced(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Make a function a graph break around which ``torch.compile`` goes on.

    Its verdicts depend on addresses and on what was seen before, which no graph may fix. Does not
    import the compiler, which takes seconds, where nothing was compiled.
    """
    disabled: list[Callable[_Arguments, _Result]] = []

    @wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if not disabled:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return call


def callers_level() -> int:
    """Return the stack level, as ``warnings`` counts it, of the first caller outside the engine."""
    inner = ("gradclip.", "torch.")
    level, frame = 1, sys._getframe(1)  # noqa: SLF001 - a public name for it comes with Python 3.12
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(inner):
        level, frame = level + 1, frame.f_back
    return level
