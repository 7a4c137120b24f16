"""NaN and infinity: skip, raise, propagate; and how many in a row."""

import itertools
import math

import pytest
import torch

import oracle
from gradclip import GradientClipper, NormClip, ObserveClip, ValueClip
from gradclip.errors import GradClipError, NonFiniteGradientError, TooManySkipsError
from pairwise import pairwise

INF, NAN = math.inf, math.nan
backends = pytest.mark.parametrize("backend", oracle.BACKENDS)
bad_values = pytest.mark.parametrize("bad", [INF, -INF, NAN])
any_bad = pairwise(
    dtype=[torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64],
    p=oracle.ORDERS,
    bad=[INF, -INF, NAN],
    backend=oracle.BACKENDS,
)


def poisoned(bad, dtype=torch.float32):
    """Two of five tensors hold a bad element; one of them is hidden in a long tensor."""
    long = oracle.randn(20_000, dtype=dtype)
    long[12_345] = bad
    ok = [oracle.randn(3, dtype=dtype), torch.ones(0, dtype=dtype), oracle.randn(2, 2, dtype=dtype)]
    return oracle.parameters(ok[0], long, ok[1], torch.tensor([1, bad, 2], dtype=dtype), ok[2])


@any_bad
def test_skip_zeroes_every_gradient(dtype, p, bad, backend):
    params = poisoned(bad, dtype)
    grads = oracle.gradients(params)
    policy = NormClip(max_norm=1.0, norm_type=p)
    result = GradientClipper(params, policy, backend=backend).clip()
    assert bool(result.skipped)
    assert int(result.nonfinite) == 2
    assert not math.isfinite(float(result.norm_pre))
    for p_, g in zip(params, grads, strict=True):
        assert p_.grad is g
        assert bool((g == 0).all())


@any_bad
def test_propagate_returns_the_norm_and_writes_nothing(dtype, p, bad, backend):
    params = poisoned(bad, dtype)
    before = oracle.look(params)
    policy = NormClip(max_norm=1.0, norm_type=p)
    result = GradientClipper(params, policy, nonfinite="propagate", backend=backend).clip()
    oracle.assert_untouched(params, before)
    assert not math.isfinite(float(result.norm_pre))
    assert int(result.nonfinite) == 2
    assert not bool(result.skipped)
    assert not bool(result.clipped)


def named(**values):
    return [(name, oracle.parameter(torch.tensor(v))) for name, v in values.items()]


@pytest.mark.smoke
@backends
def test_raise_tells_what_and_where_and_changes_nothing(backend):
    pairs = named(fine=[2.5, 0.0], spoiled=[1.0] * 7)
    clipper = GradientClipper(pairs, 100.0, nonfinite="raise", backend=backend)
    clipper.clip()
    pairs[0][1].grad = torch.tensor([37.25, 0.0])
    pairs[1][1].grad = torch.zeros(7)
    clipper.clip()
    pairs[1][1].grad = torch.tensor([NAN, 1.0, INF, NAN, -INF, INF, INF])
    params = [p for _, p in pairs]
    before = oracle.look(params)
    with pytest.raises(NonFiniteGradientError) as caught:
        clipper.clip()
    oracle.assert_untouched(params, before)
    assert isinstance(caught.value, RuntimeError)
    message = str(caught.value)
    first, rest = message.splitlines()[0], message.splitlines()[1:]
    assert "The total norm of order 2.0 for gradients" in first
    assert "is non-finite" in first
    (line,) = [row for row in rest if "spoiled" in row]
    assert "(7,)" in line
    assert "NaN: 2" in line
    assert "Inf: 4" in line
    assert "fine" not in "\n".join(rest).replace("finite", "")
    norms = message[message.index("last finite norms") :]
    assert norms.index(f"{math.sqrt(2.5**2 + 7):.2}") < norms.index("37.2")
    assert "1 of 2" in message


@backends
@bad_values
def test_raise_on_any_kind_of_bad_value(bad, backend):
    for policy in (1.0, NormClip(max_norm=1.0, norm_type=INF), NormClip(max_norm=0.0)):
        params = poisoned(bad)
        before = oracle.look(params)
        with pytest.raises(NonFiniteGradientError):
            GradientClipper(params, policy, nonfinite="raise", backend=backend).clip()
        oracle.assert_untouched(params, before)


@backends
@bad_values
def test_a_skipped_step_does_not_poison_the_weights(bad, backend):
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    before = [oracle.bits(p) for p in layer.parameters()]
    layer(torch.tensor([1.0, bad, 2.0])).sum().backward()
    result = GradientClipper(layer, 1.0, backend=backend).clip()
    optimizer.step()
    assert bool(result.skipped)
    assert [oracle.bits(p) for p in layer.parameters()] == before


@backends
def test_sparse_gradients_are_skipped_too(backend):
    values = torch.tensor([[1.0, 2.0], [NAN, 4.0], [5.0, 6.0]])
    grad = torch.sparse_coo_tensor(
        torch.tensor([[1, 3, 1]]), values, (5, 2), check_invariants=False
    )
    params = oracle.parameters(torch.ones(3), grad)
    result = GradientClipper(params, 1.0, backend=backend).clip()
    assert bool(result.skipped)
    assert int(result.nonfinite) == 1
    assert all(bool((g.to_dense() == 0).all()) for g in oracle.gradients(params))


@pytest.mark.smoke
@backends
def test_every_group_is_skipped_when_one_is_bad(backend):
    pairs = named(a=[NAN, 1.0], b=[3.0, 4.0])
    result = GradientClipper(pairs, {"a": 1.0, "b": 9.0}, backend=backend).clip()
    assert bool(result.skipped)
    assert [p.grad.tolist() for _, p in pairs] == [[0.0, 0.0], [0.0, 0.0]]


@pairwise(
    bad=[INF, -INF, NAN],
    policy=[INF, ObserveClip(), NormClip(max_norm=INF, norm_type=INF)],
    nonfinite=["skip", "propagate"],
    backend=oracle.BACKENDS,
)
def test_observing_never_writes(bad, policy, nonfinite, backend):
    params = poisoned(bad)
    before = oracle.look(params)
    result = GradientClipper(params, policy, nonfinite=nonfinite, backend=backend).clip()
    oracle.assert_untouched(params, before)
    assert int(result.nonfinite) == 2
    assert not bool(result.skipped)


@backends
def test_value_mode_clamps_infinities(backend):
    params = oracle.parameters(torch.tensor([INF, -INF, 0.25]), torch.tensor([7.0]))
    result = GradientClipper(params, ValueClip(clip_value=0.5), backend=backend).clip()
    assert not bool(result.skipped)
    assert bool(result.clipped)
    assert [g.tolist() for g in oracle.gradients(params)] == [[0.5, -0.5, 0.25], [0.5]]


@backends
def test_value_mode_with_nan(backend):
    policy = ValueClip(clip_value=0.5)
    params = oracle.parameters(torch.tensor([INF, NAN, 0.25]), torch.tensor([7.0]))
    before = oracle.look(params)
    with pytest.raises(NonFiniteGradientError):
        GradientClipper(params, policy, nonfinite="raise", backend=backend).clip()
    oracle.assert_untouched(params, before)
    result = GradientClipper(params, policy, backend=backend).clip()
    assert bool(result.skipped)
    assert int(result.nonfinite) >= 1
    assert [g.tolist() for g in oracle.gradients(params)] == [[0.0, 0.0, 0.0], [0.0]]


class Loop:
    """A clipper whose gradient is whatever the test says, step after step."""

    def __init__(self, **keywords):
        self.weight = oracle.parameter(torch.zeros(2))
        self.clipper = GradientClipper([("weight", self.weight)], 1.0, **keywords)

    def step(self, value, **keywords):
        self.weight.grad = torch.tensor([value, 1.0])
        return self.clipper.clip(**keywords)


def test_twenty_five_skips_in_a_row_are_tolerated():
    loop = Loop()
    for _ in range(25):
        assert bool(loop.step(NAN).skipped)
    with pytest.raises(TooManySkipsError, match="25") as caught:
        loop.step(NAN)
    assert isinstance(caught.value, RuntimeError)
    assert "weight" in str(caught.value)


def test_a_finite_step_resets_the_count():
    loop = Loop(max_consecutive_skips=3)
    for _ in range(4):
        for _ in range(3):
            loop.step(INF)
        assert not bool(loop.step(1.0).skipped)
    for _ in range(3):
        loop.step(INF)
    with pytest.raises(TooManySkipsError):
        loop.step(INF)


def test_expected_overflows_do_not_count():
    loop = Loop(max_consecutive_skips=2)
    for _ in range(9):
        assert bool(loop.step(INF, overflow_expected=True).skipped)
    loop.step(INF)
    loop.step(INF)
    with pytest.raises(TooManySkipsError):
        loop.step(INF)


def test_the_count_travels_in_the_state(tmp_path):
    loop = Loop(max_consecutive_skips=3)
    loop.step(1.0)
    loop.step(NAN)
    loop.step(NAN)
    torch.save(loop.clipper.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = Loop(max_consecutive_skips=3)
    resumed.clipper.load_state_dict(state)
    assert str(resumed.clipper.state_dict()) == str(loop.clipper.state_dict())
    resumed.step(NAN)
    with pytest.raises(TooManySkipsError):
        resumed.step(NAN)


@pytest.mark.parametrize(
    "wrong",
    [None, [], "state", 3, {}, {"something": 1},
     lambda s: s | {"more": 1}, lambda s: dict(list(s.items())[1:]),
     lambda s: dict.fromkeys(s, "x"), lambda s: dict.fromkeys(s, -1.5)],
)  # fmt: skip
def test_a_wrong_state_is_refused_before_anything_changes(wrong):
    loop = Loop(max_consecutive_skips=3)
    loop.step(NAN)
    before = str(loop.clipper.state_dict())
    with pytest.raises(GradClipError) as caught:
        loop.clipper.load_state_dict(wrong(loop.clipper.state_dict()) if callable(wrong) else wrong)
    assert isinstance(caught.value, (ValueError, TypeError))
    assert str(loop.clipper.state_dict()) == before


def test_a_state_with_one_damaged_value_is_refused_whole():
    loop = Loop(max_consecutive_skips=3)
    loop.step(NAN)
    good = loop.clipper.state_dict()
    loop.step(NAN)
    before = str(loop.clipper.state_dict())
    assert before != str(good)
    for key, junk in itertools.product(good, ("junk", None, object())):
        with pytest.raises(GradClipError):
            loop.clipper.load_state_dict(good | {key: junk})
        assert str(loop.clipper.state_dict()) == before, key
