"""How clipping fails elsewhere on many ranks: nothing hangs, and every rank reaches one verdict.

Each test runs real processes, which are killed where they hang. The letters are those of
``tests/unit/clipping/test_failure_rows.py``; numbers are of issues and pull requests.
"""

import math
import os
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import gradclip
import oracle
from gradclip import GradientClipper, NormClip
from gradclip.errors import (
    ArgumentValueError,
    CollectiveError,
    NonFiniteGradientError,
    OverlappingGradientsError,
    RankError,
    ReplicaError,
)
from patience import seconds
from processes import outcomes_of, together


def sharded(value, mesh=None, *placements):
    """A parameter whose gradient is distributed as it is."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    placements = placements or (Shard(0),)
    parameter = nn.Parameter(distribute_tensor(torch.zeros_like(value), mesh, placements))
    parameter.grad = distribute_tensor(value, mesh, placements)
    return parameter


def plain(value):
    parameter = nn.Parameter(torch.zeros_like(value))
    parameter.grad = value.clone()
    return parameter


def numbers(result):
    return result.norm_pre.item().hex(), result.coefficient.item().hex(), bool(result.skipped)


# a: FSDP2 beside plain parameters


def mixed(rank, norm_type):
    module = nn.Sequential(nn.Linear(16, 16, bias=False), nn.LayerNorm(16))
    mesh = init_device_mesh("cpu", (2,))
    weight, scale, shift = (
        oracle.randn(*s, seed=3) * k for s, k in (((16, 16), 3.0), ((16,), 2.0), ((16,), 1.0))
    )
    fully_shard(module[0], mesh=mesh)
    module[0].weight.grad = distribute_tensor(weight, mesh, [Shard(0)])
    module[1].weight.grad, module[1].bias.grad = scale.clone(), shift.clone()
    result = GradientClipper(module, NormClip(max_norm=1.0, norm_type=norm_type)).clip()
    truth = oracle.norm([weight, scale, shift], norm_type)
    assert oracle.relative(result.norm_pre, truth) < 1e-6
    torch.testing.assert_close(module[0].weight.grad.full_tensor(), weight / truth)
    torch.testing.assert_close(module[1].weight.grad, scale / truth)
    return numbers(result)


@pytest.mark.parametrize("norm_type", [2.0, "inf"])
def test_a_sharded_beside_plain(norm_type):
    """torch raises for a mix; accelerate PR#4219, torchtune#2420; "inf" is a TypeError there."""
    first, second = together(mixed, 2, math.inf if norm_type == "inf" else norm_type)
    assert first == second


def plain_that_differ(rank):
    parameters = [("w", sharded(torch.ones(4, 4))), ("b", plain(torch.full((4,), 3.0 + 5 * rank)))]
    before = oracle.look([parameters[1][1]])
    with pytest.raises(ReplicaError, match="differ by rank"):
        GradientClipper(parameters, 1.0).clip()
    oracle.assert_untouched([parameters[1][1]], before)
    assert torch.equal(parameters[0][1].grad.full_tensor(), torch.ones(4, 4))


def test_a_plain_replicas_that_differ_are_found():
    """Elsewhere each rank scales the shards of one tensor by a coefficient of its own."""
    together(plain_that_differ, 2)


# b, c: tensor parallelism, several meshes


def beside_tensor_parallel(rank):
    mesh = init_device_mesh("cpu", (2,))
    weight, scale = oracle.randn(8, 4), oracle.randn(8)
    parameters = [sharded(weight, mesh, Shard(1)), plain(scale)]
    result = GradientClipper(parameters, 1.0).clip()
    assert oracle.relative(result.norm_pre, oracle.norm([weight, scale])) < 1e-6
    return numbers(result)


def test_b_a_plain_layer_norm_beside_tensor_parallelism():
    """TP counted tp times: NeMo-RL PR#3788."""
    first, second = together(beside_tensor_parallel, 2)
    assert first == second


def two_meshes(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    six, eight = torch.full((4, 1), 3.0), torch.full((4, 4), 2.0)
    parameters = [sharded(six, mesh["dp"], Shard(0)), sharded(eight, mesh, Shard(0), Shard(1))]
    result = GradientClipper(parameters, 1.0).clip()
    assert result.norm_pre.item() == 10.0  # 3-4-5, twice
    return numbers(result)


def test_c_two_meshes_in_one_call():
    """torch: all operands in aten.stack.default must have the same mesh; pytorch#180346."""
    assert len(set(together(two_meshes, 4))) == 1


def expert_on_dp(rank):
    """An expert on the dp mesh, another one for each tp coordinate."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    dense = torch.full((4, 4), 5.0)
    experts = [torch.full((4, 1), 10.0), torch.full((4, 1), 100.0)]
    mine = experts[mesh.get_local_rank("tp")]
    named = [
        ("dense", sharded(dense, mesh, Shard(0), Shard(1))),
        ("experts.weight", sharded(mine, mesh["dp"], Shard(0))),
    ]
    clipper = GradientClipper(named, 1.0, partitioned={"experts.*": mesh["tp"]})
    result = clipper.clip()
    assert oracle.relative(result.norm_pre, oracle.norm([dense, *experts])) < 1e-6
    return numbers(result)


def test_c_experts_that_differ_along_another_mesh_dimension():
    """EP x TP: Megatron PR#5916, DeepSpeed#8475."""
    assert len(set(together(expert_on_dp, 4))) == 1


# d: ranks without gradients


def without_gradients(rank, missing):
    parameters = [(name, sharded(torch.full((4,), 3.0))) for name in ("first", "second")]
    if rank == 1:
        for name, parameter in parameters:
            if name in missing:
                parameter.grad = None
    clipper = GradientClipper(parameters, 1.0)
    said = []
    for _ in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = clipper.clip()
        said += [str(each.message) for each in caught]
    (warning,) = [each for each in said if "count as zero" in each]
    assert all(f"rank 1 has none for {', '.join(missing)}" in warning for _ in said)
    # The next collective still pairs with its own kind.
    loss = torch.tensor(float(rank + 2))
    dist.all_reduce(loss)
    assert loss.item() == 5.0
    return numbers(result)


@pytest.mark.parametrize("missing", [("second",), ("first", "second")])
def test_d_a_rank_lacks_sharded_gradients(missing):
    """torch hangs, or mispairs collectives silently: pytorch PR#94835."""
    first, second = together(without_gradients, 2, missing)
    assert first == second
    assert first[2] is False


def without_a_plain_one(rank):
    parameters = [("w", sharded(torch.ones(4))), ("norm.scale", plain(torch.full((2,), 3.0)))]
    if rank == 1:
        parameters[1][1].grad = None
    with pytest.raises(ReplicaError, match=r"rank 1 has none for norm\.scale"):
        GradientClipper(parameters, 1.0).clip()
    assert torch.equal(parameters[0][1].grad.full_tensor(), torch.ones(4))


def test_d_a_rank_lacks_a_plain_gradient():
    """Elsewhere the norms differ by rank, and so do the weights from then on."""
    together(without_a_plain_one, 2)


# e: a NaN somewhere


def nan_on_one_replica(rank):
    parameters = [("w", sharded(torch.ones(4))), ("b", plain(torch.ones(2)))]
    if rank == 1:
        parameters[1][1].grad[0] = math.nan
    result = GradientClipper(parameters, 1.0).clip()
    assert bool(result.skipped)
    assert parameters[1][1].grad.abs().max() == 0
    return numbers(result)[1:]


def test_e_a_nan_on_one_replica_is_everyones():
    first, second = together(nan_on_one_replica, 2)
    assert first == second


def nan_in_one_shard(rank):
    values = torch.tensor([1.0, 2.0, 3.0, math.nan])
    parameter = sharded(values)
    policy = NormClip(max_norm=1.0, norm_type=math.inf)
    with pytest.raises(NonFiniteGradientError, match=r"(?s)weight.*NaN: 1.*on rank 1"):
        GradientClipper([("weight", parameter)], policy, nonfinite="raise").clip()
    result = GradientClipper([("weight", parameter)], policy).clip()
    return int(result.nonfinite), bool(result.skipped), math.isnan(result.norm_pre.item())


def test_e_a_nan_in_one_shard_for_p_inf():
    """A maximum over ranks drops NaN: torch's check for errors passes."""
    assert together(nan_in_one_shard, 2) == [(1, True, True)] * 2


def one_replica_differs(rank, where):
    parameters = [(name, plain(torch.ones(3))) for name in ("first", "second", "third")]
    if rank == 2:
        if where == "bits":
            parameters[1][1].grad[2] += 1e-7
        else:
            parameters[1][1].grad = None
    said = "gradient of second differs between ranks 0 and 2"
    if where == "presence":
        said = "rank 2 has none for second"
    with pytest.raises(ReplicaError, match=said):
        GradientClipper(parameters, 1.0).clip()
    assert parameters[0][1].grad.tolist() == [1, 1, 1]


@pytest.mark.parametrize("where", ["bits", "presence"])
def test_replicas_are_compared_when_debugging(where):
    together(one_replica_differs, 3, where, env={"GRADCLIP_DEBUG": "1"})


def equal_replicas(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    named = [
        ("a", sharded(torch.ones(4, 4), mesh, Shard(0), Shard(1))),
        ("b", sharded(torch.ones(4), mesh, Shard(0), Replicate())),
        ("c", plain(torch.ones(3))),
    ]
    clipper = GradientClipper(named, 1.0)
    clipper.clip()
    named[1][1].grad._local_tensor[0] += rank % 2  # differs along tp only
    with pytest.raises(ReplicaError, match="the gradient of b differs between ranks 0 and 1"):
        clipper.clip()


def test_replicated_shards_are_compared_when_debugging():
    together(equal_replicas, 4, env={"GRADCLIP_DEBUG": "1"})


# l: empty shards


def empty_shard(rank, norm_type):
    model = nn.Sequential(nn.Linear(4, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    model(torch.full((2, 4), 0.5)).sum().backward()
    truth = [parameter.grad.full_tensor() for parameter in model.parameters()]
    norm = oracle.norm(truth, norm_type)
    result = GradientClipper(model, NormClip(max_norm=0.5, norm_type=norm_type)).clip()
    assert oracle.relative(result.norm_pre, norm) < 1e-6
    assert dict(model.named_parameters())["0.weight"].grad._local_tensor.numel() == 4 * (1 - rank)
    return numbers(result)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_l_an_empty_shard(norm_type):
    """torch: one rank raises, the other hangs; torchrec PR#3809."""
    first, second = together(empty_shard, 2, norm_type)
    assert first == second


# o, r, and what was reported


def tied_and_listed_twice(rank):
    parameter = sharded(torch.full((4,), 2.5))
    result = GradientClipper([parameter, parameter], 1.0).clip()
    assert result.norm_pre.item() == 5.0
    assert parameter.grad.full_tensor().tolist() == pytest.approx([0.5] * 4)


def test_o_a_sharded_parameter_listed_twice():
    together(tied_and_listed_twice, 2)


def bare_flat(rank):
    model = FullyShardedDataParallel(nn.Linear(4, 3), device_id=torch.device("cpu"))
    model(torch.ones(2, 4)).sum().backward()
    before = oracle.look(model.parameters())
    for bare in (list(model.parameters()), torch.optim.SGD(model.parameters(), lr=0.1)):
        with pytest.raises(ArgumentValueError, match="Give the module"):
            GradientClipper(bare, 1.0)
    with pytest.raises(ArgumentValueError, match="Give the module"):
        gradclip.clip_grad_norm_(model.parameters(), 1.0)
    oracle.assert_untouched(model.parameters(), before)
    return numbers(GradientClipper(model, 1.0).clip())


def test_r_flat_parameters_need_their_module():
    """torch's function clips each rank by the norm of its own shard: Lightning#19235."""
    first, second = together(bare_flat, 2)
    assert first == second


# one rank is at fault


def fault_on_one_rank(rank):
    parameter, other = sharded(torch.ones(4, 4)), plain(torch.ones(2))
    clipper = GradientClipper([("weight", parameter), ("other", other)], 1.0)
    clipper.clip()
    parameter.grad._local_tensor.fill_(3.0)
    other.grad = torch.ones(1).expand(2) if rank == 1 else torch.ones(2)
    started = time.monotonic()
    expected = OverlappingGradientsError if rank == 1 else RankError
    with pytest.raises(expected, match=r"shares memory with itself"):
        clipper.clip()
    assert time.monotonic() - started < seconds(5)
    assert parameter.grad._local_tensor.eq(3.0).all()
    # Whoever goes on finds everyone in step.
    other.grad = torch.ones(2)
    return numbers(clipper.clip())


def test_what_fails_on_one_rank_fails_on_all():
    first, second = together(fault_on_one_rank, 2)
    assert first == second


def one_rank_sees_another_placement(rank):
    parameter = sharded(torch.ones(4, 4))
    clipper = GradientClipper([("weight", parameter)], 1.0)
    clipper.clip()
    parameter.grad = sharded(torch.full((4, 4), 3.0)).grad
    if rank == 0:
        parameter.grad = DTensor.from_local(
            torch.full((4, 4), 3.0), parameter.device_mesh, [Replicate()], run_check=False
        )
    result = clipper.clip()
    assert math.isclose(result.norm_pre.item(), 12.0)
    assert parameter.grad.placements == (Shard(0),)
    assert torch.allclose(parameter.grad.full_tensor(), torch.full((4, 4), 0.25))
    return numbers(result)


def test_a_placement_that_changes_on_one_rank():
    first, second = together(one_rank_sees_another_placement, 2)
    assert first == second


def disagree(rank, what):
    parameters = [("weight", sharded(torch.ones(4, 4))), ("bias", plain(torch.ones(2)))]
    max_norm, partitioned = 1.0, None
    if what == "policies":
        max_norm = 1.0 + rank
    elif what == "parameters":
        parameters = parameters[: 2 - rank]
    else:
        partitioned = {"expert.*": dist.group.WORLD}
    with pytest.raises(ArgumentValueError, match=what):
        GradientClipper(parameters, max_norm, partitioned=partitioned)


@pytest.mark.parametrize("what", ["policies", "parameters", "partitioned"])
def test_ranks_that_disagree_are_told_before_the_first_step(what):
    together(disagree, 2, what)


# a rank that is gone


def killed(rank):
    clipper = GradientClipper([sharded(torch.ones(4))], 1.0)
    clipper.clip()
    if rank == 1:
        os._exit(9)  # as the kernel does when memory is short
    started = time.monotonic()
    try:
        clipper.clip()
    except CollectiveError as error:
        assert time.monotonic() - started < seconds(10)
        raise SystemExit(str(error)) from error
    raise AssertionError("it clipped without its peer")


def test_a_rank_that_is_killed_ends_the_others():
    survivor, victim = outcomes_of(killed, 2, group_timeout=seconds(10))
    assert victim.exit_code == 9
    assert survivor.exit_code not in (0, None)
    assert "rank 0: a collective of gradient clipping over [0, 1] failed" in survivor.problem
    assert "no gradient was changed" in survivor.problem


def one_does_not_clip(rank):
    parameter = sharded(torch.ones(4))
    clipper = GradientClipper([parameter], 1.0)
    if rank == 1:
        time.sleep(seconds(6))
        return True
    with pytest.raises(CollectiveError, match="slower than the group's timeout"):
        clipper.clip()
    assert torch.equal(parameter.grad._local_tensor, torch.ones(2))
    raise SystemExit("told")


def test_a_rank_that_does_not_clip_is_waited_for_as_long_as_the_group_says():
    outcomes = outcomes_of(one_does_not_clip, 2, group_timeout=seconds(2))
    assert "told" in outcomes[0].problem
    assert outcomes[0].seconds < seconds(5)
