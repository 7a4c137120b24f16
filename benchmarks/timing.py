"""How it is measured: functions take turns, and the medians are compared.

On a CPU a call's time is that of the wall. On a GPU there are three: what the device takes, by
replays of a captured CUDA graph; what the wall takes, until the device is done; and what the host
takes until the call returns.
"""

import csv
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
Function = Callable[[], object]

_HALF_A_MILLISECOND = 1_000_000
"""In cycles of a GPU."""


def nothing() -> None:
    """Prepare nothing."""


def paired(
    functions: dict[str, Function],
    rounds: int,
    *,
    prepare: Function = nothing,
    device: str = "cpu",
    until_returned: bool = False,
) -> dict[str, float]:
    """Return the median milliseconds of each function, called in turn after two rounds unmeasured.

    Args:
        functions: By name.
        rounds: Calls of each that count.
        prepare: Called before each call, untimed.
        device: Where the work is done, which is waited for.
        until_returned: Stop the clock when the call returns, and not when the device is done.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 2):
        for name, function in functions.items():
            prepare()
            finish(device)
            start = time.perf_counter()
            function()
            if not until_returned:
                finish(device)
            elapsed = time.perf_counter() - start
            finish(device)
            if round_ >= 2:
                times[name].append(elapsed * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def replayed(
    functions: dict[str, Function], rounds: int, *, prepare: Function = nothing
) -> dict[str, float]:
    """Return the median milliseconds that a GPU takes, from replays of captured graphs in turn."""
    graphs = {name: _captured(function, prepare) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
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
                times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


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


def machine(device: str) -> str:
    """Return what measured: processor or GPU, threads, and the versions that matter."""
    if device == "cuda":
        import triton  # noqa: PLC0415 - not on every machine

        where = f"{torch.cuda.get_device_name()} triton {triton.__version__}"
    else:
        where = f"{platform.machine()} {torch.get_num_threads()} threads"
    return f"{where} torch {torch.__version__}"


def write(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write rows with the same keys, or fewer, as CSV; numbers with four digits."""
    listed = [
        {key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows
    ]
    fields = list(dict.fromkeys(key for row in listed for key in row))
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
