"""One rank never raises, or decides, alone while others wait for it.

Every failure here is of one rank. The others hear of it at once, or at their next call.
"""

import time
import warnings

import pytest
import torch
import torch.distributed as dist
from given import fails, line, local, plain, sharded
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from gradclip import GradientClipper, NormClip
from gradclip.clipping import engine
from gradclip.clipping.ranks import rollcall
from gradclip.errors import ArgumentValueError, RankError, ReplicaError, UnsupportedGradientError
from patience import seconds
from processes import together


def on_ranks(function, ranks, *args):
    """Run it where a hang ends within seconds."""
    return together(function, ranks, *args, limit=seconds(40), group_timeout=seconds(30))


# before the first step


def argument(rank, what):
    """What is wrong with the arguments of rank 1 alone."""
    weight = ("weight", sharded(torch.ones(8), line(), Shard(0)))
    policy, names, partitioned = {"weight": 1.0, "*": 1.0}, [weight], None
    if what == "nothing matches" and rank == 0:
        names.append(("bias", sharded(torch.ones(8), line(), Shard(0))))
    elif what == "no pattern":
        policy = {"weight": 1.0, "bias": None}
        names.append(("other" if rank else "bias", plain(torch.ones(2))))
    elif what == "no number" and rank:
        policy = {"weight": 1.0, "*": float("nan")}
    elif what == "no group":
        partitioned = {"*": 7 if rank else dist.group.WORLD}
    return names, policy, partitioned


def bad_arguments(rank):
    said = {
        "nothing matches": "matches no parameter|disagree about the parameters",
        "no pattern": "no pattern of policy matches the parameter 'other'",
        "no number": "max_norm|not a number|nan",
        "no group": "is a int: expected a process group",
    }
    for what, words in said.items():
        names, policy, partitioned = argument(rank, what)
        error = (ValueError, TypeError)
        fails(lambda: GradientClipper(names, policy, partitioned=partitioned), error, words)  # noqa: B023
        # Whoever goes on finds everyone in step.
        weight = sharded(torch.ones(8), line(), Shard(0))
        assert bool(GradientClipper([weight], 1.0).clip().clipped)


def test_arguments_that_one_rank_alone_has_wrong():
    on_ranks(bad_arguments, 2)


def only_plain(rank):
    """A list that was filtered until rank 1 has nothing that ranks hold together."""
    rollcall._PATIENCE = 2.0
    both = [sharded(torch.ones(8), line(), Shard(0)), plain(torch.ones(2))]
    if rank == 1:
        clipper = GradientClipper(both[1:], 1.0)
        assert clipper.clip().norm_pre.item() == pytest.approx(2**0.5)
    else:
        words = "rank 1 clips parameters that it holds alone"
        fails(lambda: GradientClipper(both, 1.0), ArgumentValueError, words)
    dist.barrier()
    # A clipper that every rank has for itself is no sign of that, however late a rank is.
    GradientClipper(both[1:], 1.0)
    both[1].grad = torch.ones(2)
    if rank == 1:
        time.sleep(3.0)
    assert bool(GradientClipper(both, 1.0).clip().clipped)


def test_a_list_that_leaves_one_rank_with_plain_parameters():
    on_ranks(only_plain, 2)


def other_groups(rank):
    """A group that one stage alone declares, and a rank that goes on after it failed alone."""
    rollcall._PATIENCE = 2.0
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "tensor"))
    weight = ("weight", sharded(torch.ones(8), mesh["tensor"], Shard(0)))
    everyone = {"*": dist.group.WORLD}
    if rank < 2:
        GradientClipper([weight], 1e9)
    else:
        words = r"rank 0 clips over the process groups \[0, 1\], and"
        call = lambda: GradientClipper([weight], 1e9, partitioned=everyone)  # noqa: E731
        fails(call, ArgumentValueError, words)
    dist.barrier()
    if rank == 3:
        fails(lambda: GradientClipper([weight], -1.0), ArgumentValueError, "number >= 0")
    words = "rank . heard that" if rank == 3 else "could not begin on rank 3"
    call = lambda: GradientClipper([weight], 1e9, partitioned=everyone)  # noqa: E731
    fails(call, ArgumentValueError, words)
    dist.barrier()
    started = time.monotonic()
    if rank < 2:  # what one stage caught is no matter of the others
        call = lambda: GradientClipper([weight], {"head": 1.0, "*": 1.0})  # noqa: E731
        fails(call, ArgumentValueError, "matches no parameter")
    GradientClipper([weight], 1e9, partitioned=everyone)
    assert time.monotonic() - started < 2.0
    # A clipper of another kind is no sign of that, however late a rank is.
    if rank == 1:
        GradientClipper([plain(torch.ones(2))], 7.0)
        time.sleep(3.0)
    clipper = GradientClipper([weight], 1e9, partitioned=everyone)
    assert clipper.clip().norm_pre.item() == pytest.approx(4.0)
    store, seen = dist.distributed_c10d._get_default_store(), []
    for _ in range(4):
        GradientClipper([weight], 1e9, partitioned=everyone)
        dist.barrier()
        seen.append(store.num_keys())
        dist.barrier()
    assert seen[-1] == seen[-2], seen


def test_groups_that_other_ranks_do_not_come_to():
    on_ranks(other_groups, 4)


def chain(rank, what):
    """Groups of two neighbours each: what is said at one end has a long way to the other."""
    size = dist.get_world_size()
    links = [dist.new_group([n, n + 1]) for n in range(size - 1)]
    mine = [links[n] for n in (rank - 1, rank) if 0 <= n < size - 1]
    if rank % 2:
        mine.reverse()
    name = "weight" if what == "names" else f"weight.{rank}"
    weights = [(name, plain(torch.ones(4)))]
    if what == "names":  # ranks in the middle are all first and second of their groups
        call = lambda: GradientClipper(weights, 1.0, partitioned={"*": mine})  # noqa: E731
        fails(call, ArgumentValueError, r"connect the ranks \[1, 3\]")
    elif what == "nothing" and rank == 0:
        fails(lambda: GradientClipper([], 1.0), ArgumentValueError, "was given no parameters")
    elif what == "norm":
        clipper = GradientClipper(weights, 1e9, partitioned={"*": mine})
        got = clipper.clip().norm_pre.item()
        assert got == pytest.approx((4 * size) ** 0.5), (what, got)
    else:
        policy = NormClip(max_norm=1.0 + (rank == 0))
        call = lambda: GradientClipper(weights, policy, partitioned={"*": mine})  # noqa: E731
        words = "disagree" if what == "policies" else "rank 0 of . was given no parameters"
        fails(call, ArgumentValueError, words)


def chains(rank):
    for what in ("norm", "policies", "names", "nothing", "norm"):
        chain(rank, what)


def test_what_is_said_at_one_end_of_a_chain_of_groups():
    on_ranks(chains, 5)


def other_mapping(rank):
    """The same groups, named in another order by another rank."""
    rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    groups = {"*": rows[rank // 2], "w*": columns[rank % 2]}
    if rank in (0, 3):
        groups = dict(reversed(groups.items()))
    clipper = GradientClipper([("weight", plain(torch.ones(4)))], 1e9, partitioned=groups)
    return clipper.clip().norm_pre.item()


def test_groups_that_are_named_in_another_order():
    assert on_ranks(other_mapping, 4) == [4.0] * 4


def counts(rank):
    """Errors that were caught, and groups that were made anew, leave no rank out of step."""
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    weight = ("weight", plain(torch.ones(4)))
    for _ in range(1 + 2 * (rank // 2)):  # some ranks make more clippers than others
        GradientClipper([weight], 1.0, partitioned={"*": pair})
    for _ in range(2):
        given = [] if rank == 3 else [sharded(torch.ones(8), line(), Shard(0))]
        fails(lambda: GradientClipper(given, 1.0), ArgumentValueError, "rank 3 of 4 was given no")  # noqa: B023
    fails(lambda: GradientClipper([weight], -1.0), ArgumentValueError, "number >= 0")
    for number in range(2):
        clipper = GradientClipper([sharded(torch.ones(8), line(), Shard(0))], 1e9)
        assert clipper.clip().norm_pre.item() == pytest.approx(8**0.5)
        dist.barrier()
        store = dist.distributed_c10d._get_default_store()
        dist.destroy_process_group()
        store = dist.PrefixStore(f"again {number}", store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=4)


def test_counts_of_calls_survive_errors_and_new_groups():
    on_ranks(counts, 4)


# gradients that are placed otherwise on one rank


def misplaced(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    weight = sharded(torch.full((8,), 2.0), mesh, Replicate(), Shard(0))
    clipper = GradientClipper([("weight", weight)], 1e9)
    assert clipper.clip().norm_pre.item() == pytest.approx(32**0.5)
    for others in ("placed", "none"):
        weight.grad = DTensor.from_local(
            torch.full((4,), 3.0), mesh, [Replicate(), Shard(0)], run_check=False
        )
        if rank < 2:
            weight.grad = DTensor.from_local(
                torch.full((4,), 3.0), mesh, [Partial(), Shard(0)], run_check=False
            )
        elif others == "none":
            weight.grad = None
        assert clipper.clip().norm_pre.item() == pytest.approx(72**0.5), others
        assert local(weight).eq(3).all()
    # On another mesh, and in two ways at once.
    there = mesh["shard"] if rank == 1 else mesh
    where = [Shard(0)] if rank == 1 else [Replicate(), Shard(0)]
    weight.grad = DTensor.from_local(torch.full((4,), 3.0), there, where, run_check=False)
    error = UnsupportedGradientError if rank == 1 else RankError
    fails(clipper.clip, error, "cannot be brought")
    where = [Partial(), Shard(0)] if rank < 2 else [Replicate(), Replicate()]
    length = 4 if rank < 2 else 8
    weight.grad = DTensor.from_local(torch.full((length,), 3.0), mesh, where, run_check=False)
    fails(clipper.clip, ReplicaError, "on one rank, and on rank 2 as")
    assert weight.grad.placements == tuple(where)
    weight.grad = None


def test_placements_that_some_ranks_alone_have():
    on_ranks(misplaced, 4)


def replaced(rank, what):
    """Parameters are replaced on both ranks, and rank 1 cannot look again."""
    weight, bias = (sharded(torch.ones(8), line(), Shard(0)) for _ in range(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    clipper = GradientClipper(optimizer, 1e9)
    clipper.clip()
    optimizer.param_groups[0]["params"] = [plain(torch.ones(8)) if rank else bias]
    error = ArgumentValueError if what == "plain" else MemoryError
    fails(clipper.clip, (error, RankError, ArgumentValueError), "rank 1|no room")
    optimizer.param_groups[0]["params"] = [bias]
    assert clipper.clip().norm_pre.item() == pytest.approx(8**0.5)


def test_looking_again_fails_on_one_rank():
    on_ranks(replaced, 2, "plain")


# after ranks have agreed


def broken(*args, **kwargs):
    raise MemoryError("no room")


def fails_late(rank):
    weight = sharded(torch.full((8,), 2.0), line(), Shard(0))
    clipper = GradientClipper([weight], 0.1)
    clipper.clip()
    kept, state = engine.scaling, clipper.state_dict()
    for mend in ("nothing", "load"):
        if rank == 1:
            engine.scaling = broken
            fails(clipper.clip, MemoryError, "no room")
            engine.scaling = kept
        else:
            clipper.clip()
        if mend == "load":
            clipper.load_state_dict(state)
        else:
            fails(clipper.clip, RankError, "rank 1 .*step 1.*no room.*[Ll]oad")
        clipper.clip()


def test_an_error_after_the_agreement_is_told_at_the_next_call():
    on_ranks(fails_late, 2)


def strict(rank):
    """A warning that is an error on rank 1 alone, whether it comes before the sums or after."""
    for what in ("missing", "nan"):
        weights = [sharded(torch.ones(8), line(), Shard(0)) for _ in range(2)]
        if what == "missing" and rank == 0:
            weights[1].grad = None
        elif what == "nan":
            weights[1].grad._local_tensor[0] = float("nan")
        clipper = GradientClipper(weights, 1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error" if rank else "ignore")
            if rank:
                with pytest.raises(UserWarning):
                    clipper.clip()
            else:
                clipper.clip()
        fails(clipper.clip, RankError, "rank 1 .*UserWarning")
        assert clipper.clip() is not None


def test_a_warning_that_is_an_error_on_one_rank():
    on_ranks(strict, 2)


def equal_policies(rank):
    first, second = (
        GradientClipper([sharded(torch.full((8,), value), line(), Shard(0))], 1.0)
        for value in (3.0, 5.0)
    )
    for clipper in [first, second] if rank == 0 else [second, first]:
        fails(clipper.clip, ReplicaError, "do not clip the same step")
    assert bool(first.clip().clipped)


def test_two_clippers_of_equal_policies_in_another_order():
    on_ranks(equal_policies, 2)
