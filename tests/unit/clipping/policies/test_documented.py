"""The policies of ``docs/how-to/own-policy.md``, one of each kind, from outside the package."""

import warnings
from math import inf
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from documented_policies import documented
from gradclip import (
    GradientClipper,
    GuardClip,
    NormClip,
    ObserveClip,
    ValueClip,
    attach,
)
from gradclip.clipping.policies import Decision, Measurement, Policy, PolicyState
from gradclip.errors import ArgumentTypeError, ArgumentValueError, StateError, TooManySkipsError

FallingLimit, SpikeSkip, TensorLimit, UnitAGC, UsualNorm = (
    documented()[name]
    for name in ("FallingLimit", "SpikeSkip", "TensorLimit", "UnitAGC", "UsualNorm")
)


def parameter(*values):
    weight = nn.Parameter(torch.zeros(len(values)))
    weight.grad = torch.tensor(values)
    return weight


def test_the_page_shows_one_of_each_kind():
    assert len(documented()) == 5


def test_without_history_each_tensor_has_its_limit():
    weights = [parameter(3.0, 4.0), parameter(0.3, 0.4)]
    result = GradientClipper(weights, TensorLimit(max_norm=1.0)).clip()
    torch.testing.assert_close(weights[0].grad, torch.tensor([0.6, 0.8]))
    assert weights[1].grad.tolist() == pytest.approx([0.3, 0.4])
    assert result.norms_S.tolist() == pytest.approx([5.0, 0.5])


class TestHistory:
    def heads(self):
        torch.manual_seed(0)
        return nn.ModuleDict({"trunk": nn.Linear(2, 2), "a": nn.Linear(2, 1), "b": nn.Linear(2, 1)})

    def fill(self, module, norms):
        """Give each tensor a gradient of a norm; None where its head is idle."""
        for name, weight in module.named_parameters():
            norm = norms[name.split(".")[0]]
            weight.grad = None
            if norm is not None:
                ones = torch.ones_like(weight)
                weight.grad = ones * norm / ones.norm()

    def test_two_heads_used_in_turn_have_a_history_each(self):
        """Head a is about 1, head b about 100: neither is measured by the history of the other."""
        module = self.heads()
        clipper = GradientClipper(module, UsualNorm())
        for step in range(20):
            a, b = (1.0, None) if step % 2 else (None, 100.0)
            self.fill(module, {"trunk": 10.0, "a": a, "b": b})
            result = clipper.clip()
            assert not result.clipped, step
            assert len(result.norms_S) == 6  # those of the idle head too
        state = clipper.state_dict()["states"]["*"]
        assert state["scopes"] == [[n, 0, 1] for n, _ in module.named_parameters()]
        expected = [10.0, 10.0, 1.0, 1.0, 100.0, 100.0]
        assert state["per_scope"]["mean"].tolist() == pytest.approx(expected)
        self.fill(module, {"trunk": 10.0, "a": 50.0, "b": None})
        assert float(clipper.clip().coefficient) == pytest.approx(2 / 50, rel=1e-5)

    def saved(self):
        module = self.heads()
        clipper = GradientClipper(module, UsualNorm())
        self.fill(module, {"trunk": 10.0, "a": 1.0, "b": 100.0})
        clipper.clip()
        return clipper.state_dict()

    def resumed(self, module, norms, expected):
        clipper = GradientClipper(module, UsualNorm())
        clipper.load_state_dict(self.saved())
        assert clipper.state_dict()["states"]["*"]["per_scope"]["mean"].shape == (6,)
        self.fill(module, norms)
        result = clipper.clip()
        names = [name.split(".")[0] for name in result.scope_names]
        thresholds = dict(zip(names, result.thresholds_S.tolist(), strict=True))
        assert thresholds == pytest.approx(expected)
        return clipper

    def test_a_reordered_model_finds_its_history(self):
        module = nn.ModuleDict(dict(reversed(list(self.heads().items()))))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.resumed(
                module,
                {"trunk": 1.0, "a": 1.0, "b": 1.0},
                {"trunk": 20.0, "a": 2.0, "b": 200.0},
            )

    def test_a_grown_model_says_what_is_new(self):
        module = self.heads()
        module["c"] = nn.Linear(2, 1)
        with pytest.warns(UserWarning, match=r"Dropped.*: none\. New.*: c\.weight, c\.bias\."):
            self.resumed(
                module,
                {"trunk": 1.0, "a": 1.0, "b": 1.0, "c": 1.0},
                {"trunk": 20.0, "a": 2.0, "b": 200.0, "c": torch.inf},
            )

    def test_a_shrunk_model_says_what_was_dropped(self):
        module = self.heads()
        del module["a"]
        with pytest.warns(UserWarning, match=r"Dropped.*: a\.weight, a\.bias\. New.*: none\."):
            clipper = self.resumed(module, {"trunk": 1.0, "b": 1.0}, {"trunk": 20.0, "b": 200.0})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            clipper.clip()  # it is said once

    def test_without_names_another_number_is_an_error(self):
        weights = [parameter(3.0), parameter(4.0)]
        clipper = GradientClipper(weights, UsualNorm())
        clipper.clip()
        again = GradientClipper(weights, UsualNorm())
        again.load_state_dict(clipper.state_dict())
        assert again.clip().thresholds_S.tolist() == pytest.approx([6.0, 8.0])
        other = GradientClipper([*weights, parameter(5.0)], UsualNorm())
        other.load_state_dict(clipper.state_dict())
        with pytest.raises(StateError, match="2 parameters without names, and there are 3"):
            other.clip()

    def test_parameters_that_are_added_during_a_run_keep_the_rest(self):
        first, second = parameter(3.0), parameter(4.0)
        optimizer = torch.optim.SGD([first], lr=0.1)
        clipper = GradientClipper(optimizer, UsualNorm())
        clipper.clip()
        optimizer.add_param_group({"params": [second]})
        assert clipper.clip().thresholds_S.tolist() == pytest.approx([6.0, torch.inf])

    def test_version_1_loads_where_it_holds_no_history(self):
        weight = parameter(3.0)
        old = {
            "version": 1,
            "step": 7,
            "consecutive_skips": 2,
            "clip_modes": {"*": "usual_norm"},
            "states": {"*": {}},
        }
        clipper = GradientClipper([weight], UsualNorm())
        clipper.load_state_dict(old)
        state = clipper.state_dict()
        assert (state["version"], state["step"], state["consecutive_skips"]) == (2, 7, 2)
        old["states"] = {"*": {"mean": torch.ones(1)}}
        with pytest.raises(StateError, match="version 1 and holds the history"):
            clipper.load_state_dict(old)


AGC_MODULES = {
    "linear": lambda: nn.Linear(5, 3),
    "conv": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
    "embedding": lambda: nn.Embedding(7, 4),
    "scalar": lambda: nn.LayerNorm(4),
}


def agc(weight, gradient, dim, factor=0.01, eps=1e-3):
    """The formula, in float64: Brock et al. 2021, equation 3."""
    weight, gradient = weight.double(), gradient.double()
    if weight.dim() > 1:
        weight, gradient = (each.movedim(dim, 0).flatten(1) for each in (weight, gradient))
    else:
        weight, gradient = weight[None], gradient[None]
    norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    limit = factor * torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp(min=eps)
    return torch.where(norms > limit, gradient * limit / norms, gradient)


@pytest.mark.parametrize("backend", ["foreach", "reference"])
@pytest.mark.parametrize("kind", AGC_MODULES)
def test_units_are_bounded_by_their_weights(kind, backend):
    torch.manual_seed(1)
    module = AGC_MODULES[kind]()
    given = {}
    for name, weight in module.named_parameters():
        weight.grad = torch.randn_like(weight) * torch.logspace(-4, 1, weight.numel()).view_as(
            weight
        )
        given[name] = weight.grad.clone()
    before = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    result = GradientClipper(module, UnitAGC(), backend=backend).clip()
    assert result.clipped
    for name, weight in module.named_parameters():
        dim = int(kind == "transposed" and name == "weight")
        expected = agc(before[name], given[name], dim)
        got = weight.grad
        got = got.movedim(dim, 0).flatten(1) if got.dim() > 1 else got[None]
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-12)
        assert torch.equal(weight, before[name])


def test_a_scale_is_that_of_gradients_and_not_of_weights():
    module = nn.Linear(4, 3)
    gradients = [torch.ones_like(weight) for weight in module.parameters()]
    results = []
    for scale in (None, 1024.0):
        for weight, gradient in zip(module.parameters(), gradients, strict=True):
            weight.grad = gradient * (scale or 1.0)
        results.append(GradientClipper(module, UnitAGC()).clip(scale))
    torch.testing.assert_close(results[0].coefficients_S, results[1].coefficients_S)


def test_units_of_sparse_gradients_are_refused():
    module = nn.Embedding(7, 4, sparse=True)
    module(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(TypeError, match="a norm for each unit needs a dense gradient"):
        GradientClipper(module, UnitAGC()).clip()


class Reads(TorchDispatchMode):
    """Counts how often a number is read from a tensor."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def everything(optimizer):
    """Every number that an optimizer holds, and its weights."""
    tensors = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    for state in optimizer.state.values():
        tensors += [value.clone() for value in state.values() if isinstance(value, torch.Tensor)]
    return tensors


@pytest.mark.parametrize("reading", ["read", "unread"])
@pytest.mark.parametrize("kind", ["fused", "plain"])
def test_a_skip_leaves_weights_moments_and_history_as_they_are(kind, reading, request):
    """A fused optimizer is told on the device; for any other one number is read."""
    if reading == "unread":
        request.getfixturevalue("unread")
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]
    named = [("w0", weights[0]), ("w1", weights[1])]
    if kind == "fused":
        optimizer = torch.optim.AdamW(named, lr=0.1, fused=True)
    else:
        optimizer = torch.optim.SGD(named, lr=0.1, momentum=0.9)
    handle = attach(optimizer, {"w0": SpikeSkip(max_norm=1.0, skip_above=50.0), "*": UsualNorm()})

    def step(norm):
        for weight in weights:
            weight.grad = torch.ones_like(weight) * norm
        with Reads() as reads:
            optimizer.step()
        return reads.count

    step(1.0)
    usual = step(1.0)
    before, history = everything(optimizer), handle.clipper.state_dict()["states"]
    spike = step(1e3)
    assert bool(handle.last.skipped)
    assert handle.last.to_host().skip_reason == "policy"
    assert all(map(torch.equal, everything(optimizer), before))
    after = handle.clipper.state_dict()
    assert torch.equal(after["states"]["*"]["per_scope"]["mean"], history["*"]["per_scope"]["mean"])
    assert (after["step"], after["committed_steps"]) == (3, 2)
    if reading == "unread":
        assert (usual, spike) == ((0, 0) if kind == "fused" else (1, 1))
    step(1.0)
    assert not all(map(torch.equal, everything(optimizer), before))
    assert handle.clipper.state_dict()["committed_steps"] == 3


@pytest.mark.parametrize("nonfinite", ["skip", "raise", "propagate"])
def test_a_clipper_zeroes_what_its_policy_skips(nonfinite):
    weight = parameter(30.0, 40.0)
    clipper = GradientClipper(
        [weight], SpikeSkip(max_norm=1.0, skip_above=10.0), nonfinite=nonfinite
    )
    result = clipper.clip()
    assert bool(result.skipped)
    assert weight.grad.tolist() == [0.0, 0.0]
    assert (float(result.norm_pre), float(result.norm_post)) == (50.0, 0.0)


def test_skips_of_a_policy_are_counted():
    weight = parameter(0.0)
    clipper = GradientClipper(
        [weight], SpikeSkip(max_norm=1.0, skip_above=10.0), max_consecutive_skips=1
    )
    weight.grad = torch.tensor([20.0])
    # A loss scaler answers for overflows, and not for these.
    assert bool(clipper.clip(overflow_expected=True).skipped)
    weight.grad = torch.tensor([20.0])
    with pytest.raises(TooManySkipsError, match="The policy asked to skip step 1"):
        clipper.clip(overflow_expected=True)
    assert weight.grad.tolist() == [20.0]


def test_a_loss_scaler_answers_for_an_infinity_that_a_policy_would_skip():
    weight = parameter(inf)
    clipper = GradientClipper(
        [weight], SpikeSkip(max_norm=1.0, skip_above=10.0), max_consecutive_skips=0
    )
    assert bool(clipper.clip(overflow_expected=True).skipped)
    weight.grad = torch.tensor([inf])
    with pytest.raises(TooManySkipsError, match="Inf: 1"):
        clipper.clip()


class Captured:
    """A step whose operations are recorded, and made again on the same memory, as a CUDA graph."""

    def __init__(self, step):
        self.calls = []
        outer = self

        class Record(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                outer.calls.append((func, args, kwargs or {}, result))
                return result

        with Record():
            self.result = step()

    def replay(self):
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def test_a_schedule_advances_at_each_replay_of_a_captured_step(unread):
    weight = parameter(30.0, 40.0)
    clipper = GradientClipper([weight], FallingLimit(first=10.0, last=2.0, steps=4))
    assert float(clipper.clip().threshold) == 10.0  # before the capture, as torch asks

    def step():
        result = clipper.clip()
        result.compute()
        return result

    weight.grad.copy_(torch.tensor([30.0, 40.0]))
    captured = Captured(step)
    seen = [float(captured.result.threshold)]
    for number in range(4):
        weight.grad.copy_(torch.tensor([30.0, 40.0 if number != 1 else torch.nan]))
        captured.replay()
        seen.append(float(captured.result.threshold))
        assert bool(captured.result.skipped) is (number == 1)
    # The step that was skipped does not count.
    assert seen == [8.0, 6.0, 4.0, 4.0, 2.0]


POLICIES = [
    NormClip(max_norm=1.0),
    NormClip(max_norm=1.0, norm_type=3.0),
    NormClip(max_norm=0.0),
    NormClip(max_norm=torch.inf),
    NormClip(max_norm=1.0, scope="tensor"),
    NormClip(max_norm=1.0, skip_above=2.0),
    NormClip(max_norm=torch.inf, scope="tensor", skip_above=2.0),
    ValueClip(clip_value=0.5),
    ObserveClip(),
    GuardClip(),
]


@pytest.mark.parametrize("values", [(3.0, -4.0), (0.1, 0.2), (torch.nan, 1.0)])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_fixed_limit_says_what_decide_does(policy, values):
    """Both ways are one rule: the numbers, and the decision."""

    def clipped(fixed):
        class Either(type(policy)):
            clip_mode: str = "either"

            def fixed(self):
                return super().fixed() if fixed else None

        weight = parameter(*values)
        given = policy.model_dump(exclude={"clip_mode"})
        return GradientClipper([weight], Either(**given)).clip(), weight.grad

    (numbers, by_numbers), (asked, by_decision) = clipped(fixed=True), clipped(fixed=False)
    assert torch.allclose(by_numbers, by_decision, rtol=0, atol=0, equal_nan=True)
    assert str(numbers.to_host()) == str(asked.to_host())


def test_a_rule_of_its_own_is_not_that_of_its_parent():
    class Half(NormClip):
        clip_mode: str = "half"

        def decide(self, seen: Measurement, state: PolicyState) -> Decision:
            return Decision(self.max_norm / 2, self.max_norm / 2)

    weight = parameter(3.0, 4.0)
    assert float(GradientClipper([weight], Half(max_norm=1.0)).clip().norm_post) == pytest.approx(
        0.5
    )


def wrong_policy(answer):
    class Wrong(Policy):
        clip_mode: str = "wrong"

        def decide(self, seen, state):
            return answer(seen)

    return Wrong()


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda _: 1.0, ArgumentTypeError, "returned a float: expected a Decision"),
        (lambda _: Decision(torch.ones(3), 1.0), ArgumentValueError, r"shape \(3,\) for 1 scopes"),
        (lambda _: Decision(1.0, 1.0, skip="yes"), ArgumentTypeError, "returned skip='yes'"),
        (
            lambda seen: Decision(1.0, 1.0, PolicyState({"mean": seen.norms_S})),
            ArgumentValueError,
            r"per_scope has \[\], returned \['mean'\]",
        ),
    ],
)
def test_a_wrong_answer_is_refused_before_anything_changes(answer, error, message):
    weight = parameter(3.0, 4.0)
    with pytest.raises(error, match=message):
        GradientClipper([weight], wrong_policy(answer)).clip()
    assert weight.grad.tolist() == [3.0, 4.0]


def test_a_policy_may_swap_its_buffers():
    class Swap(Policy):
        clip_mode: str = "swap"

        def initial_state(self, scopes):
            return PolicyState(shared={"a": torch.tensor(1.0), "b": torch.tensor(2.0)})

        def decide(self, seen, state):
            a, b = state.shared["a"], state.shared["b"]
            return Decision(a, a, PolicyState(shared={"a": b, "b": a}))

    weight = parameter(3.0)
    clipper = GradientClipper([weight], Swap())
    assert [float(clipper.clip().threshold) for _ in range(3)] == [1.0, 2.0, 1.0]


class TestPoliciesThatErr:
    """What a policy does wrong harms neither its clipper nor another one."""

    def test_writing_into_what_it_is_told_changes_nothing(self):
        class Writing(Policy):
            clip_mode: str = "writing"

            def decide(self, seen, state):
                seen.committed.fill_(False)
                seen.norms_S.fill_(0.0)
                seen.total_norm.fill_(0.0)
                seen.step.fill_(9)
                return Decision(1.0, 1.0)

        weight = parameter(3.0, 4.0)
        clipper = GradientClipper([weight], Writing())
        assert float(clipper.clip().norm_pre) == 5.0
        assert clipper.state_dict()["committed_steps"] == 1
        other = parameter(30.0, 40.0)
        assert float(GradientClipper([other], 1.0).clip().norm_post) == pytest.approx(1.0)

    @pytest.mark.parametrize("skips", [False, True])
    def test_writing_into_its_history_is_as_good_as_returning_another(self, skips):
        class Counting(Policy):
            clip_mode: str = "counting"

            def initial_state(self, scopes):
                return PolicyState(shared={"n": torch.zeros((), dtype=torch.int64)})

            def decide(self, seen, state):
                state.shared["n"] += 1
                skip = torch.tensor(skips) & (state.shared["n"] == 2)
                return Decision(1.0, 1.0, state, skip=skip)

        weight = parameter(3.0, 4.0)
        clipper = GradientClipper([weight], Counting())
        for _ in range(3):
            clipper.clip()
        assert int(clipper.state_dict()["states"]["*"]["shared"]["n"]) == (1 if skips else 3)

    @pytest.mark.parametrize(
        "answer",
        [
            lambda: Decision(None, None),
            lambda: Decision("1", 1.0),
            lambda: Decision(1.0, torch.tensor(1.0, device="meta")),
            lambda: Decision(1.0, torch.tensor(1)),
            lambda: Decision(1.0, torch.nan),
            lambda: Decision(torch.tensor(torch.nan), 1.0),
            lambda: Decision(1.0, torch.tensor(-1.0)),
            lambda: Decision(1.0, 1.0, state=None),
        ],
    )
    def test_a_later_wrong_answer_changes_no_gradient_and_no_history(self, answer):
        class Later(UsualNorm):
            clip_mode: str = "later"

            def decide(self, seen, state):
                decision = super().decide(seen, state)
                return decision if int(seen.step) == 0 else answer()

        weights = [("a", parameter(3.0)), ("b", parameter(4.0))]
        clipper = GradientClipper(weights, {"a": 1.0, "b": Later()})
        clipper.clip()
        weights[0][1].grad = torch.tensor([3.0])
        before = clipper.state_dict()
        with pytest.raises(
            (ArgumentTypeError, ArgumentValueError), match=r"Later\.decide returned"
        ):
            clipper.clip()
        assert weights[0][1].grad.tolist() == [3.0]
        after = clipper.state_dict()
        assert after["committed_steps"] == before["committed_steps"] == 1
        assert str(after) == str(before)

    @pytest.mark.parametrize("initial", [None, {}, 1.0])
    def test_a_wrong_initial_state_is_refused(self, initial):
        class Wrong(UsualNorm):
            clip_mode: str = "wrong_initial"

            def initial_state(self, scopes):
                return initial

        with pytest.raises(ArgumentValueError, match="expected a PolicyState"):
            GradientClipper([parameter(1.0)], Wrong()).clip()

    @pytest.mark.parametrize(
        "values", [(0.5, torch.inf), (1.0, 50.0), (torch.tensor(0.5), torch.inf)]
    )
    @pytest.mark.parametrize("backend", ["foreach", "reference"])
    def test_a_target_above_the_norm_leaves_every_bit(self, values, backend):
        class Loose(Policy):
            clip_mode: str = "loose"

            def decide(self, seen, state):
                return Decision(*values)

        weight = parameter(3.0, 4.1)
        before = weight.grad.clone()
        result = GradientClipper([weight], Loose(), backend=backend).clip()
        assert not result.clipped
        assert torch.equal(weight.grad, before)

    def test_a_rule_of_a_mixin_is_not_that_of_the_limit_beside_it(self):
        class Half:
            def decide(self, seen, state):
                return Decision(0.5, 0.5)

        class Both(Half, NormClip):
            clip_mode: str = "both"

        weight = parameter(3.0, 4.0)
        result = GradientClipper([weight], Both(max_norm=1.0)).clip()
        assert float(result.norm_post) == pytest.approx(0.5)

    def test_what_only_measures_skips_nothing(self):
        class Asking(ObserveClip):
            clip_mode: str = "asking"

            def decide(self, seen, state):
                return Decision(torch.inf, torch.inf, skip=True)

        clipper = GradientClipper([parameter(1.0)], Asking(), max_consecutive_skips=0)
        for _ in range(3):
            assert not clipper.clip().skipped


class TestHistoriesThatAreLoaded:
    def run(self, pairs, state=None, policy=None):
        clipper = GradientClipper(pairs, policy or UsualNorm())
        if state is not None:
            clipper.load_state_dict(state)
        return clipper, clipper.clip()

    def test_parameters_of_one_name_keep_their_own(self):
        pairs = [("weight", parameter(3.0)), ("weight", parameter(40.0))]
        state = self.run(pairs)[0].state_dict()
        _, result = self.run(pairs, state)
        assert result.thresholds_S.tolist() == [6.0, 80.0]

    def test_one_that_does_not_fit_is_refused_once_and_the_old_one_stays(self):
        two, three = [parameter(3.0), parameter(4.0)], [parameter(1.0) for _ in range(3)]
        clipper, _ = self.run(two)
        before = str(clipper.state_dict()["states"])
        clipper.load_state_dict(self.run(three)[0].state_dict())
        with pytest.raises(StateError, match="No gradient and no history was changed"):
            clipper.clip()
        assert str(clipper.state_dict()["states"]) == before
        assert clipper.clip().thresholds_S.tolist() == [6.0, 8.0]

    def test_a_state_from_before_the_first_step_begins_anew(self):
        pairs = [("a", parameter(3.0))]
        fresh = GradientClipper(pairs, UsualNorm()).state_dict()
        clipper, _ = self.run(pairs)
        clipper.load_state_dict(fresh)
        assert clipper.clip().thresholds_S.tolist() == [torch.inf]

    def test_a_history_of_another_scope_is_refused(self):
        class Units(UsualNorm):
            scope: ClassVar[str] = "unit"

        pairs = [("a", parameter(3.0))]
        state = self.run(pairs)[0].state_dict()
        with pytest.raises(StateError, match="of scope 'tensor', and its policy has scope 'unit'"):
            self.run(pairs, state, Units())

    def test_units_are_found_by_their_number(self):
        """As where another number of ranks holds other rows."""

        class Units(UsualNorm):
            scope: ClassVar[str] = "unit"
            clip_mode: str = "units"

        weight = nn.Parameter(torch.zeros(5, 1))
        weight.grad = torch.arange(1.0, 6.0)[:, None]
        state = self.run([("p", weight)], policy=Units())[0].state_dict()
        history = state["states"]["*"]
        history["scopes"] = [["p", 2, 3]]
        history["per_scope"] = {"mean": history["per_scope"]["mean"][2:]}
        with pytest.warns(UserWarning, match="Dropped.*: none. New.*: p"):
            _, result = self.run([("p", weight)], state, Units())
        assert result.thresholds_S.tolist() == [torch.inf, torch.inf, 6.0, 8.0, 10.0]


def test_reasons_are_those_of_the_step():
    pairs = [("n", parameter(torch.nan)), ("m", parameter(1.0))]
    stats = GradientClipper(pairs, {"n": 1.0, "m": 1.0}).clip().to_host()
    assert stats.skip_reason == "nonfinite"
    assert {each.skip_reason for each in stats.groups.values()} == {"nonfinite"}
    pairs = [("n", parameter(torch.inf)), ("m", parameter(9.0))]
    policy = {"n": ObserveClip(), "m": SpikeSkip(max_norm=1.0, skip_above=5.0)}
    stats = GradientClipper(pairs, policy).clip().to_host()
    assert (stats.skip_reason, stats.groups["m"].skip_reason) == ("policy", "policy")
    assert stats.groups["n"].skip_reason is None


def test_looking_for_units_computes_no_parametrized_weight():
    module = nn.utils.parametrizations.spectral_norm(nn.ConvTranspose1d(3, 2, 3))
    module(torch.ones(1, 3, 5)).sum().backward()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    GradientClipper(module, UnitAGC()).clip()
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name])
