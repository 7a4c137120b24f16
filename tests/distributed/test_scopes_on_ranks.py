"""Policies by tensor and by unit where ranks hold parts: norms of weights, total norms, skips."""

import pytest
import torch
import torch.distributed as dist
from test_groups import line
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from documented_policies import documented
from every_policy import EVERY, SPIKING
from gradclip import (
    AGCClip,
    GradientClipper,
    GuardClip,
    NormClip,
    Schedule,
)
from gradclip.clipping.policies import Decision, Policy, PolicyState
from gradclip.config import NormOrder
from gradclip.errors import ArgumentValueError, StateError
from processes import together

UnitAGC = documented()["UnitAGC"]
SpikeSkip, UsualNorm = documented()["SpikeSkip"], documented()["UsualNorm"]

MODULES = {
    "linear": lambda: nn.Linear(6, 4),
    "conv": lambda: nn.Conv2d(4, 6, 3),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
}


def made(kind):
    """Return a module and its gradients, the same on every rank."""
    torch.manual_seed(1)
    module = MODULES[kind]()
    spread = [torch.logspace(-4, 1, p.numel()).view_as(p) for p in module.parameters()]
    return module, [torch.randn_like(each) * each for each in spread]


def sharded(module, gradients, dim):
    """Split every parameter along a dimension; a vector along its only one."""
    mesh = line(2)
    for (name, weight), gradient in zip(list(module.named_parameters()), gradients, strict=True):
        placement = [Shard(min(dim, weight.dim() - 1))]
        split = nn.Parameter(distribute_tensor(weight.detach(), mesh, placement))
        split.grad = distribute_tensor(gradient, mesh, placement)
        setattr(module, name, split)


def agc_on_ranks(rank, kind, dim):
    module, gradients = made(kind)
    for weight, gradient in zip(module.parameters(), gradients, strict=True):
        weight.grad = gradient.clone()
    GradientClipper(module, UnitAGC()).clip()
    expected = [weight.grad for weight in module.parameters()]
    module, gradients = made(kind)
    sharded(module, gradients, dim)
    result = GradientClipper(module, UnitAGC()).clip()
    for weight, truth, given in zip(module.parameters(), expected, gradients, strict=True):
        got = weight.grad.full_tensor()
        torch.testing.assert_close(got, truth, rtol=1e-6, atol=1e-12)
        assert not torch.equal(got, given)
    units_here = (kind == "transposed" and dim == 1) or (kind != "transposed" and dim == 0)
    return result.scope_names, units_here


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("kind", MODULES)
def test_units_are_bounded_by_their_weights_on_two_ranks(kind, dim):
    """As in one process, whether rows of a unit are split or units are."""
    (first, apart), (second, _) = together(agc_on_ranks, 2, kind, dim)
    module = MODULES[kind]()
    units = module.weight.shape[1 if kind == "transposed" else 0]
    names = [f"weight[{row}]" for row in range(units)]
    if apart:
        assert [*first[:-1], *second[:-1]] == names
    else:
        assert list(first[:-1]) == list(second[:-1]) == names


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.w, self.v = (nn.Parameter(torch.randn(4, 3, 6)) for _ in range(2))
        self.deconv = nn.ConvTranspose1d(4, 6, 3, groups=2)


def units_that_are_said(rank):
    mesh, policy = line(2), AGCClip(units={"w": 2, "v": "tensor", "deconv.weight": 1})

    def clipped(model, policy=policy):
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        GradientClipper(model, policy).clip()
        return [weight.grad for weight in model.parameters()]

    truth = clipped(Experts())
    for dim in range(3):
        model = Experts()
        for layer in (model, model.deconv):
            for name, weight in list(layer.named_parameters(recurse=False)):
                placed = [Shard(min(dim, weight.dim() - 1))]
                setattr(layer, name, nn.Parameter(distribute_tensor(weight.detach(), mesh, placed)))
        for ours, wanted in zip(clipped(model), truth, strict=True):
            torch.testing.assert_close(ours.full_tensor(), wanted, rtol=1e-6, atol=0)
    for units, said in (
        ({"w": 2, "v": 0}, r"transposed convolution of 2 groups.*units=.'deconv.weight': 1."),
        ({"x": 2, "*": 0}, "'x' of units matches no parameter on any of the ranks"),
        ({"w": 3, "*": 0}, "has no dimension 3"),
    ):
        with pytest.raises(ArgumentValueError, match=said):
            GradientClipper(model, AGCClip(units=units))


def test_units_that_a_policy_names_are_those_of_one_process():
    together(units_that_are_said, 2)


FALLING = Schedule(points=((0, 8.0), (3, 0.5)), shape="linear")
NORMS = [
    NormClip(max_norm=1.0, scope="tensor"),
    NormClip(max_norm=2.0, scope="tensor", skip_above=40.0),
    NormClip(max_norm=torch.inf, skip_above=40.0),
    NormClip(max_norm=FALLING, skip_above=40.0),
    NormClip(max_norm=FALLING, scope="tensor", skip_above=40.0),
    {"weight": NormClip(max_norm=2.0, skip_above=40.0), "*": GuardClip()},
]


def norm_clips(rank):
    """Make four steps alone and on two ranks; the third is far larger."""
    said = []
    for policy in NORMS:
        runs = []
        for split in (False, True):
            module, gradients = made("linear")
            if split:
                sharded(module, gradients, 0)
            clipper, run = GradientClipper(module, policy), []
            for size in (1.0, 0.5, 100.0, 1.0):
                for weight, gradient in zip(module.parameters(), gradients, strict=True):
                    placed = [Shard(0)]
                    weight.grad = (
                        distribute_tensor(gradient * size, line(2), placed)
                        if split
                        else gradient * size
                    )
                skipped = bool(clipper.clip().skipped)
                grads = [weight.grad for weight in module.parameters()]
                run.append((skipped, [g.full_tensor() if split else g for g in grads]))
            runs.append((run, clipper.state_dict()["committed_steps"]))
        (alone, made_alone), (ours, made_here) = runs
        assert made_here == made_alone
        for (skipped, grads), (wanted, truth) in zip(ours, alone, strict=True):
            assert skipped is wanted
            for got, expected in zip(grads, truth, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-12)
        said.append([skipped for skipped, _ in ours])
    return said


@pytest.mark.filterwarnings("ignore:.*skipped step")
def test_a_norm_clip_with_a_scope_a_second_limit_or_a_schedule_is_that_of_one_process():
    never, once = [False] * 4, [False, False, True, False]
    assert together(norm_clips, 2) == [[never, once, once, once, once, once]] * 2


class OfPattern(Policy):
    """Clips each tensor to a part of the norm of all of them, and remembers that norm."""

    scope: str = "tensor"
    clip_mode: str = "of_pattern"
    norm_type: NormOrder = 2.0

    @property
    def order(self):
        return self.norm_type

    def initial_state(self, scopes):
        return PolicyState(
            shared={
                "total": torch.zeros((), dtype=torch.float64),
                "elements": torch.zeros((), dtype=torch.int64) + scopes.sizes_S.sum(),
            }
        )

    def decide(self, seen, state):
        new = PolicyState(
            shared={"total": seen.total_norm, "elements": state.shared["elements"] * 1}
        )
        return Decision(seen.total_norm / 4, seen.total_norm / 4, new)


def totals(rank, p, dim):
    module, gradients = made("linear")
    sharded(module, gradients, dim)
    clipper = GradientClipper(module, OfPattern(norm_type=p))
    clipper.clip()
    shared = clipper.state_dict()["states"]["*"]["shared"]
    return float(shared["total"]), [w.grad.full_tensor().tolist() for w in module.parameters()]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, float("inf")])
def test_the_total_norm_is_that_of_all_ranks(p, dim):
    (first, grads), (second, others) = together(totals, 2, p, dim)
    assert first == second
    assert grads == others
    _, gradients = made("linear")
    truth = torch.cat([g.double().flatten() for g in gradients]).norm(p)
    assert first == pytest.approx(float(truth), rel=1e-7)
    for got, gradient in zip(grads, gradients, strict=True):
        norm = gradient.double().norm(p)
        expected = gradient * min(1.0, float(truth / 4 / norm))
        torch.testing.assert_close(torch.tensor(got), expected, rtol=1e-5, atol=0)


class ByLargest(UsualNorm):
    """Skips by the norm of a tensor, of which other ranks may see nothing."""

    clip_mode: str = "by_largest"

    def decide(self, seen, state):
        decision = super().decide(seen, state)
        largest = seen.norms_S.amax() if len(seen.norms_S) else seen.total_norm * 0
        return Decision(decision.thresholds, decision.targets, decision.state, skip=largest > 1e6)


class ByTotal(UsualNorm):
    """Skips by the norm of all tensors on all ranks."""

    clip_mode: str = "by_total"

    def decide(self, seen, state):
        decision = super().decide(seen, state)
        skip = (seen.total_norm > 1e6) & (seen.step >= 0)
        return Decision(decision.thresholds, decision.targets, decision.state, skip=skip)


def stages(rank):
    """A parameter of its own on each rank, as the stages of a pipeline have."""
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0]) * (1 + rank)
    return [(f"stage{rank}.weight", weight)], {"*": dist.group.WORLD}


def skips(rank):
    pairs, groups = stages(rank)
    clipper = GradientClipper(pairs, ByLargest(), partitioned=groups)
    with pytest.raises(ArgumentValueError, match="which only some ranks see"):
        clipper.clip()
    assert pairs[0][1].grad.tolist() == [3.0 * (1 + rank), 4.0 * (1 + rank)]
    clipper = GradientClipper(pairs, ByTotal(), partitioned=groups)
    assert not clipper.clip().skipped
    if rank == 1:
        pairs[0][1].grad *= 1e7
    result = clipper.clip()
    assert bool(result.skipped)
    assert result.to_host().skip_reason == "policy"
    state = clipper.state_dict()
    assert (state["step"], state["committed_steps"]) == (2, 1)
    return state["states"]["*"]["scopes"], state["states"]["*"]["per_scope"]["mean"].tolist()


def test_a_skip_depends_on_what_all_ranks_know():
    """A rank saves the history of its own scopes."""
    assert together(skips, 2) == [
        ([["stage0.weight", 0, 1]], [5.0]),
        ([["stage1.weight", 0, 1]], [10.0]),
    ]


def damaged_on_one_rank(rank):
    pairs, groups = stages(rank)
    clipper = GradientClipper(pairs, UsualNorm(), partitioned=groups)
    clipper.clip()
    state = clipper.state_dict()
    if rank == 1:
        state["states"]["*"]["per_scope"] = {"mean": torch.zeros(3, dtype=torch.float64)}
    clipper.load_state_dict(state)
    with pytest.raises((StateError, RuntimeError), match="cannot be loaded"):
        clipper.clip()
    clipper.load_state_dict({**state, "states": {}})
    clipper.clip()


def test_a_history_that_fits_on_some_ranks_alone_is_refused_on_all():
    together(damaged_on_one_rank, 2)


def adaptive(rank):
    """Return the histories that each policy has on this rank, of shards and of a stage."""
    states = []
    for name in SPIKING:
        policy = EVERY[name]
        module, gradients = made("linear")
        whole = GradientClipper(module, policy)
        split, _ = made("linear")
        sharded(split, gradients, 0)
        parts = GradientClipper(split, policy)
        pairs, groups = stages(rank)
        stage = GradientClipper(pairs, policy, partitioned=groups)
        for step in range(9):
            # The second rank's stage has the spike: the first skips with it.
            factor = (1 + step % 3) * (1e3 if step == 7 else 1.0)
            for alone, part, gradient in zip(
                module.parameters(), split.parameters(), gradients, strict=True
            ):
                alone.grad = gradient * factor
                part.grad = distribute_tensor(gradient * factor, line(2), part.grad.placements)
            pairs[0][1].grad = torch.tensor([3.0, 4.0]) * (factor if rank else 1.0)
            expected, found, there = whole.clip(), parts.clip(), stage.clip()
            torch.testing.assert_close(
                found.coefficients_S, expected.coefficients_S, rtol=1e-6, atol=0
            )
            skips = step == 7 and policy.on_spike == "skip"
            assert bool(found.skipped) == bool(there.skipped) == skips, name
        state = parts.state_dict()["states"]["*"]
        common = stage.state_dict()["states"]["*"]["shared"]
        states += [state["per_scope"], common, state["shared"]]
    return states


def test_adaptive_policies_remember_the_same_on_all_ranks():
    first, second = together(adaptive, 2)
    for here, there in zip(first, second, strict=True):
        assert here.keys() == there.keys()
        assert all(torch.equal(here[name], there[name]) for name in here)
