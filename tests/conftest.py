"""Where there is no GPU, Triton's kernels run in its interpreter, on the CPU."""

import gc
import inspect
import os
from functools import cache
from importlib.util import find_spec

import torch


def pytest_collection_finish():
    """Leave what is loaded by now out of all later collections: it is nobody's garbage."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Let the end of Python free it all: Triton's bindings print what they still hold there."""
    gc.unfreeze()


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

collect_ignore = ["scripts_to_observe"]  # to import one is to run it
if not find_spec("triton"):
    collect_ignore.append("unit/clipping/triton_compiled.py")

if find_spec("triton"):
    from triton.runtime import interpreter

    @cache
    def builtins_of(place):
        named = inspect.getmembers(place)
        return [name for name, member in named if interpreter.tl.core.is_builtin(member)]

    def patch_builtin(place, *rest):
        """Do as Triton's interpreter does for each call in a kernel, but search a module once."""
        for name in builtins_of(place):
            member = getattr(place, name)
            if interpreter.tl.core.is_builtin(member):
                interpreter._patch_attr(place, name, member, *rest)

    interpreter._patch_builtin = patch_builtin
