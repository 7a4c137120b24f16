"""Copies that should be alike: compared by the sums that ranks exchange, and for debugging.

Numbers are of public issues and pull requests that showed the like elsewhere.
"""

import math

import pytest
import torch
import torch.distributed as dist
from given import fails, line, local, plain, sharded
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard

import gradclip
from gradclip import GradientClipper
from gradclip.errors import (
    ArgumentValueError,
    NonFiniteGradientError,
    ReplicaError,
    UnsupportedGradientError,
)
from processes import together

# copies that differ


def on_replicas(rank, what):
    """HSDP: a mesh with a dimension that splits nothing."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 2))
    fully_shard(model, mesh=mesh)
    replica = mesh.get_local_rank("replicate")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    clipper = GradientClipper(model, 1e9)
    said = clipper.clip().norm_pre.item()
    assert math.isclose(said, math.sqrt(32 + 8 + 2), rel_tol=1e-6)
    first = model[0].weight.grad._local_tensor
    if what == "power":
        for parameter in model.parameters():
            parameter.grad._local_tensor.mul_(1 + 9 * replica)
    elif what == "bit":
        first[0, 0] += 1e-6 * (rank == 3)
    elif rank == 3:
        first[0, 0] = math.nan
    if what in ("nan", "raise"):
        mode = "skip" if what == "nan" else "raise"
        clipper = GradientClipper(model, 1e9, nonfinite=mode)
    if what == "nan":
        return bool(clipper.clip().skipped)
    error = NonFiniteGradientError if what == "raise" else ReplicaError
    fails(clipper.clip, error, "on rank 3" if what == "raise" else "differ")
    return local(model[1].bias).tolist()


@pytest.mark.parametrize("what", ["power", "bit", "nan", "raise"])
def test_replicas_of_a_mesh_are_compared_when_debugging(what):
    """HSDP that did not reduce over its replicas: NeMo-Automodel#3135, pytorch#160169."""
    said = together(on_replicas, 4, what, env={"GRADCLIP_DEBUG": "1"})
    if what == "nan":
        assert said == [True] * 4
    if what == "bit":
        assert said == [[1.0]] * 4


def uncovered(rank, what):
    """Plain parameters beside DTensors on a part of the mesh, or on a mesh of their own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    dp = mesh.get_local_rank("dp")
    beside, across = plain(torch.ones(3)), sharded(torch.ones(4), mesh["tp"], Shard(0))
    named = [("weight", across), ("norm", beside)]
    clipper = GradientClipper(named, 1e9)
    assert math.isclose(clipper.clip().norm_pre.item(), math.sqrt(7), rel_tol=1e-6)
    if what == "plain":
        beside.grad *= 1 + dp
    else:
        across.grad._local_tensor.mul_(1 + dp)
    name = "norm" if what == "plain" else "weight"
    fails(clipper.clip, ReplicaError, f"gradient of {name} differs between ranks 0 and")


@pytest.mark.parametrize("what", ["plain", "shards"])
def test_what_no_mesh_covers_is_compared_when_debugging(what):
    together(uncovered, 4, what, env={"GRADCLIP_DEBUG": "1"})


def expert_of_one(rank, how):
    """An expert on a mesh of one rank, which is another one on each rank."""
    dense = sharded(torch.arange(8.0), line(), Shard(0))
    alone = init_device_mesh("cpu", (2, 1), mesh_dim_names=("ep", "edp"))["edp"]
    expert = sharded(torch.full((3,), rank + 1.0), alone, Shard(0))
    named = [("dense", dense), ("expert", expert)]
    if how == "function":
        call = lambda: gradclip.clip_grad_norm_([dense, expert], 1.0)  # noqa: E731
        fails(call, ReplicaError, r"parameters\[1\].*partitioned")
        return None
    if how == "undeclared":
        clipper = GradientClipper(named, 1.0)
        fails(clipper.clip, ReplicaError, r"of expert differs .* 0 and 1, .* 3 and 12.*partit")
        return local(expert).tolist() == [rank + 1.0] * 3
    clipper = GradientClipper(named, 1.0, partitioned={"expert": dist.group.WORLD})
    return clipper.clip().norm_pre.item()


def test_an_expert_on_a_mesh_of_one_rank():
    """Counted as a copy, it hides: Megatron PR#5954, #6489. torch refuses two meshes."""
    assert together(expert_of_one, 2, "declared") == [pytest.approx(math.sqrt(155))] * 2
    assert together(expert_of_one, 2, "undeclared") == [True] * 2
    together(expert_of_one, 2, "function")


def copied_shards(rank):
    """Shards of which other ranks have copies, along each dimension of a mesh; no debugging."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    named = {
        "both": sharded(torch.ones(4, 4), mesh, Shard(0), Shard(1)),
        "over dp": sharded(torch.ones(4), mesh, Shard(0), Replicate()),
        "over tp": sharded(torch.ones(4), mesh, Replicate(), Shard(0)),
        "whole": sharded(torch.ones(4), mesh, Replicate(), Replicate()),
        "plain": plain(torch.ones(4)),
    }
    clipper = GradientClipper(named.items(), 1.0)
    before = clipper.clip().norm_pre.item()
    for parameter in named.values():
        local(parameter).fill_(1.0)
    for name in ("over dp", "over tp", "whole", "plain"):
        for odd in (0, 3):
            if rank == odd:
                local(named[name]).fill_(1.5)
            fails(clipper.clip, ReplicaError, f"differ by rank: the gradient of {name} differs")
            assert {local(each).max().item() for each in named.values()} <= {1.0, 1.5}
            local(named[name]).fill_(1.0)
        if rank == 3:
            local(named[name])[0] = math.nan
        assert bool(clipper.clip().skipped)
        for parameter in named.values():
            local(parameter).fill_(1.0)
    return before, clipper.clip().norm_pre.item()


def test_copies_of_shards_are_compared_by_the_sums_that_ranks_exchange():
    assert together(copied_shards, 4) == [(pytest.approx(math.sqrt(32)),) * 2] * 4


# windows and roots


def window(rank, function):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    for module in (model[0], model):
        fully_shard(module, mesh=line())
    inputs = torch.ones(2, 4)
    clip = clips(function, model)
    model.set_requires_gradient_sync(False)
    model(inputs).sum().backward()
    fails(clip, UnsupportedGradientError, "an accumulation window is open")
    model.set_requires_gradient_sync(True)
    fails(clip, UnsupportedGradientError, "an accumulation window is open")
    model(inputs).sum().backward()
    truth = math.sqrt(sum(p.grad.full_tensor().square().sum().item() for p in model.parameters()))
    assert math.isclose(clip(), truth, rel_tol=1e-5)
    model.zero_grad(set_to_none=False)  # gradients are there, of the window before
    model.set_requires_gradient_sync(False)
    model(inputs).sum().backward()
    fails(clip, UnsupportedGradientError, "an accumulation window is open")


def clips(function, model):
    clipper = GradientClipper(torch.optim.SGD(model.parameters(), lr=0.1), 1e9)

    def clip():
        if function:
            return gradclip.clip_grad_norm_(model.parameters(), 1e9).item()
        return clipper.clip().norm_pre.item()

    return clip


@pytest.mark.parametrize("function", [True, False])
def test_an_accumulation_window_that_is_open_is_said(function):
    """FSDP2 keeps its gradients inside ``set_requires_gradient_sync(False)``: accelerate#3760."""
    together(window, 2, function)


def part_of_fsdp1(rank, strategy):
    strategy = getattr(torch.distributed.fsdp.ShardingStrategy, strategy)
    options = {
        "device_id": torch.device("cpu"),
        "use_orig_params": True,
        "sharding_strategy": strategy,
    }
    inner = nn.ModuleList([FullyShardedDataParallel(nn.Linear(4, 4), **options) for _ in "ab"])
    model = FullyShardedDataParallel(nn.Sequential(*inner, nn.Linear(4, 2)), **options)
    early = [GradientClipper(part, 1e-3) for part in (inner[0], inner)]
    model(torch.ones(2, 4)).sum().backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for clipper in early:
        fails(clipper.clip, ArgumentValueError, "not its root")
    fails(lambda: GradientClipper(inner[0], 1.0).clip(), ArgumentValueError, "not its root")
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(map(torch.equal, before, after))
    return GradientClipper(nn.ModuleList([model]), 1e9).clip().norm_pre.item()


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "NO_SHARD"])
def test_a_part_of_what_fsdp1_wraps_is_refused(strategy):
    """Its norm would be that of a part; torch raises as well."""
    first, second = together(part_of_fsdp1, 2, strategy)
    assert first == second
