"""What ``NormClip`` has beside its limit: a scope, a limit above which it skips, a schedule."""

from math import inf

import pytest
import torch
from torch import nn

from gradclip import GradientClipper, GuardClip, NormClip, Schedule, attach
from gradclip.clipping.apply.coefficients import OneCoefficient


def parameter(*values):
    weight = nn.Parameter(torch.zeros(len(values)))
    weight.grad = torch.tensor(values)
    return weight


def test_each_tensor_has_a_norm_of_its_own():
    weights = [parameter(3.0, 4.0), parameter(0.3, 0.4)]
    result = GradientClipper(weights, NormClip(max_norm=1.0, scope="tensor")).clip()
    torch.testing.assert_close(weights[0].grad, torch.tensor([0.6, 0.8]))
    assert torch.equal(weights[1].grad, torch.tensor([0.3, 0.4]))
    assert result.norms_S.tolist() == pytest.approx([5.0, 0.5])


SKIPPING = {
    "norm": NormClip(max_norm=1.0, skip_above=50.0),
    "tensors": NormClip(max_norm=1.0, scope="tensor", skip_above=50.0),
    "never scales": NormClip(max_norm=inf, skip_above=50.0),
    "schedule": NormClip(
        max_norm=Schedule(points=((0, 2.0), (8, 0.5)), shape="linear"), skip_above=50.0
    ),
    "one pattern": {"w0": NormClip(max_norm=1.0, skip_above=50.0), "*": GuardClip()},
}
OPTIMIZERS = {
    "fused": lambda named: torch.optim.AdamW(named, lr=0.1, fused=True),
    "plain": lambda named: torch.optim.SGD(named, lr=0.1, momentum=0.9),
}


def trained(kind, policy, sizes):
    """Make a step with gradients of each size; return all numbers that there are afterwards."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]
    optimizer = OPTIMIZERS[kind]([(f"w{n}", weight) for n, weight in enumerate(weights)])
    handle = attach(optimizer, policy)
    for size in sizes:
        for weight in weights:
            weight.grad = torch.full_like(weight, size)
        optimizer.step()
    state = handle.clipper.state_dict()
    numbers = [weight.detach() for weight in weights]
    for each in optimizer.state.values():
        numbers += [value for value in each.values() if isinstance(value, torch.Tensor)]
    return numbers, state["committed_steps"], handle.stats.skipped


@pytest.mark.filterwarnings("ignore:.*skipped step")
@pytest.mark.parametrize("reading", ["read", "unread"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("policy", SKIPPING.values(), ids=SKIPPING)
def test_a_step_above_the_second_limit_leaves_no_trace(policy, kind, reading, request):
    """Whatever a limit does below it, the norm of all gradients decides."""
    if reading == "unread":
        request.getfixturevalue("unread")
    spiked, made, skips = trained(kind, policy, [1.0, 0.01, 100.0, 2.0, 100.0, 0.5])
    calm, expected, none = trained(kind, policy, [1.0, 0.01, 2.0, 0.5])
    assert all(map(torch.equal, spiked, calm))
    assert (made, skips) == (expected, 2)
    assert none == 0


def test_below_the_second_limit_it_answers_as_without_it():
    """The short way of a small model declines, and the ordinary one knows the same limit."""
    answers = []
    for policy in (NormClip(max_norm=1.0), NormClip(max_norm=1.0, skip_above=6.0)):
        weight = parameter(3.0, 4.0)
        clipper = GradientClipper([weight], policy)
        clipper.clip()
        weight.grad = torch.tensor([3.0, 4.0])
        answers.append((clipper.clip(), weight.grad))
    (lean, ours), (ordinary, theirs) = answers
    assert isinstance(lean.coefficients, OneCoefficient)
    assert not isinstance(ordinary.coefficients, OneCoefficient)
    assert torch.equal(ours, theirs)
    weight.grad = torch.tensor([6.0, 8.0])
    assert bool(clipper.clip().skipped)


class TestSchedules:
    POINTS = ((2, 8.0), (4, 0.1), (10, 4.0))

    @pytest.mark.parametrize(
        ("shape", "expected"),
        [
            ("constant", [8.0, 8.0, 8.0, 8.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 4.0, 4.0]),
            ("linear", [8.0, 8.0, 8.0, 4.05, 0.1, 0.75, 1.4, 2.05, 2.7, 3.35, 4.0, 4.0]),
        ],
    )
    def test_values_are_those_of_the_points(self, shape, expected):
        schedule = Schedule(points=self.POINTS, shape=shape)
        values = [schedule.at(torch.tensor(step)) for step in range(12)]
        assert all(each.dtype is torch.float64 for each in values)
        assert torch.stack(values).tolist() == pytest.approx(expected, rel=1e-14)
        for step, value in self.POINTS:
            assert float(values[step]) == value  # to the last bit

    def test_a_step_beyond_int64_is_refused_at_once(self):
        with pytest.raises(ValueError, match="less than 9223372036854775808"):
            Schedule(points=((0, 1.0), (2**63, 2.0)))

    def test_a_limit_follows_the_steps_that_were_made_and_a_saved_run_goes_on(self):
        policy = NormClip(max_norm=Schedule(points=((0, 4.0), (4, 2.0)), shape="linear"))
        weight = parameter(0.0, 0.0)
        clipper = GradientClipper([weight], policy)

        def clip(size=1.0):
            weight.grad = torch.tensor([30.0, 40.0]) * size
            return float(clipper.clip().threshold)

        with pytest.warns(UserWarning, match="skipped step 2"):
            assert [clip(1.0 if step != 2 else torch.nan) for step in range(4)] == [
                4.0,
                3.5,
                3.0,
                3.0,
            ]
        saved = clipper.state_dict()
        clipper = GradientClipper([weight], policy)
        clipper.load_state_dict(saved)
        assert [clip() for _ in range(3)] == [2.5, 2.0, 2.0]
        assert float(weight.grad.norm()) == pytest.approx(2.0)

    def test_one_that_never_limits_only_measures(self):
        assert not NormClip(max_norm=Schedule(points=((0, inf),))).writes
        assert NormClip(max_norm=Schedule(points=((0, inf), (5, 1.0)))).writes


class TestGuard:
    def test_a_nan_among_them_skips_the_step_and_they_are_never_scaled(self):
        """None, in its place, does not look at them."""
        weights = [parameter(3.0, 4.0), parameter(30.0, 40.0)]
        named = [("a", weights[0]), ("b", weights[1])]
        clipper = GradientClipper(named, {"a": 1.0, "b": GuardClip()})
        result = clipper.clip()
        assert torch.equal(weights[1].grad, torch.tensor([30.0, 40.0]))
        assert float(weights[0].grad.norm()) == pytest.approx(1.0)
        assert float(result.norm_pre) == pytest.approx(2525**0.5)
        for bad in (torch.nan, inf):
            weights[1].grad = torch.tensor([1.0, bad])
            result = clipper.clip()
            assert bool(result.skipped)
            assert not any(bool(weight.grad.any()) for weight in weights)

    def test_alone_it_guards_a_whole_model(self):
        weight = parameter(3.0, 4.0)
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        attach(optimizer, GuardClip())
        optimizer.step()
        before = weight.detach().clone()
        assert bool(before.any())
        weight.grad = torch.tensor([1.0, torch.nan])
        with pytest.warns(UserWarning, match="holds a NaN"):
            optimizer.step()
        assert torch.equal(weight, before)
