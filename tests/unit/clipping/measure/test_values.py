"""Norms, bounds and coefficients against the truth: every dtype, layout and magnitude."""

import math

import pytest
import torch

import oracle
from gradclip import (
    GradientClipper,
    NormClip,
    ObserveClip,
    ValueClip,
    clip_grad_norm_,
    clip_grad_value_,
    get_total_norm,
)
from gradclip.clipping.kernels import foreach
from pairwise import pairwise

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
C64, C128 = torch.complex64, torch.complex128
TINY = torch.finfo(F32).tiny

backends = pytest.mark.parametrize("backend", oracle.BACKENDS)
orders = pytest.mark.parametrize("p", oracle.ORDERS)


def clip(params, max_norm, p=2.0, backend="auto", **keywords):
    policy = NormClip(max_norm=max_norm, norm_type=p)
    return GradientClipper(params, policy, backend=backend).clip(**keywords)


def check_clip(grads, max_norm, p, backend):
    """Clip ``grads`` and compare everything that can be seen with the truth."""
    params = oracle.parameters(*grads)
    before = [g.detach().clone() for g in grads]
    truth = oracle.norm(before, p)
    assert truth > max_norm, "this is for gradients that must be clipped"
    result = clip(params, max_norm, p, backend)
    after = oracle.gradients(params)
    wide = any(g.dtype in {F64, C128} for g in grads)
    narrow = {g.dtype for g in grads} <= {F64, C128}
    assert oracle.relative(result.norm_pre, truth) <= oracle.accuracy(grads)
    guard = 1 - float(result.coefficient) * truth / max_norm
    assert abs(guard) <= (3e-13 if narrow else 2e-6), f"the coefficient is off by {guard}"
    oracle.assert_scaled(before, after, float(result.coefficient))
    post = oracle.assert_bounded(after, max_norm, p)
    slack = max(oracle.ROUNDING[g.dtype][1] for g in grads)
    assert post >= max_norm * (1 - slack - (3e-13 if narrow else 2e-6))
    assert oracle.relative(result.norm_post, post) <= slack + 2e-6
    assert result.norm_pre.dtype == result.coefficient.dtype == (F64 if wide else F32)
    assert bool(result.clipped)
    assert not bool(result.skipped)
    assert int(result.nonfinite) == 0
    return result


def check_untouched(grads, max_norm, p=2.0, backend="auto"):
    """Clipping changes not one bit, and writes nothing."""
    params = oracle.parameters(*grads)
    before = oracle.look(params)
    truth = oracle.norm(grads, p)
    result = clip(params, max_norm, p, backend)
    oracle.assert_untouched(params, before)
    assert not bool(result.clipped)
    assert float(result.coefficient) == 1.0
    if truth == 0 or truth >= TINY:
        assert oracle.relative(result.norm_pre, truth) <= oracle.accuracy(grads)
        assert float(result.norm_post) == float(result.norm_pre)


@pairwise(dtype=[F16, BF16, F32, F64], p=oracle.ORDERS, backend=oracle.BACKENDS)
def test_ragged_tensors_of_one_dtype(dtype, p, backend):
    grads = oracle.ragged(1, dtype)
    check_clip(grads, oracle.norm(grads, p) / 3, p, backend)
    check_untouched(grads, oracle.norm(grads, p) * 1.001, p, backend)


@pytest.mark.smoke
@backends
@orders
def test_mixed_dtypes(p, backend):
    grads = [g for i, d in enumerate((F16, BF16, F32, F64)) for g in oracle.ragged(i, d)]
    check_clip(grads, oracle.norm(grads, p) / 7, p, backend)


@pairwise(
    size=[1, 7, 127, 128, 129, 1000, 16383, 16384, 16385, 70_001],
    p=oracle.ORDERS,
    backend=oracle.BACKENDS,
)
def test_one_tensor_of_any_size(size, p, backend):
    grads = [oracle.randn(size)]
    check_clip(grads, oracle.norm(grads, p) / 2, p, backend)


@pairwise(dtype=[BF16, F32], p=[1.0, 2.0, math.inf], backend=oracle.BACKENDS)
def test_three_million_elements(dtype, p, backend):
    grads = [oracle.randn(3_000_000, dtype=dtype), oracle.randn(5, dtype=dtype)]
    check_clip(grads, oracle.norm(grads, p) / 2, p, backend)


@pairwise(spike=[0.0, 1e4, 1e12], p=[1.0, 2.0, 3.0], backend=oracle.BACKENDS)
def test_constants_and_spikes(spike, p, backend):
    """Equal elements round the same way, and a spike hides the rest: hard for partial sums."""
    flat = torch.full((200_000,), 0.1)
    if spike:
        flat[77_777] = spike
    grads = [flat, torch.full((100,), 1 / 3), torch.full((1000,), 0.7, dtype=BF16)]
    check_clip(grads, oracle.norm(grads, p) / 2, p, backend)


@backends
@orders
def test_many_small_tensors(p, backend):
    grads = [oracle.randn(1 + i % 37, seed=i) for i in range(600)]
    check_clip(grads, oracle.norm(grads, p) / 2, p, backend)


LAYOUTS = {
    "transposed": lambda b: b[:48, :40].t(),
    "sliced rows": lambda b: b[3:40:2],
    "sliced columns": lambda b: b[:, 5:50:3],
    "a corner": lambda b: b[1:30, 7:33],
    "column": lambda b: b[:, 9],
    "channels_last": lambda b: b[:48, :45].reshape(4, 12, 9, 5).to(
        memory_format=torch.channels_last
    ),
    "permuted": lambda b: b[:48, :40].reshape(6, 8, 40).permute(2, 0, 1),
    "a scalar inside": lambda b: b[5, 5],
}  # fmt: skip


@pairwise(
    layout=list(LAYOUTS),
    dtype=[BF16, F32, F64],
    p=[0.5, 1.0, 2.0, math.inf],
    backend=oracle.BACKENDS,
)
def test_layouts(layout, dtype, p, backend):
    base = oracle.randn(64, 50, dtype=dtype)
    view = LAYOUTS[layout](base)
    surroundings = torch.ones_like(base, dtype=torch.bool)
    if view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr():
        torch.as_strided(
            surroundings, view.shape, view.stride(), view.storage_offset()
        ).fill_(value=False)  # fmt: skip
    around, stride = oracle.bits(base[surroundings]), view.stride()
    grads = [view, oracle.randn(11, dtype=dtype)]
    check_untouched(grads, oracle.norm(grads, p) * 1.001, p, backend)
    check_clip(grads, oracle.norm(grads, p) / 2, p, backend)
    assert grads[0].stride() == stride
    assert oracle.bits(base[surroundings]) == around, "elements between the gradient's changed"


@pairwise(dtype=[C64, C128], p=oracle.ORDERS, backend=oracle.BACKENDS)
def test_complex_gradients_count_by_modulus(dtype, p, backend):
    three_four = torch.tensor([3 + 4j, 0j, -5j], dtype=dtype)
    grads = [three_four.clone(), oracle.randn(33, 3, dtype=dtype), oracle.randn(20, dtype=F32)]
    check_untouched(grads, oracle.norm(grads, p) * 1.001, p, backend)
    check_clip(grads, oracle.norm(grads, p) / 2, p, backend)
    result = clip(oracle.parameters(three_four), math.inf, p, backend)
    assert oracle.relative(result.norm_pre, 5.0 * 2 ** (1 / p)) <= 1e-6


@backends
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize(("part", "dtype"), [(3e38, C64), (1.2e308, C128)])
def test_a_modulus_beyond_the_range_of_its_finite_parts(part, dtype, p, backend):
    grads = [torch.tensor([complex(part, part), 0j], dtype=dtype), torch.ones(2)]
    params = oracle.parameters(*grads)
    result = clip(params, 1e30, p, backend)
    assert int(result.nonfinite) == 0
    assert not bool(result.skipped)
    assert bool(result.clipped)
    assert oracle.assert_bounded(oracle.gradients(params), 1e30, p) >= 1e30 * (1 - 2e-6)


def sparse(seed=0, dtype=F32):
    """Seven entries in five rows of nine: rows 2 and 5 come twice, so the norm needs coalescing."""
    rows = torch.tensor([[2, 5, 2, 0, 8, 5, 7]])
    values = oracle.randn(7, 4, seed=seed, dtype=dtype)
    return torch.sparse_coo_tensor(rows, values, (9, 4), check_invariants=False)


@pairwise(dtype=[BF16, F32, F64], p=oracle.ORDERS, backend=oracle.BACKENDS)
def test_sparse_gradients(dtype, p, backend):
    grads = [sparse(dtype=dtype), oracle.randn(5, dtype=dtype)]
    truth = oracle.norm([grads[0].to_dense(), grads[1]], p)
    check_untouched(grads, truth * 1.01, p, backend)
    assert not grads[0].is_coalesced()
    params = oracle.parameters(*grads)
    dense = [g.to_dense().clone() for g in grads]
    result = clip(params, truth / 2, p, backend)
    assert oracle.relative(result.norm_pre, truth) <= (4e-3 if dtype == BF16 else 1e-6)
    after = [g.to_dense() for g in oracle.gradients(params)]
    if dtype != BF16:  # coalescing bfloat16 may round
        oracle.assert_scaled(dense, after, float(result.coefficient))
    oracle.assert_bounded(after, truth / 2 * (1 + 4e-3 * (dtype == BF16)), p)
    assert params[0].grad.layout == torch.sparse_coo


@backends
@pytest.mark.parametrize("entries", [[1e8, -99999992.0], [496256.59, -496255.59]])
def test_sparse_entries_that_nearly_cancel(entries, backend):
    """Scaled one by one, each would round at its own size, far above that of their sum."""
    grad = torch.sparse_coo_tensor(
        torch.tensor([[0, 0]]), torch.tensor(entries), (2,), check_invariants=False
    )
    params = oracle.parameters(grad)
    max_norm = 0.37 * oracle.norm([grad])
    clip(params, max_norm, 2.0, backend)
    post = oracle.assert_bounded(oracle.gradients(params), max_norm)
    assert post >= max_norm * (1 - 2e-6)


PENDING = {
    "conjugation": lambda: oracle.randn(9, 4, dtype=C64).conj(),
    "sign": lambda: oracle.randn(50, dtype=C64).conj().imag,
}


@pairwise(pending=list(PENDING), p=oracle.ORDERS, backend=oracle.BACKENDS)
def test_a_pending_conjugation_or_sign(pending, p, backend):
    """Views instead of copies: autograd gives the first for ``w.conj()``, hooks any."""
    view = PENDING[pending]()
    assert view.is_conj() or view.is_neg()
    grads = [oracle.randn(9, 4, dtype=view.dtype), view, oracle.randn(3)]
    check_untouched(grads, oracle.norm(grads, p) * 1.001, p, backend)
    check_clip(grads, oracle.norm(grads, p) / 2, p, backend)


@pairwise(
    magnitude=[1e-38, 1e-30, 1e-23, 1e-19, 1e-10, 1.0, 1e15, 1e19, 1e22],
    dtype=[BF16, F32],
    p=[1.0, 2.0, 3.0, math.inf],
    backend=oracle.BACKENDS,
)
def test_float32_magnitudes(dtype, magnitude, p, backend):
    grads = [(magnitude * (1 + oracle.randn(s).abs())).to(dtype) for s in (1, 130, 1000, 20_000)]
    params = oracle.parameters(*grads)
    truth = oracle.norm(grads, p)
    assert oracle.relative(clip(params, math.inf, p, backend).norm_pre, truth) <= 1e-6
    if magnitude > 1e-35:  # below, what is clipped becomes subnormal
        check_clip(grads, truth / 2, p, backend)


@backends
@orders
def test_float32_largest_and_smallest_together(p, backend):
    values = [3e38 / 40, -1e30, 1e18, 1.0, -1e-10, 1e-30, 1.2e-38]
    grads = [torch.tensor(values), torch.tensor([1e-40, -1e-45, 0.0])]
    check_clip(grads, oracle.norm(grads, p) / 2, p, backend)


@pairwise(value=[3e38, -3e38, 1.2e-38], p=[1.0, 2.0, 3.0, math.inf], backend=oracle.BACKENDS)
def test_float32_ends_of_the_range(value, p, backend):
    grads = [torch.tensor([0.0, value])]
    result = clip(oracle.parameters(*grads), math.inf, p, backend)
    assert oracle.relative(result.norm_pre, oracle.norm(grads)) <= 1e-6


@backends
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_a_norm_beyond_float32_of_finite_gradients_still_clips(p, backend):
    """An infinity in the result would mean one in the gradients; there is none."""
    grads = [torch.full((50,), 3e38), torch.full((50,), -2e38)]
    params = oracle.parameters(*grads)
    before = [g.clone() for g in grads]
    truth = oracle.norm(grads, p)
    result = clip(params, 1e30, p, backend)
    assert math.isfinite(float(result.norm_pre))
    assert int(result.nonfinite) == 0
    assert not bool(result.skipped)
    assert bool(result.clipped)
    oracle.assert_scaled(before, oracle.gradients(params), 1e30 / truth * (1 - 2.0**-21))
    oracle.assert_bounded(oracle.gradients(params), 1e30, p)


@backends
@pytest.mark.parametrize(
    ("dtype", "value", "max_norm"),
    [(F32, 3e37, 1e-6), (F32, 3e37, 1e-3), (F64, 1e300, 1e-12), (F64, 1e300, 1e-20)],
)
def test_a_coefficient_below_the_smallest_normal_number(dtype, value, max_norm, backend):
    """The elements stay normal, so the bound holds; the coefficient itself does not stay so."""
    params = oracle.parameters(*(torch.full((n,), value, dtype=dtype) for n in (10, 60)))
    clip(params, max_norm, 2.0, backend)
    post = oracle.assert_bounded(oracle.gradients(params), max_norm)
    assert post >= max_norm * (1 - 1e-5)


@pairwise(
    magnitude=[1e-300, 1e-200, 1e-160, 1e-20, 1e20, 1e153, 1e200, 1e300],
    p=[1.0, 2.0, 3.0, math.inf],
    backend=oracle.BACKENDS,
)
def test_float64_magnitudes(magnitude, p, backend):
    grads = [magnitude * (1 + oracle.randn(s, dtype=F64).abs()) for s in (1, 130, 20_000)]
    check_clip(grads, oracle.norm(grads, p) / 2, p, backend)


@backends
@orders
def test_float64_extremes_together(p, backend):
    grads = [torch.tensor([1e300, -1e200, 1e10, 1.0], dtype=F64)]
    grads.append(torch.tensor([1e-10, -1e-200, 1e-300, 5e-324, 0.0], dtype=F64))
    check_clip(grads, oracle.norm(grads, p) / 2, p, backend)
    small = [torch.tensor([3e-170, -4e-170], dtype=F64), torch.tensor([1e-300, 0.0], dtype=F64)]
    check_clip(small, oracle.norm(small, p) / 2, p, backend)


@pairwise(dtype=[F16, BF16, F32, F64], p=oracle.ORDERS, backend=oracle.BACKENDS)
def test_signed_zeros_and_subnormals_are_untouched(dtype, p, backend):
    info = torch.finfo(dtype)
    step = info.smallest_normal * info.eps
    edge = [0.0, -0.0, step, -step, 3 * step, info.tiny, -info.tiny, info.tiny / 2]
    check_untouched([torch.tensor([*edge, 1.0], dtype=dtype)], 1e10, p, backend)
    check_untouched(
        [torch.tensor(edge, dtype=dtype), -torch.zeros(3, dtype=dtype)], 1.0, p, backend
    )


@backends
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_a_norm_that_equals_the_limit_is_untouched(dtype, backend):
    check_untouched([torch.tensor([3.0, -4.0, 0.0], dtype=dtype)], 5.0, 2.0, backend)
    check_untouched([torch.tensor([3.0, -4.0, -0.0], dtype=dtype)], 7.0, 1.0, backend)
    check_untouched([torch.tensor([3.0, -4.0, -0.0], dtype=dtype)], 4.0, math.inf, backend)


@pytest.mark.smoke
@backends
@orders
def test_max_norm_zero_gives_zeros(p, backend):
    params = oracle.parameters(oracle.randn(9), torch.tensor(2.0, dtype=BF16), sparse())
    clip(params, 0.0, p, backend)
    assert all(bool((g.to_dense() == 0).all()) for g in oracle.gradients(params))
    zeros = oracle.parameters(torch.zeros(9), torch.zeros(2, dtype=F64))
    result = clip(zeros, 0.0, p, backend)
    assert float(result.norm_pre) == float(result.norm_post) == 0.0
    assert all(bool((g == 0).all()) for g in oracle.gradients(zeros)), "0 / 0 came through"


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))


@backends
@orders
def test_accumulated_gradients_of_a_model(p, backend):
    model = network()
    clipper = GradientClipper(model, NormClip(max_norm=0.5, norm_type=p), backend=backend)
    for window in range(3):
        model.zero_grad()
        for micro in range(4):
            batch = oracle.randn(16, 8, seed=10 * window + micro)
            (model(batch).square().mean() * 30).backward()
        before = [g.clone() for g in oracle.gradients(model.parameters())]
        result = clipper.clip()
        assert clipper.last is result
        after = oracle.gradients(model.parameters())
        assert oracle.relative(result.norm_pre, oracle.norm(before, p)) <= 1e-6
        oracle.assert_scaled(before, after, float(result.coefficient))
        oracle.assert_bounded(after, 0.5, p)


@pairwise(as_tensor=[False, True], p=oracle.ORDERS, backend=oracle.BACKENDS)
def test_grad_scale_measures_what_the_gradients_really_are(as_tensor, p, backend):
    scale = 2.0**10
    factor = torch.tensor(scale) if as_tensor else scale
    plain = oracle.parameters(*oracle.ragged(3))
    scaled = oracle.parameters(*(g * scale for g in oracle.ragged(3)))
    limit = oracle.norm(oracle.gradients(plain), p) / 3
    expected = clip(plain, limit, p, backend)
    result = clip(scaled, limit, p, backend, grad_scale=factor)
    assert torch.equal(result.norm_pre, expected.norm_pre)
    assert torch.equal(result.coefficient, expected.coefficient)
    for one, other in zip(plain, scaled, strict=True):
        assert oracle.bits(one.grad * scale) == oracle.bits(other.grad), "they stay scaled"
    before = oracle.look(scaled)
    assert not bool(clip(scaled, limit * 1.01, p, backend, grad_scale=factor).clipped)
    oracle.assert_untouched(scaled, before)


@pytest.mark.smoke
@backends
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_value_mode(dtype, backend):
    grads = [*oracle.ragged(4, dtype), torch.tensor([0.5, -0.5, -0.0, 9.0], dtype=dtype)]
    params = oracle.parameters(*grads)
    before = [g.clone() for g in grads]
    result = GradientClipper(params, ValueClip(clip_value=0.5), backend=backend).clip()
    for old, p in zip(before, params, strict=True):
        assert torch.equal(p.grad, old.clamp(-0.5, 0.5))
        inside = old.abs() <= 0.5
        assert oracle.bits(p.grad[inside]) == oracle.bits(old[inside])
    assert oracle.relative(result.norm_pre, oracle.norm(before)) <= 1e-6
    assert float(result.coefficient) == 1.0
    assert float(result.threshold) == 0.5
    assert bool(result.clipped)
    again = GradientClipper(params, ValueClip(clip_value=0.5), backend=backend).clip()
    assert not bool(again.clipped)


@backends
@pytest.mark.parametrize("value", [1e6, math.inf])
def test_value_mode_within_the_limit_keeps_every_bit(value, backend):
    grads = oracle.ragged(5, F16) + oracle.ragged(6, F32)
    params = oracle.parameters(*grads)
    before = [oracle.bits(g) for g in grads]
    result = GradientClipper(params, ValueClip(clip_value=value), backend=backend).clip()
    assert [oracle.bits(g) for g in oracle.gradients(params)] == before
    assert not bool(result.clipped)


@backends
def test_value_mode_of_layouts_sparse_and_zero(backend):
    base = oracle.randn(20, 30)
    kept = base.clone()
    params = oracle.parameters(base[::2, 3:9].t(), sparse())
    dense = params[1].grad.to_dense()
    GradientClipper(params, ValueClip(clip_value=0.25), backend=backend).clip()
    kept[::2, 3:9] = kept[::2, 3:9].clamp(-0.25, 0.25)
    assert torch.equal(base, kept)
    assert torch.equal(params[1].grad.to_dense(), dense.clamp(-0.25, 0.25))
    GradientClipper(params, ValueClip(clip_value=0.0), backend=backend).clip()
    assert all(bool((g.to_dense() == 0).all()) for g in oracle.gradients(params))


@backends
def test_value_mode_with_grad_scale(backend):
    params = oracle.parameters(torch.tensor([1.0, -300.0, 8.0, 100.0]))
    GradientClipper(params, ValueClip(clip_value=2.0), backend=backend).clip(grad_scale=32.0)
    assert params[0].grad.tolist() == [1.0, -64.0, 8.0, 64.0]


@pytest.mark.smoke
@backends
def test_observe_measures_and_writes_nothing(backend):
    params = oracle.parameters(*oracle.ragged(7), *oracle.ragged(8, BF16))
    before = oracle.look(params)
    result = GradientClipper(params, ObserveClip(norm_type=1.0), backend=backend).clip()
    oracle.assert_untouched(params, before)
    assert oracle.relative(result.norm_pre, oracle.norm(oracle.gradients(params), 1.0)) <= 1e-6
    assert float(result.threshold) == math.inf


def test_the_result_is_fresh_frozen_and_readable():
    params = oracle.parameters(torch.tensor([3.0, 4.0]))
    clipper = GradientClipper(params, 2.5)
    assert clipper.last is None
    result = clipper.clip()
    norm_pre = result.norm_pre
    stats = result.to_host()
    params[0].grad = torch.tensor([0.0, 1.0])
    assert float(clipper.clip().norm_pre) == 1.0
    assert float(norm_pre) == float(result.norm_pre) == 5.0, "the next step changed this result"
    names = ("norm_pre", "norm_post", "threshold", "coefficient")
    assert all(type(getattr(stats, n)) is float and getattr(result, n).ndim == 0 for n in names)
    assert type(stats.clipped) is type(stats.skipped) is bool
    assert type(stats.nonfinite) is int
    assert isinstance(stats.norms_S, tuple)
    assert len(stats.norms_S) == len(result.norms_S) == len(result.scope_names) > 0
    assert (stats.norm_pre, stats.threshold, stats.clipped) == (5.0, 2.5, True)
    assert stats.coefficient == float(result.coefficient) == pytest.approx(0.5, rel=1e-6)
    assert stats.norm_post == pytest.approx(2.5, rel=1e-6)
    assert stats.norm_post <= 2.5
    assert not result.groups
    assert "norm_pre=5" in repr(result)
    with pytest.raises(AttributeError):
        result.norm_pre = torch.tensor(1.0)


@pytest.mark.parametrize("limit", [1, 1.0, torch.tensor(1.0), torch.tensor([1.0])], ids=repr)
def test_a_limit_may_be_any_single_number(limit):
    for call in (
        lambda ps: clip_grad_norm_(ps, limit),
        lambda ps: GradientClipper(ps, limit).clip(),
        lambda ps: clip_grad_value_(ps, limit),
    ):
        params = oracle.parameters(torch.tensor([0.0, 5.0]))
        call(params)
        assert params[0].grad.tolist() == pytest.approx([0.0, 1.0], rel=1e-6)


def test_get_total_norm_is_true_for_every_dtype():
    for dtype in (F16, BF16, F32, F64, C64, C128):
        for p in (*oracle.ORDERS, "inf", 1.5):
            grads = oracle.ragged(9, dtype)
            truth = oracle.norm(grads, float(p))
            value = get_total_norm(grads, p)
            assert oracle.relative(value, truth) <= oracle.accuracy(grads), (dtype, p)


def test_one_element_a_bit_above_its_limit_is_clamped_and_none_below_is_looked_at(monkeypatch):
    weight = torch.nn.Parameter(torch.zeros(9000))
    clipper = GradientClipper([weight], ValueClip(clip_value=1.0), backend="foreach")
    weight.grad = torch.zeros(9000)
    weight.grad[8] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert bool(clipper.clip().clipped)
    assert weight.grad[8] == 1.0
    monkeypatch.setattr(foreach, "clamp_", lambda *given: pytest.fail("looked again"))
    weight.grad[8] = 0.99
    assert not bool(clipper.clip().clipped)
