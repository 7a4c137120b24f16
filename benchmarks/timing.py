"""How it is measured: functions take turns, round by round, and each round is compared by itself.

Of each call two times are taken: the wall's, and what the processors computed for it, in all
threads of this process. Whatever else the machine does disturbs the second much less. Threads that
wait for work spin for a while, and that counts too, but for ``OMP_WAIT_POLICY=passive``. On a GPU
there is a third time: what the device takes for a captured graph.

All CSV files have the same columns for a time: the median in milliseconds (``ms``), its quartiles
(``ms_q1``, ``ms_q3``) and the median of the computing time (``cpu_ms``). Where something was
measured in turn with it, ``faster`` is the median of the ratios of each round, with its quartiles,
and ``faster_cpu`` that of the computing times. Every line says under what conditions it was
measured.
"""

import csv
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import import_module
from math import nan
from pathlib import Path
from typing import Any

import torch

import gradclip

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
LOAD_AT_START = os.getloadavg()[0]
Function = Callable[[], object]

_HALF_A_MILLISECOND = 1_000_000
"""In cycles of a GPU."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of the same rounds.

    Args:
        wall: What went by.
        cpu: What all threads of this process computed; of a captured graph it is not known.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def ms(self) -> float:
        return statistics.median(self.wall)

    @property
    def cpu_ms(self) -> float:
        return statistics.median(self.cpu)

    def __sub__(self, other: "Times") -> "Times":
        """Return the differences, round by round."""
        pairs = zip((self.wall, self.cpu), (other.wall, other.cpu), strict=True)
        return Times(*([a - b for a, b in zip(*each, strict=True)] for each in pairs))

    def __truediv__(self, number: int) -> "Times":
        """Return the times of one of so many calls."""
        return Times([each / number for each in self.wall], [each / number for each in self.cpu])

    def columns(self, baseline: "Times | None" = None) -> dict[str, float]:
        """Return the columns of a line.

        Args:
            baseline: What took turns with it, and is compared with it.
        """
        low, middle, high = _quartiles(self.wall)
        found = {"ms": middle, "ms_q1": low, "ms_q3": high}
        if self.cpu:
            found["cpu_ms"] = self.cpu_ms
        if baseline is None:
            return found
        low, middle, high = _quartiles(_ratios(baseline.wall, self.wall))
        found |= {"faster": middle, "faster_q1": low, "faster_q3": high}
        return found | {"faster_cpu": _quartiles(_ratios(baseline.cpu, self.cpu))[1]}


def _ratios(baseline: list[float], times: list[float]) -> list[float]:
    return [a / b if b else nan for a, b in zip(baseline, times, strict=True)]


def _quartiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def nothing() -> None:
    """Prepare nothing."""


def paired(
    functions: dict[str, Function],
    rounds: int,
    *,
    prepare: Function = nothing,
    device: str = "cpu",
    until_returned: bool = False,
    warm_up: int = 2,
) -> dict[str, Times]:
    """Return the times of each function; they take turns, and each round another is the first.

    Args:
        functions: By name.
        rounds: Calls of each that count.
        prepare: Called before each call, untimed.
        device: Where the work is done, which is waited for.
        until_returned: Stop the clock when the call returns, and not when the device is done.
        warm_up: Rounds before those that count.
    """
    times = {name: Times() for name in functions}
    names = list(functions)
    for round_ in range(rounds + warm_up):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            prepare()
            finish(device)
            cpu, wall = time.process_time(), time.perf_counter()
            functions[name]()
            if not until_returned:
                finish(device)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            finish(device)
            if round_ >= warm_up:
                times[name].wall.append(wall * 1e3)
                times[name].cpu.append(cpu * 1e3)
    return times


def replayed(
    functions: dict[str, Function], rounds: int, *, prepare: Function = nothing
) -> dict[str, Times]:
    """Return the times that a GPU takes, from replays of captured graphs in turn."""
    graphs = {name: _captured(function, prepare) for name, function in functions.items()}
    times = {name: Times() for name in graphs}
    for round_ in range(rounds + 2):
        for name, graph in graphs.items():
            prepare()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # An idle device would begin, and then wait for the host to launch the graph.
            torch.cuda._sleep(_HALF_A_MILLISECOND)  # noqa: SLF001 - there is no public one
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if round_ >= 2:
                times[name].wall.append(begin.elapsed_time(end))
    return times


def _captured(function: Function, prepare: Function) -> "torch.cuda.CUDAGraph":
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            prepare()
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    prepare()
    with torch.cuda.graph(graph):
        function()
    return graph


def finish(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


@cache
def optional(name: str) -> Any:
    """Return a module; where it is missing None, and say what is left out."""
    try:
        return import_module(name)
    except ImportError as error:
        print(f"left out what needs {name}: {error}", file=sys.stderr)
        return None


def machine(device: str) -> str:
    """Return what measured: processor or GPU, cores, threads, and the versions that matter."""
    if device == "cuda":
        import triton  # noqa: PLC0415 - not on every machine

        where = f"{torch.cuda.get_device_name()}, triton {triton.__version__}"
    else:
        where = _processor()
    waits = os.environ.get("OMP_WAIT_POLICY", "")
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads {waits}".strip()
    return f"{where}, {threads}, Python {platform.python_version()}, torch {torch.__version__}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


@cache
def code() -> str:
    """Return the commit that is measured, or the version where there is no repository."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", ROOT, *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = "-changed" if git("status", "--porcelain", "--", "src") else ""
        return git("rev-parse", "--short=9", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return f"version {gradclip.__version__}"


def rounded(row: dict[str, object]) -> dict[str, object]:
    """Return a line with four digits of each number."""
    return {key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items()}


def write(
    path: Path, rows: Iterable[dict[str, object]], kept: Iterable[dict[str, str]] = ()
) -> None:
    """Write lines as CSV, with the conditions of now.

    Args:
        path: The file.
        rows: What was measured.
        kept: Lines of the file that stay, with the conditions that they have.
    """
    conditions: dict[str, object] = {
        "load_start": LOAD_AT_START,
        "load_end": os.getloadavg()[0],
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "code": code(),
    }
    made = [rounded({**row, **conditions}) for row in rows]
    listed = [*kept, *made]
    fields = dict.fromkeys(key for row in [*made, *listed] for key in row)
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(listed)


def read(path: Path) -> list[dict[str, str]]:
    """Read what was written; nothing if it is not there."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))
