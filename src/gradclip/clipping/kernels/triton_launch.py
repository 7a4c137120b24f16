"""Launches of Triton programs whose kind of arguments is known from the last time.

Triton looks at every argument of every launch to find the kernel that was compiled for its kind,
which takes longer than the launch. A plan's arguments never change their kind: its kernels are
kept and launched directly. Where a Triton does not take that, each launch is an ordinary one.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import triton

if TYPE_CHECKING:
    from collections.abc import Callable

_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}

# What a compiled kernel is called with changed before that, and may change again.
_DIRECT = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)

_OTHERWISE = (TypeError, AttributeError)
"""What a Triton raises, before it launches, whose compiled kernels are called in another way."""

_HERE = nullcontext()


class Launcher:
    """Launches programs for arguments that differ in their values only."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Callable[..., None]] = {}
        self._is_direct = _DIRECT

    def __call__(
        self, program: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any
    ) -> None:
        """Run a program.

        Args:
            program: A jit function.
            grid: How many programs, in up to three dimensions.
            arguments: What its parameters without ``constexpr`` get, in order.
            constants: The others, in order.
        """
        key = (id(program), grid, *constants.values())
        kept = self._kept.get(key)
        if kept is not None:
            try:
                kept(*arguments, *constants.values())
            except _OTHERWISE:
                self._is_direct = False
                self._kept.clear()
            else:
                return
        compiled = program[grid](*arguments, **constants, **_OPTIONS)
        if compiled is not None and self._is_direct:  # the interpreter compiles nothing
            try:
                self._kept[key] = compiled[(*grid, 1, 1)[:3]]
            except _OTHERWISE:
                self._is_direct = False


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which launches go to a device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)
