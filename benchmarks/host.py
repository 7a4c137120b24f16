"""What a clip on a GPU takes of the host, measured without a GPU: nothing is launched or copied.

    python benchmarks/host.py          # prints, and writes results/host.csv

The gradients are small ones in the memory of the CPU. What would be launched, or copied from the
device, is left out, so the times are those of Python and of the calls into torch around it: finding
the gradients, recognising them, reading where they are, marking them. On a GPU the launches come on
top, 4 of them, and the host is another one. ``calls`` is how many functions of Python are called.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"  # so that the backend takes gradients on a CPU

import torch
from gradients import Gradients
from models import Case
from timing import RESULTS, Function, machine, nothing, paired, rounded, write
from torch import Tensor

import gradclip
from gradclip import GradientClipper
from gradclip.clipping import flags
from gradclip.clipping.kernels import device, fused
from gradclip.clipping.kernels.triton_launch import Launcher

COUNTS = {4: 400, 148: 200, 3168: 30}
"""Rounds for each number of tensors."""

SHAPE = (64, 16)


class NoCopy:
    """Numbers that are not on their way."""

    def __init__(self, values: Tensor) -> None:
        self._numbers = [0.0] * values.numel()

    def read(self) -> list[float]:
        return self._numbers


def launch_nothing(*given: object, **constants: object) -> None:
    """Stand for a launch."""


def always(device: torch.device) -> bool:
    """Say that the host waits for a device."""
    return device is not None


@contextmanager
def launching_nothing() -> Iterator[None]:
    """Let the CPU stand for a device that the host waits for, and do nothing on it."""
    with ExitStack() as patches:
        for owner, name, value in (
            (Launcher, "__call__", launch_nothing),
            (flags, "host_waits_for", always),
            (device, "HostCopy", NoCopy),
            (fused, "HostCopy", NoCopy),
        ):
            patches.enter_context(patch.object(owner, name, value))
        yield


def calls(function: Function) -> int:
    """Return how many functions of Python a call calls."""
    found = 0

    def count(*given: object) -> None:
        nonlocal found
        found += given[1] == "call"

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


def measure(count: int, rounds: int) -> Iterator[dict[str, object]]:
    """Yield the lines of one number of tensors."""
    case = Case("small", [SHAPE] * count, torch.float32)
    gradients, moving = Gradients(case, "cpu"), Gradients(case, "cpu")
    functions: dict[str, Function] = {
        "object": GradientClipper(gradients.parameters, 1e9, backend="triton").clip,
        "function": lambda: gradclip.clip_grad_norm_(gradients.parameters, 1e9),
    }
    moved = {
        "object, all gradients moved": GradientClipper(
            moving.parameters, 1e9, backend="triton"
        ).clip
    }
    for found, prepare in ((functions, nothing), (moved, moving.move)):
        for what, times in paired(found, rounds, prepare=prepare, warm_up=5).items():
            prepare()
            yield {
                "what": what,
                "tensors": count,
                "calls": calls(found[what]),
                **times.columns(),
                "machine": machine("cpu"),
            }


def main() -> None:
    torch.set_num_threads(1)
    with launching_nothing(), patch.dict(os.environ, GRADCLIP_BACKEND="triton"):
        rows = [line for each in COUNTS.items() for line in measure(*each)]
    for row in rows:
        print(rounded(row))
    write(RESULTS / "host.csv", rows)


if __name__ == "__main__":
    main()
