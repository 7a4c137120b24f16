"""What ranks tell each other follows from what all of them know; an error of one is everyone's.

Numbers are of public issues and pull requests that showed the like elsewhere.
"""

import math

import pytest
import torch
import torch.distributed as dist
from given import fails, line, local, plain, sharded
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import gradclip
from gradclip import GradientClipper, NormClip
from gradclip.clipping import functional
from gradclip.clipping.measure import exchange
from gradclip.clipping.policies import Decision
from gradclip.clipping.ranks.dimension import Dimension
from gradclip.clipping.ranks.pack import Pack
from gradclip.clipping.ranks.share import Share
from gradclip.errors import ArgumentValueError, RankError, ReplicaError
from processes import together

# lists that a rank has filtered


def lacking(rank, step):
    """Which of three parameters a rank has no gradient of, at a step."""
    return {(1, 0): {1}, (1, 1): {0, 2}, (0, 2): {0}, (1, 2): {1, 2}}.get((rank, step), set())


def filtered(rank, function):
    parameters = [sharded(torch.full((8,), 1.0), line(), Shard(0)) for _ in range(3)]
    if rank == 1:  # what one rank has seen before is no other's business
        for number in range(20):
            more = plain(torch.ones(number + 1))
            gradclip.clip_grad_norm_([more], 1.0)
    said = []
    for step in range(4):
        for number, parameter in enumerate(parameters):
            value = torch.full((8,), 1.0)
            parameter.grad = distribute_tensor(value, line(), [Shard(0)])
            if number in lacking(rank, step):
                parameter.grad = None
        given = [parameter for parameter in parameters if parameter.grad is not None]
        before = [local(parameter).clone() for parameter in given]
        found = function_of(function)(given).item()
        missing = sum(len(lacking(each, step)) for each in range(2))
        truth = math.sqrt(4 * (6 - missing))
        assert math.isclose(found, truth, rel_tol=1e-6), (step, found, truth)
        for parameter, value in zip(given, before, strict=True):
            torch.testing.assert_close(local(parameter), value / truth)
        said.append(found.hex())
    return said


def function_of(name):
    if name == "norm":
        return lambda given: gradclip.clip_grad_norm_(given, 1.0)

    def of_two(given):
        norm = gradclip.get_total_norm([each.grad for each in given])
        gradclip.clip_grads_with_norm_(given, 1.0, norm)
        return norm

    return of_two


@pytest.mark.filterwarnings("ignore:some ranks have no gradient")
@pytest.mark.parametrize("function", ["norm", "of two"])
def test_functions_on_lists_that_ranks_have_filtered(function):
    """``[p for p in params if p.grad is not None]`` differs by rank: torchtitan#1258."""
    first, second = together(filtered, 2, function)
    assert first == second


def other_lists(rank):
    """What cannot be right, all refuse, and change nothing."""
    weight = sharded(torch.full((8,), 1.0), line(), Shard(0))
    alike = [plain(torch.ones(3)), plain(torch.ones(4))]
    calls = {
        "another plain one": lambda: gradclip.clip_grad_norm_([weight, alike[rank]], 0.1),
        "fewer plain ones": lambda: gradclip.clip_grad_norm_([weight, *alike[rank:]], 0.1),
        "another limit": lambda: gradclip.clip_grad_norm_([weight], 0.1 + rank),
        "double": lambda: gradclip.clip_grad_norm_(
            [weight, sharded(torch.ones(4).to(kind(rank)), line(), Shard(0))], 0.1
        ),
    }
    for call in calls.values():
        fails(call, ReplicaError, "do not clip the same step")
        assert local(weight).eq(1).all()
        assert all(each.grad.eq(1).all() for each in alike)
    return gradclip.clip_grad_norm_([weight], 1.0).item()


def kind(rank):
    return torch.float64 if rank else torch.float32


def test_functions_that_are_given_something_else_on_each_rank():
    assert together(other_lists, 2) == [pytest.approx(math.sqrt(8))] * 2


def one_dimension_of_two(rank):
    """A list may lack all parameters that are split over one dimension of a mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    both = sharded(torch.full((4, 4), 1.0), mesh, Shard(0), Shard(1))
    one = sharded(torch.full((4,), 1.0), mesh, Shard(0), Replicate())
    given = [one] if rank == 1 else [both, one]
    return gradclip.clip_grad_norm_(given, 0.1).item()


@pytest.mark.filterwarnings("ignore:some ranks have no gradient")
def test_what_a_function_sends_follows_from_the_mesh():
    assert together(one_dimension_of_two, 4) == [pytest.approx(math.sqrt(12 + 4))] * 4


def summands(rank, same):
    mesh = line()
    weight = sharded(torch.full((8,), 1.0), mesh, Shard(0))
    norms = [sharded(torch.ones(3 + n), mesh, Replicate()) for n in range(2)]
    said = []
    for _ in range(2):
        for each in norms:
            value = torch.ones(each.shape)
            each.grad = DTensor.from_local(value, mesh, [Partial()], run_check=False)
        given = [weight, *norms] if same else [weight, norms[rank]]
        if not same:
            fails(lambda: gradclip.clip_grad_norm_(given, 9.0), ReplicaError, "were given 2 and 2")  # noqa: B023
            assert weight.grad.to_local().eq(1).all()
            continue
        said.append(gradclip.clip_grad_norm_(given, 9.0).item())
    return said


@pytest.mark.parametrize("same", [True, False])
def test_summands_in_lists(same):
    for said in together(summands, 2, same):
        assert said == [pytest.approx(math.sqrt(8 + 4 * 7))] * (2 if same else 0)


def counted_gathers(rank):
    """A rank that has warned before asks nobody again, whatever it was given since."""
    parameters = [sharded(torch.full((8,), 1.0), line(), Shard(0)) for _ in range(2)]
    if rank == 1:
        parameters[1].grad = None
    clipper = GradientClipper(parameters, 1.0)
    gathers = []
    gather = Dimension.gather
    Dimension.gather = lambda self, fact: gathers.append(1) or gather(self, fact)
    for _ in range(3):
        clipper.clip()
    return len(gathers)


@pytest.mark.filterwarnings("ignore:some ranks have no gradient")
def test_names_of_missing_gradients_are_asked_for_once():
    assert together(counted_gathers, 2) == [1, 1]


# what ranks stand at


def other_scale(rank):
    weight = sharded(torch.full((8,), 1e5), line(), Shard(0))
    clipper = GradientClipper([weight], 4.31583)
    for scale in (65535.98, torch.tensor(65535.98), torch.tensor([65535.98], dtype=torch.float64)):
        given = 65536.0 if rank == 0 else scale
        fails(lambda: clipper.clip(grad_scale=given), ReplicaError, "grad_scale 65536, .* 65535.98")  # noqa: B023
    return local(weight).tolist()


def test_scales_that_differ_in_the_seventh_digit():
    assert together(other_scale, 2) == [[1e5] * 4] * 2


def present(rank, which):
    weight = sharded(torch.ones(8), line(), Shard(0))
    parameters = [plain(torch.ones(2)) for _ in range(24)]
    for number, parameter in enumerate(parameters):
        if number not in which[rank]:
            parameter.grad = None
    clipper = GradientClipper([weight, *parameters], 0.1)
    fails(clipper.clip, ReplicaError, "some ranks have a gradient, and others have none")
    return local(weight).eq(1).all().item()


def test_gradients_that_exist_elsewhere_have_another_digest():
    """These two sets had one checksum of 16 bits."""
    which = (
        {0, 2, 5, 7, 9, 10, 11, 12, 15, 16, 21, 23},
        {0, 8, 9, 10, 11, 12, 14, 16, 17, 18, 19, 21},
    )
    assert together(present, 2, which) == [True] * 2


# an error of one rank


def broken(*args, **kwargs):
    raise MemoryError("no room")


def fails_inside(rank):
    value = torch.full((8,), 2.0)
    places = [
        (Share, "presence"),
        (Pack, "join"),
        (exchange, "_local"),
        (exchange, "reads_twice"),
    ]
    for where, name in places:
        for order in (2.0, math.inf, 3.0):
            if name == "reads_twice" and order != 3.0:
                continue
            weight, beside = sharded(value, line(), Shard(0)), plain(torch.full((2,), 2.0))
            clipper = GradientClipper([weight, beside], NormClip(max_norm=0.1, norm_type=order))
            kept = getattr(where, name)
            if rank == 1:
                setattr(where, name, broken)
            error = MemoryError if rank else RankError
            fails(clipper.clip, error, "no room" if rank else "rank 1 .* MemoryError: no room")
            assert local(weight).eq(2).all()
            assert beside.grad.eq(2).all()
            setattr(where, name, kept)
            # Whoever goes on finds everyone in step.
            assert bool(clipper.clip().clipped)


def test_an_error_while_packing_is_told_at_once():
    together(fails_inside, 2)


class Moody(NormClip):
    """A policy of a user, whose code fails on one rank."""

    clip_mode: str = "moody"

    def decide(self, seen, state):
        if dist.get_rank() == self.rank and self.fails:
            raise KeyError("a mood")
        return Decision(self.max_norm, self.max_norm)

    def fixed(self):
        return None

    rank: int = 1
    fails: bool = True


def decides_badly(rank):
    weight, beside = sharded(torch.full((8,), 2.0), line(), Shard(0)), plain(torch.full((2,), 2.0))
    clipper = GradientClipper([weight, beside], Moody(max_norm=0.1))
    for _ in range(2):
        fails(clipper.clip, KeyError if rank else RankError, "a mood")
        assert local(weight).eq(2).all()
        assert beside.grad.eq(2).all()
    good = GradientClipper([weight, beside], Moody(max_norm=0.1, fails=False))
    return good.clip().norm_pre.item()


def test_an_error_of_a_policy_is_told_at_once():
    assert together(decides_badly, 2) == [pytest.approx(math.sqrt(40))] * 2


# ranks that have nothing


def idle(rank, named):
    group = dist.new_group([0, 1])
    parameters = [("dense", plain(torch.full((4,), 1.0)))]
    if rank < 2:
        parameters.append((f"expert.{rank}", plain(torch.full((4,), 2.0 + rank))))
    partitioned = {"expert.*": group if rank < 2 else [None] if named else None}
    return GradientClipper(parameters, 1e9, partitioned=partitioned).clip().norm_pre.item()


@pytest.mark.parametrize("named", [False, True])
def test_a_rank_that_is_in_none_of_the_groups(named):
    first, second, third = together(idle, 3, named)
    assert first == second == pytest.approx(math.sqrt(4 + 16 + 36))
    assert third == 2.0


def misspelt(rank):
    group = dist.new_group([0, 1])
    with pytest.raises(ArgumentValueError, match="matches no parameter on any"):
        GradientClipper(
            [("expert", plain(torch.ones(2)))],
            1.0,
            partitioned={"*": group, "export": None if rank else group},
        )


def test_a_pattern_that_matches_nothing_in_any_group_is_refused():
    together(misspelt, 2)


def empty_list(rank, how):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")) if how == "square" else None
    placements = (Shard(0), Shard(0)) if mesh else (Shard(0),)
    weight = sharded(torch.full((8,), 1.0), mesh or line(), *placements)
    whole = GradientClipper([weight], 1e9)
    norms = [whole.clip().norm_pre.item()]
    for _ in range(2):
        if rank == 1:
            weight.grad = None
        kept = [each for each in [weight] if each.grad is not None]
        fails(lambda: make(how, kept), ArgumentValueError, "rank 1 of . was given no parameters")  # noqa: B023
        weight.grad = torch.ones_like(weight)
        norms.append(GradientClipper([weight], 1e9).clip().norm_pre.item())
    return norms


def make(how, kept):
    if how != "accelerate":
        return GradientClipper(kept, 1.0)
    from accelerate import Accelerator  # noqa: PLC0415

    from gradclip.integrations.accelerate import AcceleratorClipper  # noqa: PLC0415

    optimizer = torch.optim.SGD([{"params": kept}], lr=0.1)
    return AcceleratorClipper(Accelerator(cpu=True), optimizer, 1.0)


@pytest.mark.parametrize("how", ["line", "square", "accelerate"])
def test_an_empty_list_on_one_rank(how):
    said = together(empty_list, 4 if how == "square" else 2, how)
    assert said == [[pytest.approx(math.sqrt(8))] * 3] * len(said)


def empty_stage(rank):
    """A stage without weights says so, and takes part."""
    group = dist.group.WORLD
    weights = [] if rank else [("weight", plain(torch.ones(4)))]
    return GradientClipper(weights, 1e9, partitioned={"*": group}).clip().norm_pre.item()


def test_a_stage_without_weights():
    assert together(empty_stage, 2) == [2.0] * 2


def remembered(rank):
    """What one rank alone has seen changes nothing that ranks do together."""
    weight = sharded(torch.ones(8), line(), Shard(0))
    said = []
    for step in range(3):
        if rank == step % 2:
            functional._MET.clear()
        said.append(gradclip.clip_grad_norm_([weight], 1e9).item())
    return said


def test_a_memory_that_one_rank_has_lost():
    assert together(remembered, 2) == [[pytest.approx(math.sqrt(8))] * 3] * 2


def grows(rank, where):
    """An optimizer gets more parameters in the middle of training."""
    first, second = (sharded(torch.ones(8), line(), Shard(0)) for _ in range(2))
    optimizer = torch.optim.SGD([first], lr=0.1)
    clipper = GradientClipper(optimizer, 1e9)
    said = [clipper.clip().norm_pre.item()]
    if where == "everywhere" or rank == 1:
        optimizer.add_param_group({"params": [second]})
    if where == "everywhere":
        return [*said, clipper.clip().norm_pre.item(), clipper.clip().norm_pre.item()]
    for _ in range(2):
        fails(clipper.clip, ArgumentValueError, "disagree about the parameters")
        assert local(first).eq(1).all()
    if rank == 0:
        optimizer.add_param_group({"params": [second]})
    return [*said, clipper.clip().norm_pre.item(), clipper.clip().norm_pre.item()]


@pytest.mark.parametrize("where", ["everywhere", "on one rank"])
def test_parameters_that_are_added_are_told_first(where):
    truth = [pytest.approx(math.sqrt(8)), pytest.approx(4.0), pytest.approx(4.0)]
    assert together(grows, 2, where) == [truth] * 2


# clippers that are called in another order


def other_order(rank, policies):
    first, second = (
        GradientClipper([sharded(torch.full((8,), value), line(), Shard(0))], policy)
        for value, policy in zip((3.0, 5.0), policies, strict=True)
    )
    for clipper in [first, second] if rank == 0 else [second, first]:
        fails(clipper.clip, ReplicaError, "do not clip the same step")


@pytest.mark.parametrize("policies", [(1.0, 7.0), (1.0, NormClip(max_norm=1.0, norm_type=1.0))])
def test_two_clippers_in_another_order_are_told_apart(policies):
    """The sums of one would be added to those of the other."""
    together(other_order, 2, policies)
