"""A policy that is assigned during a run, and lists of limits by ``param_group``."""

import math
from threading import Thread

import pytest
import torch
from torch.optim import SGD

import gradclip
from gradclip import (
    EMAClip,
    GradientClipper,
    NormClip,
    ObserveClip,
    QuantileClip,
    Schedule,
    ValueClip,
    ZScoreClip,
)
from gradclip.clipping.step import rows
from gradclip.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CaptureError,
    DoubleClippingError,
    StateError,
)


def weight(*gradient):
    parameter = torch.nn.Parameter(torch.zeros(len(gradient)))
    parameter.grad = torch.tensor(gradient)
    return parameter


def of_two_groups(**options):
    groups = [{"params": [weight(3.0, 4.0)]}, {"params": [weight(6.0, 8.0)]}]
    return SGD(groups, lr=1.0, **options)


def norms(optimizer):
    return [
        group["params"][0].grad.norm().item() if group["params"] else None
        for group in optimizer.param_groups
    ]


def again(optimizer):
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            parameter.grad = torch.tensor([3.0, 4.0]) * (1 + number)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_it_counts_from_the_next_step_on(backend):
    """Also on the short ways, which remember limits: of small models, and of a GPU."""
    if backend == "triton":
        pytest.importorskip("triton")
    parameter = weight(3.0, 4.0)
    clipper = GradientClipper([parameter], 2.0, backend=backend)
    told = []
    assigned = {3: 0.5, 5: ValueClip(clip_value=0.25), 7: NormClip(max_norm=1.0, skip_above=4.0)}
    for step in range(8):
        parameter.grad = torch.tensor([3.0, 4.0])
        if step in assigned:
            clipper.policy = assigned[step]
        result = clipper.clip()
        told.append((result.to_host().new_policy, result.one_threshold))
        wanted = [2.0] * 3 + [0.5] * 2 + [math.hypot(0.25, 0.25)] * 2 + [0.0]
        assert parameter.grad.norm().item() == pytest.approx(wanted[step])
        assert bool(result.skipped) is (step == 7)
    assert [step for step, (words, _) in enumerate(told) if words] == [3, 5, 7]
    assert "max_norm=0.5" in told[3][0]
    assert clipper.policy == NormClip(max_norm=1.0, skip_above=4.0)


def test_a_scale_that_a_fused_optimizer_divides_by_has_the_new_limit():
    parameter = weight(0.0, 0.0)
    optimizer = SGD([parameter], lr=1.0, fused=True)
    handle = gradclip.attach(optimizer, 2.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    moved = []
    for limit in (2.0, 0.5):
        handle.policy = limit
        before = parameter.detach().clone()
        scaler.scale((parameter * torch.tensor([3.0, 4.0])).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved.append((parameter - before).norm().item())
        assert handle.last.deferred
    assert moved == pytest.approx([2.0, 0.5], rel=1e-5)


ADAPTIVE = {
    "z": (ZScoreClip(warmup=3), ZScoreClip(warmup=3, z=0.5, cap=1.0)),
    "ratio": (EMAClip(warmup=3), EMAClip(warmup=3, ratio=1.5, cap=1.0)),
    "q": (QuantileClip(warmup=3), QuantileClip(warmup=3, q=0.5, cap=1.0)),
}


@pytest.mark.parametrize("case", ADAPTIVE)
def test_the_history_goes_on_where_the_kind_is_the_same(case):
    first, later = ADAPTIVE[case]
    pairs = [("a", weight(1.0, 0.0)), ("b", weight(2.0, 0.0))]
    clipper, other = (GradientClipper(pairs, policy) for policy in (first, later))
    for step in range(6):
        for name, parameter in pairs:
            parameter.grad = torch.tensor([1.0 + (name == "b") + 0.1 * step, 0.0])
        clipper.clip()
    state = clipper.state_dict()
    clipper.policy = later
    other.load_state_dict(state)
    assert str(clipper.state_dict()) == str(state)
    gradients = []
    for each in (clipper, other):
        for _, parameter in pairs:
            parameter.grad = torch.tensor([9.0, 0.0])
        each.clip()
        gradients.append([parameter.grad.tolist() for _, parameter in pairs])
    assert gradients[0] == gradients[1]
    assert str(clipper.state_dict()["states"]) == str(other.state_dict()["states"])


FALLING = NormClip(max_norm=Schedule(points=((0, 4.0), (2, 1.0), (3, 0.5))))


@pytest.mark.parametrize("resumed", [None, 2.0, FALLING])
def test_another_kind_begins_anew_and_a_schedule_knows_how_many_steps_were_made(resumed):
    """Also where the run was resumed between: the steps under a fixed limit are saved too."""
    parameter = weight(3.0, 4.0)
    clipper = GradientClipper([parameter], 2.0)
    for gradient in ([3.0, 4.0], [math.nan, 0.0], [3.0, 4.0]):
        parameter.grad = torch.tensor(gradient)
        clipper.clip()
    if resumed is not None:
        state = clipper.state_dict()
        clipper = GradientClipper([parameter], resumed)
        clipper.load_state_dict(state)
    clipper.policy = FALLING
    for limit in (1.0, 0.5):
        parameter.grad = torch.tensor([3.0, 4.0])
        clipper.clip()
        assert parameter.grad.norm().item() == pytest.approx(limit)
    for policy in (ZScoreClip(warmup=1), NormClip(max_norm=1.0), ZScoreClip(warmup=1)):
        clipper.policy = policy
        clipper.clip()
    assert clipper.state_dict()["states"]["*"]["per_scope"]["numbers"][:, 0].tolist() == [1]


def test_one_of_another_kind_is_assigned_before_its_state_is_loaded():
    parameter = weight(3.0, 4.0)
    clipper, resumed = (GradientClipper([parameter], 2.0) for _ in range(2))
    clipper.policy = ZScoreClip(warmup=1)
    clipper.clip()
    with pytest.raises(
        StateError, match=r"'.*', and the policy here is '.*assign it before loading"
    ):
        resumed.load_state_dict(clipper.state_dict())
    resumed.policy = ZScoreClip(warmup=1)
    resumed.load_state_dict(clipper.state_dict())
    assert str(resumed.state_dict()) == str(clipper.state_dict())


def test_another_thread_waits_for_the_call_that_runs(monkeypatch):
    parameter = weight(3.0, 4.0)
    clipper = GradientClipper([parameter], ZScoreClip(warmup=1))
    decide, threads = ZScoreClip.decide, []

    def assigning(policy, *seen):
        threads.append(Thread(target=setattr, args=(clipper, "policy", 2.0)))
        threads[0].start()
        threads[0].join(0.2)
        return decide(policy, *seen)

    monkeypatch.setattr(ZScoreClip, "decide", assigning)
    clipper.clip()  # an error if its history went meanwhile
    threads[0].join()
    clipper.clip()
    assert parameter.grad.norm().item() == pytest.approx(2.0)


REFUSED = {
    "norm_type": (1.0, NormClip(max_norm=1.0, norm_type=1.0), "norm_type of '\\*' is 2.0"),
    "scope": (1.0, NormClip(max_norm=1.0, scope="tensor"), "scope of '\\*' is 'group'"),
    "scope of another kind": (1.0, EMAClip(), "scope"),
    "window": (QuantileClip(), QuantileClip(window=5), "window"),
    "warmup": (ZScoreClip(), ZScoreClip(warmup=5), "warmup"),
    "start": (EMAClip(), EMAClip(start="smallest"), "start"),
    "patterns": (1.0, {"*": 1.0}, "is one for all, and would be a mapping"),
    "other patterns": (
        {"a": 1.0, "*": 2.0},
        {"b": 1.0, "*": 2.0},
        "is a mapping of .*a.*would be a mapping of .*b",
    ),
    "none": ({"a": 1.0, "*": 2.0}, {"a": None, "*": 2.0}, "'a' has NormClip.* would have None"),
    "a list": (1.0, [1.0], "would be a list"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_history_does_not_fit_asks_for_a_new_clipper(case):
    first, later, said = REFUSED[case]
    parameter, other = weight(3.0, 4.0), weight(3.0, 4.0)
    clipper = GradientClipper([("a", parameter), ("b", other)], first)
    clipper.clip()
    before = clipper.policy, str(clipper.state_dict())
    with pytest.raises(ArgumentValueError, match=f"(?s){said}.*before the first step"):
        clipper.policy = later
    assert before == (clipper.policy, str(clipper.state_dict()))


def test_bad_policies_and_attributes_that_would_change_nothing_are_refused():
    parameter = weight(3.0, 4.0)
    clipper = GradientClipper([parameter], 1.0)
    for bad, error in ((-1.0, ArgumentValueError), ("x", ArgumentTypeError), (None, TypeError)):
        with pytest.raises(error):
            clipper.policy = bad
    handle = gradclip.attach(SGD([parameter], lr=1.0), ObserveClip())
    for holder in (clipper, handle):
        for name in ("max_norm", "clip_value", "norm_type", "nonfinite", "backend"):
            with pytest.raises(ArgumentValueError, match=f"assign {name} would change nothing"):
                setattr(holder, name, 0.5)
            assert not hasattr(holder, name)
    with pytest.raises(TypeError):
        GradientClipper([("a", parameter)], {"*": 1.0}).policy["*"] = 2.0
    assert clipper.policy == NormClip(max_norm=1.0)


def test_a_captured_step_keeps_its_limit(monkeypatch):
    parameter = weight(3.0, 4.0)
    clipper = GradientClipper([parameter], 1.0, backend="reference")
    clipper.clip()
    clipper.policy = 2.0
    with monkeypatch.context() as patched:
        patched.setattr(rows, "is_capturing", lambda device: True)
        clipper.clip()
    with pytest.raises(CaptureError, match=r"policy=0\.5") as caught:
        clipper.policy = 0.5
    assert caught.value.code == "GC022"


def test_what_begins_to_clip_owns_the_optimizer_from_then_on():
    optimizer = SGD([weight(3.0, 4.0)], lr=1.0)
    first, second = (gradclip.attach(optimizer, ObserveClip()) for _ in range(2))
    first.policy = 1.0
    with pytest.raises(DoubleClippingError, match="already clipped"):
        second.policy = 1.0
    first.remove()
    with pytest.raises(DoubleClippingError, match="was removed"):
        first.policy = 2.0
    second.policy = 1.0
    optimizer.step()
    assert second.last.one_threshold == 1.0


# lists


def test_each_group_has_its_limit_without_names():
    optimizer = of_two_groups()
    handle = gradclip.attach(optimizer, [0.5, ValueClip(clip_value=2.0)])
    optimizer.step()
    assert norms(optimizer) == pytest.approx([0.5, math.hypot(2.0, 2.0)])
    groups = handle.last.to_host().groups
    assert {name: group.norm_pre for name, group in groups.items()} == {
        "group 0": 5.0,
        "group 1": 10.0,
    }
    handle.policy = [2.0, ValueClip(clip_value=1.0)]
    again(optimizer)
    optimizer.step()
    assert norms(optimizer) == pytest.approx([2.0, math.hypot(1.0, 1.0)])


def test_none_leaves_a_group_alone_and_an_empty_group_is_no_mistake():
    optimizer = of_two_groups()
    optimizer.add_param_group({"params": []})
    gradclip.attach(optimizer, [None, 1.0, 2.0])
    optimizer.step()
    assert norms(optimizer) == [5.0, pytest.approx(1.0), None]


@pytest.mark.parametrize("limits", [[1.0], [1.0, 2.0, 3.0]])
def test_a_list_has_an_entry_for_each_group(limits):
    with pytest.raises(ArgumentValueError, match=f"a list of {len(limits)}, and .* has 2 param_g"):
        gradclip.attach(of_two_groups(), limits)
    for bad, error in (([], ArgumentValueError), ([None, None], ArgumentValueError)):
        with pytest.raises(error):
            gradclip.attach(of_two_groups(), bad)
    for given in ([weight(1.0)], torch.nn.Linear(1, 1)):
        with pytest.raises(ArgumentTypeError, match="given no optimizer"):
            GradientClipper(given, limits)
    for function in (gradclip.clip_grad_norm_, gradclip.clip_grad_value_):
        with pytest.raises(ArgumentTypeError, match="each param_group, goes to what knows"):
            function([weight(1.0)], limits)


def test_a_group_that_is_added_needs_an_entry_before_the_next_clip():
    optimizer = of_two_groups()
    handle = gradclip.attach(optimizer, [0.5, ZScoreClip(warmup=1)])
    optimizer.step()
    history = handle.clipper.state_dict()["states"]["group 1"]["per_scope"]["numbers"][:, 0]
    optimizer.add_param_group({"params": [weight(9.0, 12.0)]})
    again(optimizer)
    weights = [group["params"][0].detach().clone() for group in optimizer.param_groups]
    with pytest.raises(ArgumentValueError, match="a list of 2, and the optimizer has 3"):
        optimizer.step()
    assert norms(optimizer) == [5.0, 10.0, 15.0]
    for group, before in zip(optimizer.param_groups, weights, strict=True):
        assert torch.equal(group["params"][0], before)
    handle.policy = [0.5, ZScoreClip(warmup=1), NormClip(max_norm=1.0, norm_type=math.inf)]
    optimizer.step()
    assert norms(optimizer)[0] == pytest.approx(0.5)
    assert optimizer.param_groups[2]["params"][0].grad.abs().max().item() == pytest.approx(1.0)
    counts = handle.clipper.state_dict()["states"]["group 1"]["per_scope"]["numbers"][:, 0]
    assert counts.tolist() == (history + 1).tolist()


def test_a_schedule_of_a_group_that_is_added_knows_how_many_steps_were_made():
    optimizer = SGD([weight(3.0, 4.0)], lr=1.0)
    handle = gradclip.attach(optimizer, [0.5])
    optimizer.step()
    optimizer.step()
    optimizer.add_param_group({"params": [weight(6.0, 8.0)]})
    handle.policy = [0.5, FALLING]
    optimizer.step()
    assert norms(optimizer)[1] == pytest.approx(1.0)


def test_a_history_stays_with_its_tensor_where_others_come_and_go():
    """Without names a parameter is a position, which moves when others are removed or added."""
    first, second, third = (weight(norm, 0.0) for norm in (1.0, 10.0, 100.0))
    optimizer = SGD([{"params": [first, second]}, {"params": [third]}], lr=0.0)
    handle = gradclip.attach(optimizer, [EMAClip(warmup=1), EMAClip(warmup=1)])
    optimizer.step()
    optimizer.step()

    def averages():
        states = handle.clipper.state_dict()["states"].values()
        return [state["per_scope"]["numbers"][:, 1].tolist() for state in states]

    before = averages()
    assert before == [[1.0, 10.0], [100.0]]
    groups = optimizer.param_groups
    added = weight(5.0, 0.0)
    for firsts, expected in (
        ([second], [10.0]),  # a position less: the third becomes the second
        ([added, second], [5.0, 10.0]),
        ([second, added], [10.0, 5.0]),
        ([second, weight(7.0, 0.0)], [10.0, 5.0]),  # in the place of one that is gone
    ):
        groups[0]["params"] = firsts
        optimizer.step()
        assert [list(map(round, each)) for each in averages()] == [expected, [100.0]]
