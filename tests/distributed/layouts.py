"""Every way in which ranks can hold gradients, with the gradients that they hold together."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial as partially
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import oracle

SHAPES = {
    "embed.weight": (10, 6),
    "block.weight": (7, 5),  # uneven on two and on four ranks
    "block.bias": (7,),
    "head.weight": (1, 6),  # empty on every rank but the first
    "scale": (2,),
}


def full(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The whole gradient of a parameter: the same on every rank, and exact in bfloat16."""
    return oracle.randn(*shape, seed=seed + sum(name.encode())).bfloat16().float()


@dataclass
class Held:
    """What one rank holds.

    Args:
        source: What ``GradientClipper`` is given.
        fill: Sets the gradients of this rank from whole ones, by name.
        read: Returns whole gradients, by name, of what this rank holds; all ranks ask together.
        shapes: The shape of everything that all ranks hold together, each once.
        dimensions: How many collectives sum it.
        options: More arguments of ``GradientClipper``.
    """

    source: Any
    fill: Callable[[dict[str, Tensor]], None]
    read: Callable[[], dict[str, Tensor]]
    shapes: dict[str, tuple[int, ...]]
    dimensions: int
    options: dict[str, Any] = field(default_factory=dict)


class Holder(nn.Module):
    """Parameters whose gradients are whatever ``forward`` is given."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(torch.zeros(shape)))

    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        products = [
            (getattr(self, name.replace(".", "_")) * value).sum() for name, value in wanted.items()
        ]
        return torch.stack(products).sum()


def by_backward(module: nn.Module, inner: nn.Module) -> Callable[[dict[str, Tensor]], None]:
    """Fill gradients the way that training does."""

    def fill(whole: dict[str, Tensor]) -> None:
        for parameter in module.parameters():
            parameter.grad = None
        module(whole).backward()

    return fill


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def of_module(
    module: nn.Module, shapes: dict[str, tuple[int, ...]], dimensions: int, **options: Any
) -> Held:
    def read() -> dict[str, Tensor]:
        found = dict(module.named_parameters())
        return {
            name: whole(parameter.grad)
            for name in shapes
            for key, parameter in found.items()
            if key.split(".")[-1] == name.replace(".", "_")
        }

    return Held(module, by_backward(module, module), read, shapes, dimensions, options)


def of_placements(
    placed: dict[str, tuple[Any, list[Any]] | None], dimensions: int, **options: Any
) -> Held:
    """Hold DTensors on the meshes and placements that are given; None is a plain tensor."""
    shapes = {name: SHAPES[name] for name in placed}
    parameters: dict[str, Tensor] = {}
    for name, where in placed.items():
        tensor = torch.zeros(SHAPES[name])
        if where is not None:
            tensor = distribute_tensor(tensor, *where)
        parameters[name] = nn.Parameter(tensor)

    def fill(values: dict[str, Tensor]) -> None:
        for name, where in placed.items():
            grad = values[name].clone()
            parameters[name].grad = grad if where is None else distribute_tensor(grad, *where)

    def read() -> dict[str, Tensor]:
        return {name: whole(parameter.grad) for name, parameter in parameters.items()}

    return Held(list(parameters.items()), fill, read, shapes, dimensions, options)


def one_process(rank: int) -> Held:
    return of_placements(dict.fromkeys(SHAPES), 0)


def ddp(rank: int) -> Held:
    return of_module(DistributedDataParallel(Holder(SHAPES)), SHAPES, 0)


def ddp_bucket_view(rank: int) -> Held:
    module = DistributedDataParallel(Holder(SHAPES), gradient_as_bucket_view=True)
    return of_module(module, SHAPES, 0)


def summoned(module: nn.Module) -> dict[str, Tensor]:
    """Whole gradients of what FSDP1 holds."""
    with FullyShardedDataParallel.summon_full_params(module, with_grads=True):
        found = dict(module.named_parameters())
        return {
            name: parameter.grad.clone()
            for name in SHAPES
            for key, parameter in found.items()
            if key.split(".")[-1] == name.replace(".", "_")
        }


def fsdp1(rank: int, **options: Any) -> Held:
    module = FullyShardedDataParallel(Holder(SHAPES), device_id=torch.device("cpu"), **options)
    held = of_module(module, SHAPES, 1)

    held.read = partially(summoned, module)
    return held


def fsdp1_original_parameters(rank: int) -> Held:
    return fsdp1(rank, use_orig_params=True)


def fsdp1_flat(rank: int) -> Held:
    held = fsdp1(rank)
    module = held.source

    def read() -> dict[str, Tensor]:
        (flat,) = module.parameters()
        size = dist.get_world_size()
        parts = [torch.empty_like(flat.grad) for _ in range(size)]
        dist.all_gather(parts, flat.grad)
        values = torch.cat(parts)
        found, at = {}, 0
        for name, shape in SHAPES.items():
            count = torch.Size(shape).numel()
            found[name] = values[at : at + count].view(shape)
            at += count
        return found

    held.read = read
    return held


def fsdp1_not_sharded(rank: int) -> Held:
    held = fsdp1(rank, use_orig_params=True, sharding_strategy=ShardingStrategy.NO_SHARD)
    held.dimensions = 0
    return held


class Halves(nn.Module):
    """Some parameters in shards of FSDP1, the others whole on every rank."""

    def __init__(self) -> None:
        super().__init__()
        names = list(SHAPES)
        self.cut = FullyShardedDataParallel(
            Holder({name: SHAPES[name] for name in names[:2]}),
            device_id=torch.device("cpu"),
            use_orig_params=True,
        )
        self.whole = FullyShardedDataParallel(
            Holder({name: SHAPES[name] for name in names[2:]}),
            device_id=torch.device("cpu"),
            use_orig_params=True,
            sharding_strategy=ShardingStrategy.NO_SHARD,
        )

    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        names = list(SHAPES)
        cut = self.cut({name: wanted[name] for name in names[:2]})
        return cut + self.whole({name: wanted[name] for name in names[2:]})


def fsdp1_beside_replicated(rank: int) -> Held:
    module = Halves()
    held = of_module(module, SHAPES, 1)

    held.read = partially(summoned, module)
    return held


def fsdp2(rank: int) -> Held:
    module = Holder(SHAPES)
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return of_module(module, SHAPES, 1)


def fsdp2_mixed_precision(rank: int) -> Held:
    module = Holder(SHAPES)
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=precision)
    return of_module(module, SHAPES, 1)


def fsdp2_offload(rank: int) -> Held:
    module = Holder(SHAPES)
    offload = CPUOffloadPolicy(pin_memory=False)
    fully_shard(
        module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), offload_policy=offload
    )
    return of_module(module, SHAPES, 1)


def fsdp2_with_plain(rank: int) -> Held:
    module = Holder(SHAPES)
    plain = {module.scale, module.block_bias}
    fully_shard(
        module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), ignored_params=plain
    )
    return of_module(module, SHAPES, 1)


def hsdp(rank: int) -> Held:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    module = Holder(SHAPES)
    fully_shard(module, mesh=mesh)
    return of_module(module, SHAPES, 2)


def tp(rank: int) -> Held:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return of_placements(
        {
            "embed.weight": (mesh, [Shard(1)]),
            "block.weight": (mesh, [Shard(0)]),
            "block.bias": (mesh, [Replicate()]),
            "head.weight": (mesh, [Shard(0)]),
            "scale": None,  # a plain LayerNorm beside it
        },
        1,
    )


def dp_tp(rank: int) -> Held:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return of_placements(
        {
            "embed.weight": (mesh, [Shard(0), Shard(1)]),
            "block.weight": (mesh, [Shard(0), Shard(0)]),
            "block.bias": (mesh, [Shard(0), Replicate()]),
            "head.weight": (mesh["dp"], [Shard(0)]),
            "scale": None,
        },
        2,
    )


def strided(rank: int) -> Held:
    """FSDP2 over what TP has sharded in the same dimension."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    shapes = {"embed.weight": (12, 6), "block.weight": (8, 5), "block.bias": (8,)}
    module = Holder(shapes)
    for name in shapes:
        key = name.replace(".", "_")
        value = distribute_tensor(getattr(module, key).detach(), mesh["tp"], [Shard(0)])
        setattr(module, key, nn.Parameter(value))
    fully_shard(module, mesh=mesh["dp"])
    held = of_module(module, shapes, 2)
    fill = held.fill

    def distributed(values: dict[str, Tensor]) -> None:
        fill({n: distribute_tensor(v, mesh["tp"], [Shard(0)]) for n, v in values.items()})

    held.fill = distributed
    return held


def experts(rank: int) -> Held:
    """Dense parameters over all ranks, experts on a mesh of their own."""
    everyone = init_device_mesh("cpu", (4,))
    expert = init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep"))
    return of_placements(
        {
            "embed.weight": (everyone, [Shard(0)]),
            "block.weight": (expert, [Shard(1), Shard(0)]),
            "block.bias": (expert, [Replicate(), Shard(0)]),
            "head.weight": (everyone, [Shard(0)]),
            "scale": (everyone, [Replicate()]),
        },
        3,
    )


def of_own(
    shared: dict[str, tuple[int, ...]],
    own: dict[str, tuple[int, ...]],
    everything: dict[str, tuple[int, ...]],
    dimensions: int,
    **options: Any,
) -> Held:
    """Hold plain tensors, some of which no other rank has."""
    parameters = {n: nn.Parameter(torch.zeros(s)) for n, s in {**shared, **own}.items()}

    def fill(values: dict[str, Tensor]) -> None:
        for name, parameter in parameters.items():
            parameter.grad = values[name].clone()

    def read() -> dict[str, Tensor]:
        return {name: parameter.grad for name, parameter in parameters.items()}

    return Held(list(parameters.items()), fill, read, everything, dimensions, options)


def experts_by_hand(rank: int) -> Held:
    """Each rank of an expert group has an expert of its own; two such groups are replicas."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep"))
    mine = mesh.get_local_rank("ep")
    experts = {f"experts.{number}.weight": (5, 3 + number) for number in range(2)}
    own = {f"experts.{mine}.weight": experts[f"experts.{mine}.weight"]}
    return of_own(
        SHAPES,
        own,
        {**SHAPES, **experts},
        1,
        partitioned={"experts.*": mesh["ep"]},
    )


def pipeline_tied(rank: int) -> Held:
    """Two stages that share the embedding, each sharded by FSDP2 over two ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = mesh.get_local_rank("pp")
    shapes = {"tied.weight": (10, 6), **{f"layers.{n}.weight": (4 + n, 5) for n in range(4)}}
    mine = {"tied.weight": (10, 6), **{f"layers.{n}.weight": (4 + n, 5) for n in (0, 1)}}
    if stage:
        mine = {"tied.weight": (10, 6), **{f"layers.{n}.weight": (4 + n, 5) for n in (2, 3)}}
    module = Holder(mine)
    fully_shard(module, mesh=mesh["dp"])
    group = mesh["pp"].get_group()
    held = of_module(module, mine, 2, partitioned={"*": group}, duplicated={"tied*": group})
    fill = held.fill
    held.fill = lambda values: fill({name: values[name] for name in mine})
    held.shapes = shapes
    return held


def partial(rank: int) -> Held:
    """Gradients that arrive as summands, as those of a LayerNorm under sequence parallelism do."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    size = dist.get_world_size()
    held = of_placements(
        {
            "embed.weight": (mesh, [Shard(1)]),
            "block.weight": (mesh, [Shard(0)]),
            "block.bias": (mesh, [Replicate()]),
            "head.weight": (mesh, [Shard(0)]),
            "scale": (mesh, [Replicate()]),
        },
        1,
    )
    parameters = dict(held.source)
    fill = held.fill

    def as_summands(values: dict[str, Tensor]) -> None:
        fill(values)
        for name in ("block.bias", "scale"):
            local = values[name] * (rank + 1) / (size * (size + 1) / 2)
            parameters[name].grad = DTensor.from_local(local, mesh, [Partial()], run_check=False)

    held.fill = as_summands
    return held


TWO = {
    each.__name__: each
    for each in (
        ddp,
        ddp_bucket_view,
        fsdp1_flat,
        fsdp1_original_parameters,
        fsdp1_not_sharded,
        fsdp1_beside_replicated,
        fsdp2,
        fsdp2_mixed_precision,
        fsdp2_offload,
        fsdp2_with_plain,
        tp,
        partial,
    )
}
FOUR = {
    each.__name__: each for each in (hsdp, dp_tp, strided, experts, experts_by_hand, pipeline_tied)
}
