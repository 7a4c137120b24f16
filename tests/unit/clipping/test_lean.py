"""Small models on the CPU: the lean way agrees with the ordinary one, and leaves it what is odd."""

import copy
import pickle
import sys
import warnings
from dataclasses import asdict, replace
from math import inf, nan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradclip
from gradclip import GradientClipper, NormClip, ObserveClip, ValueClip
from gradclip.clipping import flags, functional
from gradclip.clipping.apply.coefficients import OneCoefficient
from gradclip.clipping.kernels import SpecsCache
from gradclip.clipping.short import ways
from gradclip.clipping.step import ownership
from gradclip.errors import DoubleClippingError

SHAPES = [(), (1,), (7,), (16, 3), (3, 4, 2), (128,), (128, 96)]
ODD = [None, nan, inf, -inf, 0.0, 1e-45, 6e-8, 60000.0, 3e38]


def was_lean(result):
    return isinstance(result.coefficients, OneCoefficient)


def made(gradients):
    parameters = [torch.nn.Parameter(torch.zeros_like(g.detach())) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return parameters


def warmed(parameters, clip):
    """Let the ordinary way see gradients of these kinds once."""
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    clip()
    for parameter, gradient in zip(parameters, kept, strict=True):
        parameter.grad = gradient


class Reader:
    """Keeps what each step came to."""

    def __init__(self):
        self.steps = []

    def add(self, numbers):
        self.steps.append(numbers._replace(step=None))


def clipped(gradients, policy, warm):
    parameters = made([gradient.clone() for gradient in gradients])
    parameters.append(torch.nn.Parameter(torch.zeros(3)))  # without a gradient
    clipper = GradientClipper(parameters, policy)
    if warm:
        warmed(parameters[:-1], clipper.clip)
    reader = Reader()
    clipper.step_log.follow(reader)
    result = clipper.clip()
    assert clipper.last is result
    assert clipper.step == 1 + warm
    clipper.step_log.catch_up()
    return [p.grad for p in parameters[:-1]], result, reader.steps, clipper.state_dict()


def policy_of(order, bound):
    """Return a policy by norm; by value where there is no order."""
    if order is None:
        return ValueClip(clip_value=bound)
    if bound == inf:
        return ObserveClip(norm_type=order)
    return NormClip(max_norm=bound, norm_type=order)


def clipped_by_function(gradients, order, bound):
    parameters = made([gradient.clone() for gradient in gradients])

    def clip():
        if order is None:
            return gradclip.clip_grad_value_(parameters, bound)
        return gradclip.clip_grad_norm_(parameters, bound, order)

    warmed(parameters, clip)
    norm = clip()
    assert norm is None or (norm.dtype, norm.shape) == (torch.float32, ())
    return [parameter.grad for parameter in parameters], norm


def norm_of(gradient, order):
    return torch.linalg.vector_norm(gradient.double(), order or 2.0)


def equal(one, other):
    return all(
        a.dtype is b.dtype and a.tolist() == b.tolist() for a, b in zip(one, other, strict=True)
    )


@settings(derandomize=True, deadline=None, max_examples=120, database=None)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.lists(st.sampled_from(SHAPES), min_size=1, max_size=8),
    st.integers(0, 10**6),
    st.integers(-42, 30),
    st.sampled_from(ODD),
    st.sampled_from([1e-28, 0.3, 1 - 1e-7, 1.0, 1 + 1e-7, 3.0, inf]),
    st.sampled_from([2.0, inf, None]),
)
def test_both_ways_agree(dtype, shapes, seed, exponent, odd, fraction, order):
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(s, generator=generator).mul(2.0**exponent).to(dtype) for s in shapes]
    if odd is not None:
        gradients[-1].view(-1)[-1] = odd
    truth = float(torch.stack([norm_of(g, order) for g in gradients]).norm(order or 2.0))
    limit = truth * fraction if 0 < truth < inf else 1.0
    bound = inf if fraction == inf else limit
    policy = policy_of(order, bound)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a step that is skipped
        theirs, ordinary, their_steps, their_state = clipped(gradients, policy, warm=False)
        ours, lean, our_steps, our_state = clipped(gradients, policy, warm=True)
    assert not was_lean(ordinary)
    assert was_lean(lean) == (truth <= torch.finfo(torch.float32).max)
    if was_lean(lean):
        assert lean.measured_S.item() == pytest.approx(truth, rel=1e-13)
        assert lean.measured_S.item() == pytest.approx(ordinary.measured_S.item(), rel=2e-7)
        assert lean.thresholds == ordinary.thresholds
        assert (lean.clamped is None) == (ordinary.clamped is None) == (order is not None)
        # One way may find the norm beyond the limit that it is at, and the other one within.
        assert float(lean.coefficient) == pytest.approx(float(ordinary.coefficient), rel=1e-6)
        for name in ("dtype", "norm_type", "withheld", "by_policy", "deferred", "scope_names"):
            assert getattr(lean, name) == getattr(ordinary, name)
    same = torch.equal(lean.coefficients_S.float(), ordinary.coefficients_S.float())
    if same or not was_lean(lean):
        ours_again, again = lean.to_host(), ordinary.to_host()
        for name in ("norm_pre", "norm_post"):
            found, expected = getattr(ours_again, name), getattr(again, name)
            assert found == pytest.approx(expected, rel=2e-7, abs=0, nan_ok=True)
        for name in ("clipped", "skipped", "nonfinite", "threshold", "scope_names", "skip_reason"):
            assert getattr(ours_again, name) == getattr(again, name)
        assert str([s[2:] for s in our_steps]) == str([s[2:] for s in their_steps])  # NaN, too
        assert our_steps[0].norm == pytest.approx(their_steps[0].norm, rel=2e-7, nan_ok=True)
        assert all(
            torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
            for a, b in zip(ours, theirs, strict=True)
        )
    else:
        rounding = max(torch.finfo(dtype).eps, 2.0**-21)  # where one finds that it is at the limit
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=2 * rounding, atol=torch.finfo(dtype).tiny)
    assert our_state["consecutive_skips"] == their_state["consecutive_skips"]
    by_function, norm = clipped_by_function(gradients, order, bound)
    if was_lean(lean):
        assert norm is None or float(norm) == float(lean.norm_pre)
        assert equal(by_function, ours)


class Tagged(torch.Tensor):
    pass


def few(dtype=torch.float32):
    return [torch.full((4, 4), 1.0, dtype=dtype), torch.full((4,), 1.0, dtype=dtype)]


def interleaved():
    both = torch.ones(4, 2)
    return [both[:, 0], both[:, 1]]


def with_graph():
    first, second = few()
    return [first.requires_grad_(), second]


ORDINARY = {
    "a scale": (few, 1.0, {}, {"grad_scale": 2.0}),
    "scaling left to the caller": (few, 1.0, {}, {"defer_scaling": True}),
    "float64": (lambda: few(torch.float64), 1.0, {}, {}),
    "two dtypes": (lambda: [few()[0], few(torch.bfloat16)[1]], 1.0, {}, {}),
    "complex": (lambda: few(torch.complex64), 1.0, {}, {}),
    "sparse": (lambda: [few()[0], few()[1].to_sparse()], 1.0, {}, {}),
    "a type of its own": (lambda: [few()[0], few()[1].as_subclass(Tagged)], 1.0, {}, {}),
    "a graph": (with_graph, 1.0, {}, {}),
    "gaps": (interleaved, 1.0, {}, {}),
    "no element": (lambda: [*few(), torch.zeros(0)], 1.0, {}, {}),
    "a large tensor": (lambda: [torch.ones(2**15 + 1)], 1.0, {}, {}),
    "a large model": (lambda: [torch.ones(2**14) for _ in range(5)], 1.0, {}, {}),
    "many tensors": (lambda: [torch.ones(2) for _ in range(65)], 1.0, {}, {}),
    "a norm beyond float32": (lambda: [torch.full((4,), 3e38)], 1.0, {}, {}),
    "a tiny coefficient": (lambda: [torch.full((4,), 2.0**60)], 2.0**-45, {}, {}),
    "zero": (few, 0.0, {}, {}),
    "another norm": (few, NormClip(max_norm=0.5, norm_type=1.0), {}, {}),
    "a limit that skips": (few, NormClip(max_norm=1.0, skip_above=9.0), {}, {}),
    "patterns": (few, {"*": 1.0}, {}, {}),
    "another backend": (few, 1.0, {"backend": "reference"}, {}),
}  # fmt: skip


@pytest.mark.parametrize("reason", [*ORDINARY, "none"])
def test_what_is_unusual_takes_the_ordinary_way(reason):
    gradients, policy, options, keywords = ORDINARY.get(reason, (few, 1.0, {}, {}))
    parameters = made(gradients())
    named = [(f"p{n}", parameter) for n, parameter in enumerate(parameters)]
    clipper = GradientClipper(named, policy, **options)
    for again in range(3):
        fresh = gradients()
        for parameter, gradient in zip(parameters, fresh, strict=True):
            parameter.grad = gradient
        result = clipper.clip(**keywords)
        assert was_lean(result) == (reason == "none" and again > 0)
        assert all(g.grad_fn is None for g in fresh)
    assert bool(result.clipped)


@pytest.mark.parametrize("reason", ["none", "a parameter twice", "backend", "a host that waits"])
def test_what_is_unusual_for_the_function(reason, monkeypatch):
    monkeypatch.setattr(functional, "_KNOWN", SpecsCache())
    ordinary, taken = functional._clip_once, []

    def counted(*arguments):
        taken.append(ordinary(*arguments))
        return taken[-1]

    monkeypatch.setattr(functional, "_clip_once", counted)
    parameters = made(few())
    if reason == "a parameter twice":
        parameters *= 2
    if reason == "backend":
        monkeypatch.setenv("GRADCLIP_BACKEND", "reference")
    if reason == "a host that waits":
        monkeypatch.setattr(flags, "host_waits_for", lambda device: True)
    for _ in range(2):
        for parameter, gradient in zip(parameters, few(), strict=False):
            parameter.grad = gradient
        assert float(gradclip.clip_grad_norm_(parameters, 1.0)) == pytest.approx(20**0.5)
    assert len(taken) == (1 if reason == "none" else 2)


def test_shared_bytes_are_refused_though_such_gradients_were_seen():
    parameters = made([torch.ones(4), torch.ones(4)])
    clipper = GradientClipper(parameters, 1.0)
    clipper.clip()
    memory = torch.ones(6)
    parameters[0].grad, parameters[1].grad = memory[:4], memory[2:]
    for clip in (clipper.clip, lambda: gradclip.clip_grad_norm_(parameters, 1.0)):
        with pytest.raises(gradclip.errors.OverlappingGradientsError):
            clip()
    assert memory.tolist() == [1.0] * 6
    parameters[1].grad = torch.ones(4)
    assert was_lean(clipper.clip())


def test_a_parameter_that_was_added_is_clipped():
    module = torch.nn.ParameterList(made(few()))
    clipper = GradientClipper(module, 1.0)
    clipper.clip()
    module.append(made([torch.full((2,), 100.0)])[0])
    assert not was_lean(clipper.clip())
    assert module[2].grad.max() < 1
    assert was_lean(clipper.clip())


def test_marks_of_both_ways_are_found_by_both():
    for by in ("function", "function by value", "object"):
        parameters = made(few())
        optimizer = torch.optim.SGD(parameters, lr=0.0)
        handle = gradclip.attach(optimizer, 1.0)
        optimizer.step()
        optimizer.step()  # its own marks do not stop it
        assert was_lean(handle.last)
        watch = GradientClipper(parameters, ObserveClip())
        warmed(parameters, watch.clip)
        assert was_lean(watch.clip())
        optimizer.step()  # what only measures leaves no marks
        clipper = GradientClipper(parameters, 0.5)
        warmed(parameters, clipper.clip)
        if by == "object":
            assert was_lean(clipper.clip())
        elif by == "function":
            gradclip.clip_grad_norm_(parameters, 0.5)
        else:
            warmed(parameters, lambda: gradclip.clip_grad_value_(parameters, 0.5))  # noqa: B023
            gradclip.clip_grad_value_(parameters, 0.5)
        with pytest.raises(DoubleClippingError):
            optimizer.step()
        handle.remove()


@pytest.mark.parametrize("bad", [nan, inf])
def test_a_number_that_is_none_is_seen_in_any_piece(bad):
    """The largest of norms with a NaN among them may be any of them."""
    parameters = made([torch.ones(2**14), torch.ones(2**14), torch.ones(4)])
    clipper = GradientClipper(parameters, NormClip(max_norm=1.0, norm_type=inf))
    warmed(parameters, clipper.clip)
    assert was_lean(clipper.clip())
    parameters[1].grad[-1] = bad
    assert clipper.clip().skipped


def test_a_sound_step_ends_a_row_of_skips():
    parameters = made(few())
    clipper = GradientClipper(parameters, 100.0, max_consecutive_skips=1)
    clipper.clip()
    for number in range(6):
        parameters[0].grad = few()[0]
        if number % 2 == 0:
            parameters[0].grad[0, 0] = nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert was_lean(clipper.clip()) == bool(number % 2)
    assert clipper.stats.skipped == 3
    assert clipper.stats.steps == 7


def test_a_captured_step_computes_what_it_reports(monkeypatch):
    clipper = GradientClipper(made(few()), 1.0)
    clipper.clip()
    monkeypatch.setattr(ways, "is_capturing", lambda device: True)
    result = clipper.clip()
    assert was_lean(result)
    assert "norm_post" in vars(result)


def test_the_tensor_of_a_norm_is_made_when_it_is_asked_for():
    clipper = GradientClipper(made(few()), 1.0)
    clipper.clip()
    result = clipper.clip()
    clipper.stats  # noqa: B018 - reads the numbers of all steps
    assert "measured_S" not in vars(result)
    assert asdict(result)["groups"] == {}
    for each in (
        result,
        copy.deepcopy(result),
        pickle.loads(pickle.dumps(result)),
        replace(result),
    ):
        assert each.measured_S.tolist() == pytest.approx([1.0], rel=1e-6)
        assert each.to_host() == result.to_host()


def calls(function):
    """Return how many functions of Python a call makes."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("tensors", [4, 60])
def test_calls_of_python_do_not_grow(tensors, monkeypatch):
    monkeypatch.setattr(ownership, "_MARKING", [])  # marks of other tests are looked at
    parameters = made([torch.ones(4) for _ in range(tensors)])
    clipper = GradientClipper(parameters, 1.0)
    optimizer = torch.optim.SGD(made([torch.ones(4) for _ in range(tensors)]), lr=0.0)
    plain = torch.optim.SGD(made([torch.ones(4) for _ in range(tensors)]), lr=0.0)
    gradclip.attach(optimizer, 1.0)
    for _ in range(3):
        optimizer.step()
        plain.step()
    assert calls(optimizer.step) - calls(plain.step) <= 51
    for _ in range(3):
        gradclip.clip_grad_norm_(parameters, 1.0)
        clipper.clip()
    for parameter in parameters:
        parameter.grad = torch.ones(4)
    assert calls(lambda: gradclip.clip_grad_norm_(parameters, 1.0)) <= 80
    for parameter in parameters:
        parameter.grad = torch.ones(4)
    assert calls(clipper.clip) <= 41
