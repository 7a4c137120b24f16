"""Groups that are no grid, ranks that differ, and gradients that change their placements."""

import math
import time
from typing import ClassVar, Literal

import pytest
import torch
import torch.distributed as dist
from given import plain, sharded
from test_shared_gradients import RowClip, TensorClip
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import oracle
from gradclip import GradientClipper, NormClip, clip_grad_norm_
from gradclip.clipping.policies import Decision, PolicyState
from gradclip.errors import (
    ArgumentValueError,
    NonFiniteGradientError,
    OverlappingGradientsError,
    RankError,
    ReplicaError,
)
from patience import seconds
from processes import together


def line(size):
    return init_device_mesh("cpu", (size,))


def square(*names):
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


def numbers(result):
    return result.norm_pre.item().hex(), result.coefficient.item().hex(), bool(result.skipped)


def norm_of(clipper):
    result = clipper.clip()
    return result.norm_pre.item(), numbers(result)


def alike(said, truth):
    assert all(each == said[0] for each in said)
    assert math.isclose(said[0][0], truth, rel_tol=1e-6)


# groups that are no grid


def experts_on_some_ranks(rank, what):
    """Dense parameters over all ranks, experts on two of them; the others are in no such group."""
    group = dist.new_group([0, 1])
    parameters = [("dense", sharded(torch.full((8,), 1.0), line(4), Shard(0)))]
    if rank < 2:
        expert = plain(torch.full((4,), 2.0 + rank))
        if what == "nan" and rank == 1:
            expert.grad[0] = math.nan
        parameters.append((f"experts.{rank}", expert))
    clipper = GradientClipper(
        parameters, 1.0, partitioned={"experts.*": group if rank < 2 else None}
    )
    return norm_of(clipper) if what == "norm" else numbers(clipper.clip())[2]


def test_experts_that_only_some_ranks_have():
    alike(together(experts_on_some_ranks, 4, "norm"), math.sqrt(8 + 4 * 4 + 4 * 9))
    assert together(experts_on_some_ranks, 4, "nan") == [True] * 4


def overlapping_groups(rank, how):
    """Sharded over pairs, and declared over all ranks, of which the pairs are a part."""
    mesh = square("stage", "shard")
    stage = mesh.get_local_rank("stage")
    value = torch.full((4,), 2.0 + stage)
    parameters = [(f"layers.{stage}", sharded(value, mesh["shard"], Shard(0)))]
    groups = dist.group.WORLD if how == "world" else [mesh["stage"].get_group(), dist.group.WORLD]
    return norm_of(GradientClipper(parameters, 1.0, partitioned={"*": groups}))


@pytest.mark.parametrize("how", ["world", "both"])
def test_declared_groups_that_overlap_count_nothing_twice(how):
    alike(together(overlapping_groups, 4, how), math.sqrt(4 * 4 + 4 * 9))


def one_sharded_stage(rank, what):
    """The stages of a pipeline, one of plain replicas and one that is sharded."""
    mesh = square("pp", "dp")
    if rank < 2:
        parameters = [("first", plain(torch.full((4,), 2.0)))]
    else:
        parameters = [("second", sharded(torch.full((4,), 3.0), mesh["dp"], Shard(0)))]
    clipper = GradientClipper(parameters, 1.0, partitioned={"*": mesh["pp"]})
    if what == "norm":
        return norm_of(clipper)
    if rank == 0:
        parameters[0][1].grad = torch.ones(1).expand(4)
    before = parameters[0][1].grad.clone()
    started = time.monotonic()
    with pytest.raises(OverlappingGradientsError if rank == 0 else RankError, match="itself"):
        clipper.clip()
    assert time.monotonic() - started < seconds(5)
    after = parameters[0][1].grad
    pair = [t.to_local() if isinstance(t, DTensor) else t for t in (before, after)]
    assert torch.equal(*pair)
    return "told"


def test_a_pipeline_of_which_one_stage_is_sharded():
    alike(together(one_sharded_stage, 4, "norm"), math.sqrt(4 * 4 + 4 * 9))
    assert together(one_sharded_stage, 4, "error") == ["told"] * 4


def on_sub_meshes(rank, how):
    """DTensors on meshes that some ranks are not in."""
    first = sharded(torch.full((4,), 3.0), DeviceMesh("cpu", [0, 1]), Shard(0))
    mesh = line(4) if how == "connected" else DeviceMesh("cpu", [2, 3])
    parameters = [("first", first), ("second", sharded(torch.full((4,), 1.0), mesh, Shard(0)))]
    if how == "apart":
        with pytest.raises(ArgumentValueError, match=r'partitioned=\{"\*": dist.group.WORLD\}'):
            GradientClipper(parameters, 1.0)
        return None
    declared = {"*": dist.group.WORLD} if how == "declared" else None
    return norm_of(GradientClipper(parameters, 1.0, partitioned=declared))


def test_meshes_that_some_ranks_are_not_in():
    alike(together(on_sub_meshes, 4, "connected"), math.sqrt(4 * 9 + 4))
    alike(together(on_sub_meshes, 4, "declared"), math.sqrt(4 * 9 + 4))
    together(on_sub_meshes, 4, "apart")


def chained(rank):
    """Ranks 0 and 1 are in one group, 1 and 2 in another; rank 3 is in none, and does not clip."""
    first, second = dist.new_group([0, 1]), dist.new_group([1, 2])
    if rank == 3:
        return None
    groups = [[first], [first, second], [second]][rank]
    parameters = [(f"stage{rank}", plain(torch.full((4,), 1.0 + rank)))]
    return [norm_of(GradientClipper(parameters, 1e9, partitioned={"*": groups})) for _ in range(2)]


def test_groups_that_overlap_on_a_part_of_the_world():
    """torch names a new group by how many groups a rank is in, which differs here: it hung."""
    *said, _ = together(chained, 4, limit=seconds(15.0), group_timeout=seconds(10.0))
    assert all(each == said[0] for each in said)
    for norm, _ in said[0]:
        assert math.isclose(norm, math.sqrt(4 * (1 + 4 + 9)), rel_tol=1e-6)


def renumbered(rank):
    """Meshes of the same ranks in another order: what is held alike here is not so elsewhere."""
    across, mesh = DeviceMesh("cpu", [[0, 1], [3, 2]]), square("a", "b")
    rows = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]
    turned = DeviceMesh("cpu", [[1, 3], [2, 0]])
    several = [
        [
            (across, Replicate(), Shard(0)),
            (rows[rank // 2], Shard(0)),
            (across, Shard(0), Shard(1)),
        ],
        [(mesh, Replicate(), Shard(0)), (turned, Replicate(), Shard(0)), (mesh["a"], Shard(1))],
    ]
    for placed in several:
        values = [torch.arange(16.0).view(4, 4) + 16 * number for number in range(3)]
        given = [sharded(v, *where) for v, where in zip(values, placed, strict=True)]
        for said in (GradientClipper(given, 1e9).clip().norm_pre, clip_grad_norm_(given, 1e9)):
            assert oracle.relative(said, oracle.norm(values)) < 1e-6, placed


def test_meshes_that_number_the_same_ranks_in_another_order():
    together(renumbered, 4)


def unequal_scopes(rank):
    """Stages are not compared; within one, two ranks have shards of other numbers of tensors."""
    mesh = square("pp", "tp")
    parameters = [
        (f"layers.{mesh.get_local_rank('pp')}.{n}", sharded(torch.ones(4), mesh["tp"], Shard(0)))
        for n in range(2 if rank == 3 else 1)
    ]
    with pytest.raises(ArgumentValueError, match="ranks 2 and 3 hold parts of the same"):
        GradientClipper(parameters, TensorClip(), partitioned={"*": mesh["pp"]})


def test_scopes_that_do_not_match_are_refused():
    """gloo ends the process when ranks reduce vectors of unequal lengths."""
    together(unequal_scopes, 4)


def rows_without_a_grid(rank):
    parameters = [("dense", sharded(torch.ones(4, 2), line(4), Shard(0)))]
    group = dist.new_group([0, 1])
    if rank < 2:
        parameters.append((f"experts.{rank}", plain(torch.ones(2, 2))))
    with pytest.raises(ArgumentValueError, match="are no grid"):
        GradientClipper(
            parameters,
            RowClip(max_norm=1.0),
            partitioned={"experts.*": group if rank < 2 else None},
        )


def test_rows_need_a_grid():
    together(rows_without_a_grid, 4)


# parameters that change after the clipper was made


def flattened_later(rank, source):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = GradientClipper(optimizer if source == "optimizer" else model, 1e9)
    for number in range(2):
        model[number] = FullyShardedDataParallel(
            model[number], device_id=torch.device("cpu"), use_orig_params=True
        )
    model(torch.full((3, 4), 1.0 + rank)).square().sum().backward()
    if source == "optimizer":
        with pytest.raises(ArgumentValueError, match="Give the module"):
            clipper.clip()
        return None
    said = norm_of(clipper)
    parts = [p.grad for p in model.parameters() if p.grad is not None and p.grad.numel()]
    own = torch.cat([part.flatten() for part in parts]).double().square().sum()
    dist.all_reduce(own)
    return said, own.sqrt().item()


def test_a_model_that_fsdp1_wraps_after_the_clipper_was_made():
    """The parameters stay the same objects: Lightning#19235."""
    said = together(flattened_later, 2, "module")
    alike([each for each, _ in said], said[0][1])
    together(flattened_later, 2, "optimizer")


# a norm for each tensor or row


def nan_in_another_scope(rank, policy, mode):
    mesh = line(2)
    first, second = (sharded(torch.full((4, 3), 2.0), mesh, Shard(0)) for _ in range(2))
    if rank == 1:
        second.grad._local_tensor[0, 0] = math.nan
    clipper = GradientClipper([("first", first), ("second", second)], policy, nonfinite=mode)
    if mode == "raise":
        with pytest.raises(NonFiniteGradientError, match="second"):
            clipper.clip()
        assert first.grad.to_local().eq(2).all()
        return
    assert bool(clipper.clip().skipped)
    assert first.grad.to_local().eq(0).all()
    return


@pytest.mark.parametrize("mode", ["skip", "raise"])
@pytest.mark.parametrize("policy", [RowClip(max_norm=1.0), TensorClip(max_norm=1.0)])
def test_a_nan_in_the_scope_of_another_rank_is_everyones(policy, mode):
    together(nan_in_another_scope, 2, policy, mode)


class CubicRowClip(RowClip):
    clip_mode: str = "cubic_row"

    @property
    def order(self):
        return 3.0


def cubic_rows(rank, rows):
    """Rows that are whole on their rank, none on the second where there is one row."""
    value = torch.full((rows, 3), 2.0)
    parameter = sharded(value, line(2), Shard(0))
    GradientClipper([parameter], CubicRowClip(max_norm=1.0)).clip()
    expected = value / torch.linalg.vector_norm(value, 3, dim=1, keepdim=True)
    assert torch.allclose(parameter.grad.full_tensor(), expected, rtol=1e-5)


@pytest.mark.parametrize("rows", [4, 1])
def test_rows_of_any_order_are_found_without_other_ranks(rows):
    together(cubic_rows, 2, rows)


# gradients of summands that come and go


def summand(value, mesh):
    return DTensor.from_local(value.clone(), mesh, [Partial()], run_check=False)


def comes_later(rank, how):
    mesh = line(2)
    weight = sharded(torch.ones(4, 3), mesh, Shard(0))
    norm = sharded(torch.ones(3), mesh, Replicate())
    norm.grad = None
    if how == "function":
        if rank == 0:
            norm.grad = summand(torch.ones(3), mesh)
        return clip_grad_norm_([weight, norm], 100.0).item(), math.sqrt(12 + 3)
    clipper = GradientClipper([("weight", weight), ("norm", norm)], 100.0)
    if how == "later":  # a layer that was frozen
        assert math.isclose(clipper.clip().norm_pre.item(), math.sqrt(12), rel_tol=1e-6)
    norm.grad = summand(torch.ones(3), mesh)
    found = clipper.clip().norm_pre.item()
    if how == "gone":
        norm.grad = None
        found = clipper.clip().norm_pre.item()
        assert norm.grad is None
        return found, math.sqrt(12)
    return found, math.sqrt(12 + 3 * 4)


@pytest.mark.parametrize("how", ["first", "later", "gone", "function"])
def test_summands_come_and_go(how):
    for found, truth in together(comes_later, 2, how):
        assert math.isclose(found, truth, rel_tol=1e-6)


def one_rank_differs(rank):
    """One rank has the sum already, the other nothing: no collective is missed."""
    mesh = line(2)
    weight = sharded(torch.ones(4, 3), mesh, Shard(0))
    norm = sharded(torch.ones(3), mesh, Replicate())
    clipper = GradientClipper([("weight", weight), ("norm", norm)], 100.0)
    norm.grad = summand(torch.ones(3), mesh)
    clipper.clip()
    norm.grad = sharded(torch.ones(3), mesh, Replicate()).grad if rank == 0 else None
    with pytest.raises(ReplicaError, match="rank 1 has none for norm"):
        clipper.clip()


@pytest.mark.smoke
def test_a_rank_that_has_the_sum_already():
    together(one_rank_differs, 2)


# ranks that are given different things


def bad_scale(rank):
    weight = sharded(torch.ones(4, 3), line(2), Shard(0))
    clipper = GradientClipper([weight], 1.0)
    started = time.monotonic()
    with pytest.raises(ArgumentValueError if rank else RankError, match="grad_scale=0"):
        clipper.clip(grad_scale=0.0 if rank else 2.0)
    with pytest.raises(ReplicaError, match=r"grad_scale 2, .* and rank 1 .* grad_scale 3"):
        clipper.clip(grad_scale=torch.tensor(2.0 + rank))
    assert time.monotonic() - started < seconds(5)
    assert weight.grad.to_local().eq(1).all()


def test_a_scale_that_is_wrong_or_another_on_one_rank():
    together(bad_scale, 2)


def bad_group(rank):
    group = dist.new_group([0])
    parameters = [("a", sharded(torch.ones(4), line(2), Shard(0))), ("e", plain(torch.ones(2)))]
    started = time.monotonic()
    with pytest.raises(ArgumentValueError, match="rank 1 is in none of its groups"):
        GradientClipper(parameters, 1.0, partitioned={"e": None if rank else group})
    assert time.monotonic() - started < seconds(5)


def test_arguments_that_are_wrong_on_one_rank_are_everyones():
    together(bad_group, 2)


def other_options(rank):
    weight = sharded(torch.ones(4, 3), line(2), Shard(0))
    with pytest.raises(ArgumentValueError, match=r"max_consecutive_skips=0.*_skips=1"):
        GradientClipper([weight], 1.0, max_consecutive_skips=rank)
    clipper = GradientClipper([weight], 1.0)
    if rank == 0:
        clipper.load_state_dict({**clipper.state_dict(), "consecutive_skips": 2})
    with pytest.raises(ReplicaError, match=r"2 skips in a row, .* and rank 1 .* 0 skips"):
        clipper.clip()


def test_options_and_states_that_differ_by_rank():
    together(other_options, 2)


def late_peer(rank):
    """A rank that fails while another does not come tells of both."""
    weight = sharded(torch.ones(4), line(2), Shard(0))
    clipper = GradientClipper([weight], 1.0)
    clipper.clip()
    if rank == 1:
        time.sleep(seconds(5))
        return None
    kept = weight.grad
    shared = torch.ones(1).expand(2)
    weight.grad = DTensor.from_local(shared, weight.device_mesh, [Shard(0)], run_check=False)
    with pytest.raises(Exception, match="a collective of gradient clipping") as caught:
        clipper.clip()
    assert isinstance(caught.value.__cause__, OverlappingGradientsError)
    weight.grad = kept
    return "told"


def test_an_error_is_not_lost_behind_that_of_a_collective():
    assert together(late_peer, 2, group_timeout=seconds(2))[0] == "told"


# what is compared for debugging


def permuted(rank):
    mesh = DeviceMesh("cpu", [[0, 3], [2, 1]])
    weight = sharded(torch.arange(6.0), mesh, Replicate(), Shard(0))
    return norm_of(GradientClipper([("weight", weight)], 1e9))


def test_copies_on_a_permuted_mesh_are_no_difference():
    alike(together(permuted, 4, env={"GRADCLIP_DEBUG": "1"}), math.sqrt(55))


def copies_differ(rank):
    parameters = [
        (f"layer{rank}", plain(torch.ones(3))),
        ("embed", plain(torch.full((2,), 5.0 + rank))),
    ]
    clipper = GradientClipper(
        parameters, 1e9, partitioned={"*": dist.group.WORLD}, duplicated={"embed": dist.group.WORLD}
    )
    with pytest.raises(ReplicaError, match="gradient of embed differs between ranks 0 and 1"):
        clipper.clip()


def test_tied_copies_that_differ_are_named():
    together(copies_differ, 2, env={"GRADCLIP_DEBUG": "1"})


def two_jobs(rank):
    """Halves of the world that train models of their own do not compare them."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    torch.manual_seed(rank // 2)
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2), process_group=halves[rank // 2])
    model(torch.full((2, 3), float(rank))).sum().backward()
    return norm_of(GradientClipper(model, 1e9))


def test_replicas_are_those_of_their_job():
    said = together(two_jobs, 4, env={"GRADCLIP_DEBUG": "1"})
    assert said[0] == said[1] != said[2] == said[3]


class Remembering(NormClip):
    """A policy with a history: the norms that it has seen, added up."""

    clip_mode: str = "remembering"

    def initial_state(self, scopes):
        zeros = torch.zeros(len(scopes.names), dtype=torch.float64, device=scopes.device)
        return PolicyState({"seen": zeros})

    def decide(self, seen, state):
        summed = PolicyState({"seen": state.per_scope["seen"] + seen.norms_S})
        return Decision(self.max_norm, self.max_norm, summed)


def histories_differ(rank):
    clipper = GradientClipper([("weight", plain(torch.ones(3)))], Remembering(max_norm=1e9))
    clipper.clip()
    clipper.clip()
    if rank == 1:
        state = clipper.state_dict()
        state["states"]["*"]["per_scope"]["seen"] += 1.0
        clipper.load_state_dict(state)
    with pytest.raises(ReplicaError, match=r"history of '\*', seen differs between ranks 0 and 1"):
        clipper.clip()


class RememberingRows(Remembering):
    scope: ClassVar[Literal["unit"]] = "unit"
    clip_mode: str = "remembering rows"


class RememberingTensors(Remembering):
    scope: ClassVar[Literal["tensor"]] = "tensor"
    clip_mode: str = "remembering tensors"


def histories_of_shards_differ(rank):
    """All ranks have the norm of a tensor, and ranks with parts of the same rows that of those."""
    mesh = square("rows", "columns")
    weight = sharded(torch.arange(16.0).view(4, 4), mesh, Shard(0), Shard(1))
    for policy, other in ((RememberingTensors, 0), (RememberingRows, 2)):
        clipper = GradientClipper([("weight", weight)], policy(max_norm=1e9))
        for _ in range(2):
            clipper.clip()
        if rank == 3:
            state = clipper.state_dict()
            state["states"]["*"]["per_scope"]["seen"] += 1.0
            clipper.load_state_dict(state)
        with pytest.raises(ReplicaError, match=f"weight, seen differs between ranks {other} and 3"):
            clipper.clip()


def test_histories_that_differ_are_named():
    together(histories_of_shards_differ, 4, env={"GRADCLIP_DEBUG": "1"})
    together(histories_differ, 2, env={"GRADCLIP_DEBUG": "1"})
