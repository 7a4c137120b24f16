"""What goes wrong elsewhere, one test a row; the docstring has what was measured or reported.

The measured rows are of ``torch.nn.utils.clip_grad_norm_`` in torch 2.13, with ``max_norm`` 1.
"""

import math
import warnings

import pytest
import torch
from pydantic import ValidationError

import oracle
from gradclip import (
    GradientClipper,
    NormClip,
    ObserveClip,
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)
from gradclip.errors import (
    ArgumentValueError,
    GradClipError,
    NonFiniteGradientError,
    OverlappingGradientsError,
)

backends = pytest.mark.parametrize("backend", oracle.BACKENDS)


def clip(params, max_norm, p=2.0, backend="auto", **keywords):
    policy = NormClip(max_norm=max_norm, norm_type=p)
    return GradientClipper(params, policy, backend=backend, **keywords).clip()


def grads(*values):
    return oracle.parameters(*(torch.tensor(v) for v in values))


def test_infinity_does_not_turn_the_other_gradients_into_zeros():
    """Row f: [3, inf], [4, 5] became [0, nan], [0, 0] without a warning. pytorch#46849."""
    params = grads([3.0, math.inf], [4.0, 5.0])
    before = oracle.look(params)
    assert float(clip_grad_norm_(params, 1.0)) == math.inf
    oracle.assert_untouched(params, before)


@backends
def test_finite_gradients_whose_squares_overflow(backend):
    """Row f': 100 x 1e20 has the norm 1e21; it was inf and everything became zero."""
    params = oracle.parameters(torch.full((100,), 1e20))
    result = clip(params, 1.0, 2.0, backend)
    assert oracle.relative(result.norm_pre, 1e21) <= 1e-6
    assert oracle.relative(oracle.assert_bounded(oracle.gradients(params), 1.0), 1.0) <= 2e-6


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_a_hundred_million_elements_in_one_tensor(p):
    """Row g: the norm came out 1.10 % low (L1 14.9 %), and clipping to 0.5 left 0.50465.

    pytorch#68326, pytorch#169237.
    """
    block = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0))
    params = oracle.parameters(block.repeat(100))
    truth = oracle.norm([block], p) * 100 ** (1 / p)
    assert oracle.relative(clip_grad_norm_(params, 0.5, p), truth) <= 1e-6
    after = params[0].grad[:1_000_000]
    assert (
        oracle.assert_bounded([after], 0.5 / 100 ** (1 / p), p) >= 0.5 / 100 ** (1 / p) * 0.999998
    )


@backends
def test_bfloat16_of_mixed_scale(backend):
    """Row g': 264.0 for 264.748. fairscale#1092, torchtitan PR#4135, pytorch PR#194033."""
    tensors = [oracle.randn(5000, seed=i, dtype=torch.bfloat16) * 1.01**i for i in range(400)]
    params = oracle.parameters(*tensors)
    truth = oracle.norm(tensors)
    assert oracle.relative(clip(params, 1.0, 2.0, backend).norm_pre, truth) <= 1e-6
    oracle.assert_bounded(oracle.gradients(params), 1.0)


@backends
def test_the_cut_does_not_change_the_norm(backend):
    """Row g": 1e6 numbers cut into 1 .. 10000 pieces: 1000.480 .. 1000.448."""
    numbers = oracle.randn(1_000_000)
    truth = oracle.norm([numbers])
    for pieces in (1, 2, 7, 100, 10_000):
        params = oracle.parameters(*numbers.tensor_split(pieces))
        norm = clip(params, math.inf, 2.0, backend).norm_pre
        assert oracle.relative(norm, truth) <= 1e-6, pieces


@backends
def test_float16_whose_norm_is_beyond_float16(backend):
    """Row h: 1000 x 3000 (94868) was inf; everything became zero, float32 neighbours too."""
    params = oracle.parameters(torch.full((1000,), 3000.0, dtype=torch.float16), torch.ones(4))
    result = clip(params, 1000.0, 2.0, backend)
    assert oracle.relative(result.norm_pre, math.sqrt(1000 * 3000.0**2 + 4)) <= 1e-6
    post = oracle.assert_bounded(oracle.gradients(params), 1000.0)
    assert post >= 1000.0 * (1 - 5e-4)
    assert params[1].grad.tolist() == [float(result.coefficient)] * 4


@backends
@pytest.mark.parametrize(
    ("value", "dtype", "max_norm"),
    [(1e25, torch.float32, 1.0), (1e-30, torch.float32, 1e-31), (1e200, torch.float64, 1.0)],
)
def test_large_and_small_numbers(value, dtype, max_norm, backend):
    """Row i: 1e25s became zeros, 1e-30s with max 1e-31 were scaled by 1e-25, 1e200s zeros."""
    params = oracle.parameters(torch.full((10,), value, dtype=dtype))
    truth = oracle.norm(oracle.gradients(params))
    assert oracle.relative(clip(params, max_norm, 2.0, backend).norm_pre, truth) <= 1e-6
    assert oracle.assert_bounded(oracle.gradients(params), max_norm) >= max_norm * (1 - 2e-6)


def test_a_tiny_norm_at_its_limit_is_not_halved():
    """Row i': with norm = max_norm = 1e-6 an epsilon of 1e-6 halved the gradient."""
    params = grads([1e-6, 0.0])
    before = oracle.look(params)
    clip_grad_norm_(params, 1e-6)
    oracle.assert_untouched(params, before)


@backends
def test_sparse_gradients_of_an_embedding(backend):
    """Row j: NotImplementedError. pytorch#4829."""
    embedding = torch.nn.Embedding(10, 3, sparse=True)
    (embedding(torch.tensor([1, 1, 7])).sum() * 2).backward()
    result = GradientClipper(embedding, 1.0, backend=backend).clip()
    assert oracle.relative(result.norm_pre, math.sqrt(3 * 4.0**2 + 3 * 2.0**2)) <= 1e-6
    oracle.assert_bounded([embedding.weight.grad], 1.0)
    torch.optim.SGD(embedding.parameters(), lr=0.1).step()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32])
def test_order_zero_is_an_error(dtype):
    """Row k: complex with p = 0 gave the number of tensors."""
    params = oracle.parameters(torch.ones(3, dtype=dtype), torch.ones(4, dtype=dtype))
    before = oracle.look(params)
    with pytest.raises(ArgumentValueError, match="norm_type"):
        clip_grad_norm_(params, 1.0, 0)
    oracle.assert_untouched(params, before)


def nothing_sparse():
    indices = torch.zeros(1, 0, dtype=torch.int64)
    return torch.sparse_coo_tensor(indices, torch.ones(0), (3,), check_invariants=False)


@backends
@pytest.mark.parametrize("p", [*oracle.ORDERS, 1.5])
def test_empty_tensors_contribute_nothing(p, backend):
    """Row l: an empty shard and p = inf raised. torchrec PR#3809, pytorch PR#94835."""
    params = oracle.parameters(torch.ones(0, 4), torch.tensor([3.0, 3.0]), torch.ones(0))
    assert oracle.relative(clip(params, 1.0, p, backend).norm_pre, 3 * 2 ** (1 / p)) <= 1e-6
    empty = oracle.parameters(torch.ones(0), torch.ones(1, 0).expand(3, 0), nothing_sparse())
    result = clip(empty, 1.0, p, backend)
    assert float(result.norm_pre) == 0.0
    assert not bool(result.clipped)
    assert float(clip_grad_norm_(empty, 1.0, p)) == 0.0


def test_no_gradients_give_a_typed_zero():
    """Row l': a float32 0.0 on the CPU, whatever the gradients are."""
    norm = clip_grad_norm_(oracle.parameters(torch.ones(0, dtype=torch.float64)), 1.0)
    assert (float(norm), norm.dtype, norm.ndim) == (0.0, torch.float64, 0)
    norm = clip_grad_norm_([], 1.0)
    assert (float(norm), norm.dtype, norm.ndim) == (0.0, torch.float32, 0)


@pytest.mark.parametrize("max_norm", [-1.0, -math.inf, math.nan])
def test_limits_that_cannot_be_meant(max_norm):
    """Row m: -1, -inf and NaN flipped or destroyed gradients silently.

    pytorch#31367; -1 as a sentinel: DeepSpeed PR#7171, PR#8614.
    """
    params = grads([3.0, 4.0])
    before = oracle.look(params)
    for call in (
        lambda: clip_grad_norm_(params, max_norm),
        lambda: clip_grads_with_norm_(params, max_norm, torch.tensor(5.0)),
        lambda: clip_grad_value_(params, max_norm),
        lambda: GradientClipper(params, max_norm).clip(),
    ):
        with pytest.raises(ArgumentValueError) as caught:
            call()
        assert isinstance(caught.value, ValueError)
        oracle.assert_untouched(params, before)


@backends
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("policy", [math.inf, ObserveClip()])
def test_an_infinite_limit_reports_and_nothing_else(policy, nonfinite, backend):
    """Row m': max_norm inf and an infinite gradient gave NaN."""
    params = grads([3.0, math.inf], [4.0, math.nan], [1.0, 2.0])
    before = oracle.look(params)
    result = GradientClipper(params, policy, nonfinite=nonfinite, backend=backend).clip()
    oracle.assert_untouched(params, before)
    assert int(result.nonfinite) == 2
    assert not bool(result.clipped)
    assert not bool(result.skipped)
    assert not math.isfinite(float(result.norm_pre))


@pytest.mark.parametrize("norm_type", [0, -1, -math.inf, math.nan])
def test_orders_that_have_no_norm(norm_type):
    """Row m": orders 0, -1, -inf and NaN gave a count, 0, no clipping at all, and NaN."""
    params = grads([3.0, 4.0])
    before = oracle.look(params)
    with pytest.raises(ArgumentValueError, match="norm_type"):
        clip_grad_norm_(params, 1.0, norm_type)
    with pytest.raises(ArgumentValueError, match="norm_type"):
        get_total_norm([params[0].grad], norm_type)
    with pytest.raises(ValidationError, match="norm_type"):
        NormClip(max_norm=1.0, norm_type=norm_type)
    oracle.assert_untouched(params, before)


@backends
@pytest.mark.parametrize("value", [0.1, 10.0, 1e30, 1e-30])
@pytest.mark.parametrize("p", [100.0, 40.0, 7.5])
def test_high_orders(p, value, backend):
    """Row m''': p = 100 overflowed at 10 and underflowed at 0.1."""
    params = oracle.parameters(torch.full((7,), value), torch.tensor([value / 2, -value]))
    truth = value * (8 + 2**-p) ** (1 / p)
    assert oracle.relative(oracle.norm(oracle.gradients(params), p), truth) <= 1e-7
    assert oracle.relative(clip(params, value / 3, p, backend).norm_pre, truth) <= 1e-6
    oracle.assert_bounded(oracle.gradients(params), value / 3, p)


def test_a_finished_generator_is_an_error():
    """Row n: an exhausted iterator gave 0.0 without a warning, and nothing was clipped."""
    params = grads([3.0, 4.0])
    before = oracle.look(params)
    generator = (p for p in params)
    assert float(clip_grad_norm_(generator, 10.0)) == 5.0
    with pytest.raises(GradClipError, match="generator"):
        clip_grad_norm_(generator, 1.0)
    oracle.assert_untouched(params, before)


@backends
def test_a_parameter_listed_twice_counts_once(backend):
    """Row o: [3, 4] listed twice had the norm 7.07 and was scaled twice. Megatron PR#7227."""
    params = grads([3.0, 4.0])
    result = clip([params[0], params[0]], 1.0, 2.0, backend)
    assert float(result.norm_pre) == 5.0
    assert params[0].grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-6)


def test_gradients_that_overlap_are_an_error():
    """Row o': overlapping views were scaled twice; an expanded gradient failed midway."""
    base = oracle.randn(8)
    ordinary = oracle.parameter(oracle.randn(3))
    for shared in ([base[:5], base[4:]], [base[:6], base[2:4]], [torch.ones(1).expand(4)]):
        params = [ordinary, *oracle.parameters(*shared)]
        before = oracle.look(params)
        for call in (
            lambda ps: clip_grad_norm_(ps, 0.1),
            lambda ps: clip_grad_value_(ps, 0.1),
            lambda ps: clip_grads_with_norm_(ps, 0.1, torch.tensor(5.0)),
            lambda ps: GradientClipper(ps, 0.1).clip(),
        ):
            with pytest.raises(OverlappingGradientsError):
                call(params)
            oracle.assert_untouched(params, before)


@backends
def test_scaled_gradients_are_clipped_by_what_they_are(backend):
    """Row p: clipping before unscaling left 8.7e-5 for 0.0894. accelerate#641.

    transformers#23905.
    """
    params = grads([3.0 * 1024, 4.0 * 1024])
    result = GradientClipper(params, 0.0894, backend=backend).clip(grad_scale=1024.0)
    assert float(result.norm_pre) == 5.0
    params[0].grad /= 1024.0
    post = oracle.assert_bounded([params[0].grad], 0.0894)
    assert oracle.relative(post, 0.0894) <= 2e-6


@backends
def test_one_clip_for_the_whole_window_of_accumulation(backend):
    """Row q: clipping after every micro-batch is a different training."""
    weight = torch.nn.Parameter(torch.zeros(3))
    clipper = GradientClipper([weight], 1.0, backend=backend)
    for micro in ([9.0, 0.0, 0.0], [-9.0, 0.0, 0.0], [0.0, 3.0, 4.0]):
        (weight * torch.tensor(micro)).sum().backward()
    result = clipper.clip()
    assert float(result.norm_pre) == 5.0
    assert weight.grad.tolist() == pytest.approx([0.0, 0.6, 0.8], rel=1e-6)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_clip_again_changes_nothing(dtype, backend):
    """Row s: bits changed in 300 of 300 cases, and 54 % ended above the limit."""
    for case in range(156):  # every scale with every p and every number of tensors
        generator = torch.Generator().manual_seed(case)
        sizes = torch.randint(1, 400, (1 + case % 4,), generator=generator).tolist()
        scale = 10.0 ** (case % 13 - 6)
        params = oracle.parameters(
            *(oracle.randn(n, seed=case, dtype=dtype) * scale for n in sizes)
        )
        p = (1.0, 2.0, 3.0, math.inf, 0.5, 2.0)[case % 6]
        max_norm = oracle.norm(oracle.gradients(params), p) * (0.01 + (case * 37 % 97) / 100)
        assert bool(clip(params, max_norm, p, backend).clipped)
        oracle.assert_bounded(oracle.gradients(params), max_norm, p)
        before = oracle.look(params)
        assert not bool(clip(params, max_norm, p, backend).clipped)
        oracle.assert_untouched(params, before)


@backends
def test_a_nan_is_seen_at_order_infinity(backend):
    """Row e', on one process: a maximum may lose a NaN."""
    for values in ([[math.nan, 3.0], [4.0, 1.0]], [[4.0, 1.0], [3.0, math.nan]]):
        params = grads(*values)
        before = oracle.look(params)
        result = clip(params, 1.0, math.inf, backend, nonfinite="propagate")
        assert int(result.nonfinite) == 1
        assert not math.isfinite(float(result.norm_pre))
        with pytest.raises(NonFiniteGradientError):
            clip_grad_norm_(params, 1.0, "inf", error_if_nonfinite=True)
        oracle.assert_untouched(params, before)


def test_all_or_nothing():
    """Row a", on one process: an error after some gradients had been scaled."""
    good = [oracle.parameter(oracle.randn(3, seed=i)) for i in range(3)]
    bad = oracle.parameter(torch.ones(3, dtype=torch.int64))
    before = oracle.look([*good, bad])
    for call in (
        lambda ps: clip_grad_norm_(ps, 0.1, foreach=False),
        lambda ps: clip_grads_with_norm_(ps, 0.1, torch.tensor(5.0)),
        lambda ps: clip_grad_value_(ps, 0.1),
    ):
        with pytest.raises(GradClipError):
            call([*good, bad])
        oracle.assert_untouched([*good, bad], before)


def test_parameters_of_equal_value_are_still_different_parameters():
    """Lists were compared with ``==``: accelerate#3789, PR#4294."""
    one, other = oracle.parameters(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0]))
    assert oracle.relative(clip_grad_norm_([one, other], 1.0), math.sqrt(50)) <= 1e-6
    assert torch.equal(one.grad, other.grad)
    result = GradientClipper([("a", one), ("b", other)], {"a": 1.0, "b": 0.5}).clip()
    assert bool(result.clipped)
    assert oracle.norm([other.grad]) <= 0.5


@pytest.mark.parametrize(
    "clip_gradients",
    [
        lambda grads: clip_grad_norm_(grads, 1.0),
        lambda grads: clip_grad_value_(grads, 1.0),
        lambda grads: clip_grads_with_norm_(grads, 1.0, 5.0),
        lambda grads: GradientClipper(grads, 1.0).clip(),
    ],
)
def test_gradients_in_the_place_of_parameters_are_noticed(clip_gradients):
    """They have no ``.grad``: a silent 0, and nothing was clipped. transformers PR#46113."""
    grads = [torch.tensor([3.0, 4.0])]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        clip_gradients(grads)
    assert len(heard) == 1
    assert "pass the parameters, not their gradients" in str(heard[0].message)
    assert heard[0].filename == __file__
    assert grads[0].tolist() == [3.0, 4.0]


def test_a_known_norm_and_no_parameters_at_all():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip_grads_with_norm_([], 1.0, 5.0)


def test_an_optimizer_that_steps_in_backward_is_noticed():
    """Every gradient is gone when the clip comes. torchtitan#990, torchtune#1934."""
    model = torch.nn.Linear(3, 3)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda q: setattr(q, "grad", None))
    clipper = GradientClipper(model, 1.0)
    model(torch.ones(3)).sum().backward()
    with pytest.warns(UserWarning, match="grad"):
        assert float(clipper.clip().norm_pre) == 0.0


def test_lbfgs_clips_in_its_closure():
    """Its line search magnifies small errors: by torch's function it ended 0.011 off."""

    def run(clip):
        weight = torch.nn.Parameter(torch.linspace(-2, 3, 6, dtype=torch.float64))
        optimizer = torch.optim.LBFGS([weight], lr=0.1, max_iter=4)
        curvature = torch.tensor([1.0, 2, 5, 3, 0.5, 4], dtype=torch.float64)

        def closure():
            optimizer.zero_grad()
            loss = (curvature * (weight - 1) ** 2).sum()
            loss.backward()
            clip(weight)
            return loss

        for _ in range(5):
            optimizer.step(closure)
        return weight.detach()

    def exactly(weight):
        weight.grad *= min(1.0, 1.0 / float(torch.linalg.vector_norm(weight.grad)))

    ours = run(lambda weight: clip_grad_norm_([weight], 1.0))
    assert float((ours - run(exactly)).abs().max()) <= 1e-9


def test_norms_before_and_after_are_both_there():
    """The logged norm is the one before clipping. transformers#37566, DeepSpeed#7220."""
    stats = GradientClipper(grads([30.0, 40.0]), 1.0).clip().to_host()
    assert stats.norm_pre == 50.0
    assert 1 - 2e-6 <= stats.norm_post <= 1.0


def test_there_is_no_silent_default_limit():
    """DeepSpeed clips at 1.0 when the key is absent. DeepSpeed PR#8068, accelerate PR#2791."""
    with pytest.raises(TypeError):
        GradientClipper(grads([3.0, 4.0]))
    with pytest.raises(ValidationError, match="max_norm"):
        NormClip()


def test_a_clipper_resumes(tmp_path):
    """transformers#34053."""
    params = grads([math.nan, 4.0])
    first = GradientClipper(params, 1.0, max_consecutive_skips=2)
    first.clip()
    params[0].grad = torch.tensor([math.nan, 4.0])
    first.clip()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = GradientClipper(params, 1.0, max_consecutive_skips=2)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    params[0].grad = torch.tensor([math.nan, 4.0])
    with pytest.raises(NonFiniteGradientError):
        second.clip()
