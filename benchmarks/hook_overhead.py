"""What a hook channel costs around nothing: ``with channel.begin(arg): pass``.

The cases take turns, a few thousand calls each, so that whatever else the machine does falls on all
of them alike; each case's median is reported. ``contextlib`` is the price of the same loop over
hooks written as a generator.

    python benchmarks/hook_overhead.py            # prints, and writes results/hook_overhead.csv
    python benchmarks/hook_overhead.py --check    # fails where a limit is exceeded
"""

import argparse
import csv
import os
import platform
import sys
import timeit
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from gradclip.hook import HookContext, HookContextChannel

RESULTS = Path(__file__).parent / "results" / "hook_overhead.csv"
CALLS = 2_000


class Case(NamedTuple):
    """A channel, what it is begun with, and how long that may take."""

    name: str
    channel: Any
    arg: object
    limit_us: float | None


class Plain:
    """An arg without an ``exception`` attribute."""


@dataclass
class Recording:
    """An arg that keeps the first error, as a pipeline's does."""

    exception: BaseException | None = None


class GeneratorChannel:
    """The same loops as a generator-based context manager, without the care for errors."""

    def __init__(self, hooks: list[HookContext[Any]]) -> None:
        self.hooks = hooks

    @contextmanager
    def _run(self, arg: object) -> Iterator[object]:
        try:
            for hook in self.hooks:
                hook.before(arg)
            yield arg
        finally:
            for hook in self.hooks:
                hook.after(arg)

    def begin(self, arg: object) -> AbstractContextManager[object]:
        """Run the hooks around a block."""
        return self._run(arg)


def nothing(arg: object) -> None:
    """Stand for the work of a hook."""


def cases() -> list[Case]:
    made = []
    for count, limit_us in ((0, 0.5), (3, 1.5)):
        hooks: list[HookContext[Any]] = [
            HookContext.from_callable(before=nothing, after=nothing) for _ in range(count)
        ]
        channel: HookContextChannel[Any] = HookContextChannel("on_step")
        for hook in hooks:
            channel.register(hook)
        made += [
            Case(f"{count} hooks, plain arg", channel, Plain(), limit_us),
            Case(f"{count} hooks, arg with exception", channel, Recording(), limit_us),
            Case(f"{count} hooks, contextlib", GeneratorChannel(hooks), Plain(), None),
        ]
    return made


def measure(measured: list[Case], rounds: int) -> list[float]:
    """Return the median of each case, in microseconds per call."""
    timers = [
        timeit.Timer("with channel.begin(arg): pass", globals=case._asdict()) for case in measured
    ]
    times_us = [[timer.timeit(CALLS) / CALLS * 1e6 for timer in timers] for _ in range(rounds)]
    return [median(column) for column in zip(*times_us, strict=True)]


def machine() -> str:
    """Name the processor and how many of them this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail above the limits, write nothing")
    parser.add_argument("--rounds", type=int, default=300, help="measurements of each case")
    options = parser.parse_args()

    measured = cases()
    medians_us = measure(measured, options.rounds)
    exceeded = 0
    for case, median_us in zip(measured, medians_us, strict=True):
        limit = "" if case.limit_us is None else f"limit {case.limit_us:.1f} us"
        print(f"{case.name:32} {median_us:6.3f} us  {limit}")
        exceeded += case.limit_us is not None and median_us > case.limit_us
    if options.check:
        print(f"{exceeded} above their limits")
        return 1 if exceeded else 0
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["case", "median_us", "machine", "python"])
        for case, median_us in zip(measured, medians_us, strict=True):
            row = [case.name, f"{median_us:.3f}", machine(), platform.python_version()]
            writer.writerow(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
