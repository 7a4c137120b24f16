"""Time of clipping sharded gradients on two processes, against ``torch.nn.utils``.

    python benchmarks/sharded.py [--rounds 31]

Writes ``benchmarks/results/sharded_cpu.csv``. Two processes on loopback hold 1000 DTensors, half of
each; gradients are new ones at every call. They have memory of their own each, or they lie adjacent
in one buffer, as the reduce-scatter of FSDP2 leaves those of one module. A call's time is that of
the slower process: both start together. Each process has a core of its own, or the system moves
threads about and every collective takes between 0.2 and 4 ms. ``cpu_ms`` is what the first process
computed in a call, which tells more where the machine has other work.
"""

import argparse
import os
import socket
import statistics
import time
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from math import inf
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timing import RESULTS, machine, write
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.utils import clip_grad_norm_

import gradclip

COUNT = 1000
SHAPES = ((8, 4), (64, 64))
RANKS = 2


def measure(rank: int, port: int, rounds: int, told: Any) -> None:
    """Be one of the processes."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    rows = [
        row
        for shape in SHAPES
        for adjacent in (False, True)
        for row in of_shape(mesh, shape, rounds, adjacent=adjacent)
    ]
    if rank == 0:
        told.put(rows)
    dist.barrier()
    os._exit(0)  # an ordinary exit of a process with a group aborts now and then


def of_shape(
    mesh: Any, shape: tuple[int, ...], rounds: int, *, adjacent: bool
) -> list[dict[str, object]]:
    torch.manual_seed(0)
    parameters = [
        torch.nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [Shard(0)]))
        for _ in range(COUNT)
    ]
    local = [torch.randn_like(parameter.to_local()) for parameter in parameters]
    together = torch.cat([values.view(-1) for values in local])
    starts = list(accumulate((values.numel() for values in local), initial=0))

    def shards() -> Iterator[torch.Tensor]:
        if not adjacent:
            yield from (values.clone() for values in local)
            return
        buffer = together.clone()
        for values, start in zip(local, starts, strict=False):
            yield torch.as_strided(buffer, values.shape, values.stride(), start)

    def fill() -> None:
        for parameter, shard in zip(parameters, shards(), strict=True):
            parameter.grad = DTensor(shard, parameter._spec, requires_grad=False)  # noqa: SLF001

    rows: list[dict[str, object]] = []
    for what, limit, p in (("within", 1e9, 2.0), ("clips", 1.0, 2.0), ("inf-norm", 1e9, inf)):
        clipper = gradclip.GradientClipper(
            parameters, gradclip.NormClip(max_norm=limit, norm_type=p)
        )
        ways = {
            "torch": partial(clip_grad_norm_, parameters, limit, p),
            "function": partial(gradclip.clip_grad_norm_, parameters, limit, p),
            "object": clipper.clip,
        }
        about = {"tensors": COUNT, "shape": "x".join(map(str, shape)), "ranks": RANKS}
        about["shape"] += ", adjacent" if adjacent else ""
        for who, times in paired(ways, fill, rounds).items():
            rows.append({**about, "what": what, "who": who, **times, "machine": machine("cpu")})
    return rows


def paired(ways: dict[str, Any], fill: Any, rounds: int) -> dict[str, dict[str, float]]:
    """Return the median milliseconds of each, called in turn; both processes start together."""
    times: dict[str, list[tuple[float, float]]] = {who: [] for who in ways}
    for round_ in range(rounds + 3):
        for who, way in ways.items():
            fill()
            dist.barrier()
            start, computed = time.perf_counter(), time.thread_time()
            way()
            computed = time.thread_time() - computed
            elapsed = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(elapsed, dist.ReduceOp.MAX)
            if round_ >= 3:
                times[who].append((float(elapsed) * 1e3, computed * 1e3))
    return {
        who: dict(
            zip(("ms", "cpu_ms"), map(statistics.median, zip(*each, strict=True)), strict=True)
        )
        for who, each in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    rounds = parser.parse_args().rounds
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(measure, (port, rounds, told), nprocs=RANKS, join=False)
    rows = told.get()
    while not context.join():
        pass
    for row in rows:
        print(row)
    write(RESULTS / "sharded_cpu.csv", rows)


if __name__ == "__main__":
    main()
