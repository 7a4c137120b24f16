"""Ten steps of training under each engine end with the weights of one process."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    fully_shard,
)
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from gradclip import GradientClipper, NormClip, ValueClip
from pairwise import ALL_COMBINATIONS
from processes import together

STEPS, BATCH = 10, 8
POLICIES = {
    "norm": NormClip(max_norm=0.05),
    "norm 1": NormClip(max_norm=0.5, norm_type=1),
    "norm inf": NormClip(max_norm=0.02, norm_type=math.inf),
    "value": ValueClip(clip_value=0.01),
}


class Model(nn.Module):
    """Two blocks around a norm; the first is what pipelines call a stage."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.up, self.norm = nn.Linear(8, 16), nn.LayerNorm(16)
        self.mid, self.down = nn.Linear(16, 12), nn.Linear(12, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)

    def forward(self, inputs):
        return self.down(torch.tanh(self.mid(self.norm(torch.tanh(self.up(inputs))))))


def batches():
    generator = torch.Generator().manual_seed(11)
    for _ in range(STEPS):
        inputs = torch.randn(BATCH, 8, generator=generator)
        yield inputs, inputs.sum(1, keepdim=True) * 3


def loss_of(outputs, targets):
    return nn.functional.mse_loss(outputs, targets)


def mine(tensor, dimension):
    """The part of a batch that belongs to this rank of a data-parallel dimension."""
    rank, size = dimension
    return tensor.chunk(size)[rank]


def of_one_process(policy, kind=Model):
    model = kind()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    clipper = GradientClipper(model, policy)
    clipped = 0
    for inputs, targets in batches():
        loss_of(model(inputs), targets).backward()
        clipped += bool(clipper.clip().clipped)
        optimizer.step()
        optimizer.zero_grad()
    assert clipped >= STEPS - 2  # or there is nothing to compare
    return {name: p.detach() for name, p in model.named_parameters()}


def train(model, clipper, dimension, after_backward=lambda: None):
    """Train for ten steps, and return what clipping said of each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    said = []
    for inputs, targets in batches():
        loss_of(model(mine(inputs, dimension)), mine(targets, dimension)).backward()
        after_backward()
        result = clipper.clip()
        said.append((result.norm_pre.item().hex(), result.coefficient.item().hex()))
        optimizer.step()
        optimizer.zero_grad()
    return said


def compare(found, policy, kind=Model):
    for name, wanted in of_one_process(policy, kind).items():
        have = found[name]
        have = have.full_tensor() if isinstance(have, DTensor) else have
        torch.testing.assert_close(have.detach(), wanted, rtol=1e-5, atol=1e-5)


def weights(model):
    return {name.removeprefix("module."): p for name, p in model.named_parameters()}


def under_ddp(rank, policy, bucket_view):
    model = DistributedDataParallel(Model(), gradient_as_bucket_view=bucket_view)
    said = train(model, GradientClipper(model, policy), (rank, dist.get_world_size()))
    compare(weights(model), policy)
    return said


def under_fsdp1(rank, policy, use_orig_params):
    model = FullyShardedDataParallel(
        Model(), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    said = train(model, GradientClipper(model, policy), (rank, dist.get_world_size()))
    with FullyShardedDataParallel.summon_full_params(model):
        found = {
            name.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
            for name, p in model.named_parameters()
        }
    compare(found, policy)
    return said


def under_fsdp2(rank, policy, offload):
    model = Model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offload else {}
    for module in (model.up, model.mid):
        fully_shard(module, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    said = train(model, GradientClipper(model, policy), (rank, dist.get_world_size()))
    compare(weights(model), policy)
    return said


def under_fsdp2_with_plain(rank, policy, _):
    model = Model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plain = [*model.norm.parameters(), *model.down.parameters()]
    fully_shard(model, mesh=mesh, ignored_params=set(plain))

    def reduce_plain():
        for parameter in plain:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()

    clipper = GradientClipper(model, policy)
    said = train(model, clipper, (rank, dist.get_world_size()), reduce_plain)
    compare(weights(model), policy)
    return said


def under_hsdp(rank, policy, _):
    model = Model()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model.mid, mesh=mesh)
    fully_shard(model, mesh=mesh)
    said = train(model, GradientClipper(model, policy), (rank, 4))
    compare(weights(model), policy)
    return said


def parallelized(mesh):
    """Tensor parallelism with a norm under sequence parallelism, whose gradients are summands."""
    model = Model()
    return parallelize_module(
        model,
        mesh,
        {
            "up": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
            "norm": SequenceParallel(sequence_dim=0),
            "mid": ColwiseParallel(input_layouts=Shard(0)),
            "down": RowwiseParallel(),
        },
    )


def under_tp(rank, policy, _):
    model = parallelized(init_device_mesh("cpu", (dist.get_world_size(),)))
    said = train(model, GradientClipper(model, policy), (0, 1))
    compare(weights(model), policy)
    return said


def under_fsdp2_and_tp(rank, policy, _):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelized(mesh["tp"])
    fully_shard(model.mid, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    said = train(model, GradientClipper(model, policy), (mesh.get_local_rank("dp"), 2))
    compare(weights(model), policy)
    return said


class Mixture(nn.Module):
    """Four experts whose outputs are added up, between two layers that every rank has whole.

    Args:
        mesh: Of the ranks that share the experts; None for one process.
    """

    def __init__(self, mesh=None):
        super().__init__()
        self.mesh = mesh
        generator = torch.Generator().manual_seed(7)
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 1)
        self.experts = nn.Parameter(torch.empty(4, 6, 6))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
        if mesh is not None:
            split = distribute_tensor(self.experts.detach(), mesh, [Shard(0)])
            self.experts = nn.Parameter(split)

    def forward(self, inputs):
        inner, experts = torch.tanh(self.up(inputs)), self.experts
        if self.mesh is not None:
            group = self.mesh.get_group()
            # Every rank's experts see these inputs, and add to their gradient.
            inner, experts = _Shared.apply(inner, group), experts.to_local()
        outputs = torch.einsum("bi,eij->ebj", inner, experts).tanh().sum(0)
        if self.mesh is not None:
            outputs = _Summed.apply(outputs, group)
        return self.down(outputs)


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, group):
        ctx.group = group
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, group):
        values = values.clone()
        dist.all_reduce(values, group=group)
        return values

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def under_expert_parallelism(rank, policy, _):
    """Experts are split over a mesh of their own, and replicated along the data."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    model = Mixture(mesh["expert"])
    data = mesh["data"].get_group()

    def average():
        for parameter in model.parameters():
            gradient = parameter.grad
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            dist.all_reduce(local, group=data)
            local /= 2

    clipper = GradientClipper(model, policy)
    said = train(model, clipper, (mesh.get_local_rank("data"), 2), average)
    compare(weights(model), policy, Mixture)
    return said


TWO = {
    "DDP": (under_ddp, False),
    "DDP, gradients in buckets": (under_ddp, True),
    "FSDP1": (under_fsdp1, False),
    "FSDP1, original parameters": (under_fsdp1, True),
    "FSDP2": (under_fsdp2, False),
    "FSDP2, offloaded": (under_fsdp2, True),
    "FSDP2 beside plain parameters": (under_fsdp2_with_plain, None),
    "TP": (under_tp, None),
}
FOUR = {
    "HSDP": (under_hsdp, None),
    "FSDP2 over TP": (under_fsdp2_and_tp, None),
    "EP on a mesh of its own": (under_expert_parallelism, None),
}


# Every policy is on every layout in test_layouts.py: here each engine has the norm, and one all.
ENGINES_AND_POLICIES = [
    (engine, policy)
    for engine in (*TWO, *FOUR)
    for policy in POLICIES
    if ALL_COMBINATIONS or policy == "norm" or engine == "FSDP2"
]


@pytest.mark.parametrize(("engine", "policy"), ENGINES_AND_POLICIES)
def test_ten_steps_end_where_one_process_ends(engine, policy):
    function, option = {**TWO, **FOUR}[engine]
    said = together(function, 2 if engine in TWO else 4, POLICIES[policy], option)
    assert all(each == said[0] for each in said)


def staged(rank, schedule, norm_type):
    """A pipeline of two stages that share a weight; the reference shares it in one process."""
    group = dist.group.WORLD
    policy = NormClip(max_norm=0.05, norm_type=norm_type)

    class Stage(nn.Module):
        def __init__(self, number):
            super().__init__()
            generator = torch.Generator().manual_seed(3)
            self.tied = nn.Parameter(torch.randn(8, 8, generator=generator) / 3)
            self.own = nn.Linear(8, 8 + number)
            generator.manual_seed(number)
            with torch.no_grad():
                for parameter in self.own.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)

        def forward(self, inputs):
            return self.own(torch.tanh(inputs @ self.tied))

    whole = [Stage(0), Stage(1)]
    whole[1].tied = whole[0].tied
    whole = nn.Sequential(*whole)
    reference = torch.optim.SGD(whole.parameters(), lr=0.5, momentum=0.9)
    alone = GradientClipper(whole, policy)

    stage_module = Stage(rank)
    stage = PipelineStage(stage_module, rank, 2, torch.device("cpu"))
    steps = schedule(stage, n_microbatches=4, loss_fn=loss_of)
    optimizer = torch.optim.SGD(stage_module.parameters(), lr=0.5, momentum=0.9)
    clipper = GradientClipper(
        stage_module, policy, partitioned={"*": group}, duplicated={"tied": group}
    )
    said = []
    for inputs, _ in batches():
        targets = inputs.sum(1, keepdim=True).expand(BATCH, 9).contiguous()
        loss_of(whole(inputs), targets).backward()
        expected = alone.clip()
        reference.step()
        reference.zero_grad()

        if rank == 0:
            steps.step(inputs)
        else:
            steps.step(target=targets)
        dist.all_reduce(stage_module.tied.grad)  # tied: each stage has a part of it
        result = clipper.clip()
        assert bool(result.clipped)
        assert math.isclose(result.norm_pre.item(), expected.norm_pre.item(), rel_tol=1e-5)
        said.append((result.norm_pre.item().hex(), result.coefficient.item().hex()))
        optimizer.step()
        optimizer.zero_grad()
    wanted = whole[rank]
    torch.testing.assert_close(stage_module.tied, wanted.tied, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stage_module.own.weight, wanted.own.weight, rtol=1e-5, atol=1e-5)
    return said


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("schedule", [ScheduleGPipe, Schedule1F1B])
def test_a_pipeline_of_stages_that_tie_weights(schedule, norm_type):
    """Norm per stage: torchtitan#596, pytorch#162638; tied weights twice: Megatron PR#7227."""
    first, second = together(staged, 2, schedule, norm_type)
    assert first == second
