"""What a hook channel costs around nothing: ``with channel.begin(arg): pass``.

The cases take turns, a few thousand calls each, so that whatever else the machine does falls on all
of them alike. ``contextlib`` is the price of the same loop over
hooks written as a generator.

    python benchmarks/hook_overhead.py            # prints, and writes results/hook_overhead.csv
    python benchmarks/hook_overhead.py --check    # fails where a limit is exceeded
"""

import argparse
import sys
import timeit
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from timing import RESULTS, Function, Times, machine, paired, write

from gradclip.hook import HookContext, HookContextChannel

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


def measure(measured: list[Case], rounds: int) -> dict[str, Times]:
    """Return the times of one call of each case."""
    statement = "with channel.begin(arg): pass"
    timers: dict[str, Function] = {
        case.name: partial(timeit.Timer(statement, globals=case._asdict()).timeit, CALLS)
        for case in measured
    }
    return {name: times / CALLS for name, times in paired(timers, rounds).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail above the limits, write nothing")
    parser.add_argument("--rounds", type=int, default=300, help="measurements of each case")
    options = parser.parse_args()

    measured = cases()
    times = measure(measured, options.rounds)
    exceeded = 0
    for case in measured:
        median_us = times[case.name].cpu_ms * 1e3  # a busy machine adds to the wall's
        limit = "" if case.limit_us is None else f"limit {case.limit_us:.1f} us"
        print(f"{case.name:32} {median_us:6.3f} us  {limit}")
        exceeded += case.limit_us is not None and median_us > case.limit_us
    if options.check:
        print(f"{exceeded} above their limits")
        return 1 if exceeded else 0
    where = {"machine": machine("cpu")}
    lines = [{"what": name, **each.columns(), **where} for name, each in times.items()]
    write(RESULTS / "hook_overhead.csv", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
