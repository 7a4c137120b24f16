"""How many collectives a call of ``clip`` makes on thousands of ranks, how large, and their cost.

    python benchmarks/scale.py

Writes ``benchmarks/results/scale.csv``. One process plays one rank of a group that does not talk
(torch's "fake" backend), so collectives are counted and not timed. Their cost is an estimate: the
latency that NCCL itself assumes when it chooses how to reduce (tree, low-latency protocol;
``src/graph/tuning.cc``, constants of 2021), for eight GPUs a node:

    4.4 us + 2 ((ranks per node - 1) 0.52 us + log2(nodes) 5.0 us)

where steps inside a node count 1.8 times if there are several. Two hundred bytes add nothing to it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import inf, log2, prod
from typing import Any

import torch
import torch.distributed as dist
from timing import RESULTS, write
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from gradclip import GradientClipper, NormClip
from gradclip.clipping.ranks.agreement import Facts
from gradclip.clipping.ranks.coverage import Outline, compact
from gradclip.clipping.ranks.dimension import Dimension

PER_NODE = 8
LAYOUTS = {
    "FSDP2 over 1024": ((1024,), ("dp",), ()),
    "8 x 8 x 16": ((16, 8, 8), ("dp", "cp", "tp"), ()),
    "FSDP2 over 4096": ((4096,), ("dp",), ()),
    "4096 as 4 x 16 x 8 x 8": ((4, 16, 8, 8), ("pp", "dp", "cp", "tp"), ("pp",)),
}
PARAMETERS = 300


def estimate_us(ranks: list[int]) -> float:
    """Return what one small all-reduce takes among these ranks, as NCCL's model has it."""
    nodes = len({rank // PER_NODE for rank in ranks})
    inside = len(ranks) / nodes - 1
    return 4.4 + 2 * (inside * 0.52 * (1.8 if nodes > 1 else 1) + log2(nodes) * 5.0)


@contextmanager
def counted(everyone: Callable[[Any], dict[int, Any]]) -> Iterator[list[tuple[list[int], int]]]:
    """Note the ranks and bytes of every collective; what others would gather is made up."""
    calls: list[tuple[list[int], int]] = []
    all_reduce, gather = Dimension.all_reduce, Dimension.gather

    def note(self: Dimension, values: torch.Tensor, operation: Any) -> None:
        calls.append((list(self.ranks), values.nbytes))
        if operation == dist.ReduceOp.SUM:
            values *= self.size  # as if all ranks had the same

    Dimension.all_reduce = note
    Dimension.gather = lambda self, known: [  # noqa: ARG005 - nobody else is there
        everyone(known[0]) if isinstance(known[0], Facts) else known
    ]
    try:
        yield calls
    finally:
        Dimension.all_reduce, Dimension.gather = all_reduce, gather


def as_of_all(
    sizes: tuple[int, ...], order: list[int], held: list[int]
) -> Callable[[Any], dict[int, Any]]:
    """Return what turns what rank 0 says of itself into what every rank would say.

    Args:
        sizes: Of the mesh.
        order: In which the ranks reduce over its dimensions.
        held: The order of the dimensions in which a rank says where it stands.
    """
    ranks = torch.arange(prod(sizes)).view(sizes)
    known: dict[int, Any] = {}

    def everyone(fact: Facts) -> dict[int, Any]:
        if known:
            return known
        ((_, count, checksum), weight) = next(iter(fact.outline.parts.items()))
        for rank in range(prod(sizes)):
            at = [int(n) for n in torch.unravel_index(torch.tensor(rank), sizes)]
            lines = [ranks[(*at[:dim], slice(None), *at[dim + 1 :])].tolist() for dim in order]
            place = tuple(at[dim] for dim in held)
            outline = Outline(
                tuple(compact(tuple(line)) for line in lines),
                {(place, count, checksum): weight},
                frozenset(),
            )
            known[rank] = replace(fact, outline=outline, groups=outline.dimensions)
        return known

    return everyone


def count(
    sizes: tuple[int, ...], names: tuple[str, ...], declared: tuple[str, ...], p: float
) -> list[tuple[list[int], int]]:
    """Return the collectives of one call: the ranks and the bytes of each."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=prod(sizes))
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    sharded = [name for name in names if name not in declared]
    inner = mesh[tuple(sharded)] if declared else mesh
    parameters = []
    for _ in range(PARAMETERS):
        local = torch.zeros(2, 2)
        placements = [Shard(n % 2) for n in range(len(sharded))]
        held = DTensor.from_local(local, inner, placements, run_check=False)
        parameter = torch.nn.Parameter(held)
        parameter.grad = DTensor.from_local(local + 1, inner, placements, run_check=False)
        parameters.append(parameter)
    partitioned = {"*": mesh[declared]} if declared else None
    held = [names.index(name) for name in (*sharded, *declared)]
    order = [names.index(name) for name in (*sorted(sharded), *declared)]
    with counted(as_of_all(sizes, order, held)) as calls:
        clipper = GradientClipper(
            parameters, NormClip(max_norm=1.0, norm_type=p), partitioned=partitioned
        )
        clipper.clip()
        calls.clear()  # the first call is like any other, but for Partial gradients
        clipper.clip()
    dist.destroy_process_group()
    return calls


def main() -> None:
    rows = []
    for layout, (sizes, names, declared) in LAYOUTS.items():
        for p in (2.0, inf):
            calls = count(sizes, names, declared, p)
            rows.append(
                {
                    "layout": layout,
                    "ranks": prod(sizes),
                    "norm_type": p,
                    "parameters": PARAMETERS,
                    "collectives": len(calls),
                    "of_ranks": " ".join(str(len(ranks)) for ranks, _ in calls),
                    "bytes": " ".join(str(size) for _, size in calls),
                    # A maximum is under way together with the sum of its dimension.
                    "estimate_us": sum(
                        {tuple(ranks): estimate_us(ranks) for ranks, _ in calls}.values()
                    ),
                }
            )
            print(rows[-1])
    write(RESULTS / "scale.csv", rows)


if __name__ == "__main__":
    main()
