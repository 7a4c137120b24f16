"""What must hold for any gradients: the bound, the bits, the same numbers however they are cut."""

import math

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import oracle
from gradclip import GradientClipper, NormClip
from pairwise import ALL_COMBINATIONS

SAME = settings(
    derandomize=True,
    deadline=None,
    max_examples=120 if ALL_COMBINATIONS else 40,
    database=None,
)
backends = st.sampled_from(oracle.BACKENDS)
orders = st.sampled_from([*oracle.ORDERS, 1.5])
wide_dtypes = st.sampled_from([torch.float32, torch.float64])
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
any_float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Numbers that stay normal when they are scaled: the bound is promised for those.
moderate = st.just(0.0) | st.floats(1e-6, 1e6) | st.floats(-1e6, -1e-6)
fractions = st.floats(1e-4, 0.999)


def lists_of(numbers, **size):
    return st.lists(st.lists(numbers, max_size=9), **{"min_size": 1, "max_size": 6} | size)


@st.composite
def larger(draw, dtypes=wide_dtypes):
    """Tensors with more elements than hypothesis would draw one by one."""
    seed, dtype = draw(st.integers(0, 10**6)), draw(dtypes)
    sizes = draw(st.lists(st.integers(0, 600), min_size=1, max_size=8))
    scales = [10.0 ** draw(st.integers(-3, 3)) for _ in sizes]
    return [
        oracle.randn(n, seed=seed + i, dtype=dtype) * s
        for i, (n, s) in enumerate(zip(sizes, scales, strict=True))
    ]


def tensors(values, dtype=torch.float32):
    return [torch.tensor(v, dtype=dtype) for v in values]


small = st.builds(tensors, lists_of(moderate), wide_dtypes)
gradients = small | larger()


def clip(params, max_norm, p, backend):
    return GradientClipper(params, NormClip(max_norm=max_norm, norm_type=p), backend=backend).clip()


def copies(grads):
    return oracle.parameters(*(g.clone() for g in grads))


@SAME
@given(gradients, fractions, orders, backends)
def test_the_norm_afterwards_never_exceeds_the_limit(grads, fraction, p, backend):
    max_norm = oracle.norm(grads, p) * fraction
    assume(max_norm > 0)
    params = copies(grads)
    result = clip(params, max_norm, p, backend)
    assert bool(result.clipped)
    assert oracle.relative(result.norm_pre, oracle.norm(grads, p)) <= oracle.accuracy(grads)
    assert oracle.assert_bounded(oracle.gradients(params), max_norm, p) >= max_norm * (1 - 3e-6)
    assert float(result.norm_post) <= float(result.threshold) * (1 + 1e-7)


ANY_DTYPE = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128
]  # fmt: skip
LAYOUTS = [
    lambda t: t,
    lambda t: t.t(),
    lambda t: t[::2],
    lambda t: t[:, 1:],
    lambda t: t.reshape(-1)[::3],
    lambda t: t.conj(),
]


@st.composite
def mixed(draw):
    """Tensors of any dtypes and layouts."""
    made = []
    for number in range(draw(st.integers(1, 4))):
        dtype, layout = draw(st.sampled_from(ANY_DTYPE)), draw(st.sampled_from(LAYOUTS))
        rows, columns = draw(st.integers(1, 130)), draw(st.integers(1, 90))
        reach = 3 if dtype is torch.float16 else 15
        scale = 10.0 ** draw(st.integers(-reach, reach))
        made.append(layout((oracle.randn(rows, columns, seed=number) * scale).to(dtype)))
    return made


@SAME
@given(mixed(), orders, backends)
def test_any_dtypes_and_layouts_together_have_one_norm(grads, p, backend):
    params = oracle.parameters(*grads)
    before = oracle.look(params)
    norm = clip(params, math.inf, p, backend).norm_pre
    assert oracle.relative(norm, oracle.norm(grads, p)) <= oracle.accuracy(grads)
    oracle.assert_untouched(params, before)


@SAME
@given(
    larger(st.sampled_from([torch.float16, torch.bfloat16])),
    st.floats(0.1, 0.999),
    orders,
    backends,
)
def test_16_bit_gradients_stay_near_the_limit(grads, fraction, p, backend):
    grads = [g / 8 for g in grads if bool(g.isfinite().all())]
    max_norm = oracle.norm(grads, p) * fraction
    assume(max_norm > 0)
    params = copies(grads)
    result = clip(params, max_norm, p, backend)
    after = oracle.gradients(params)
    oracle.assert_scaled(grads, after, float(result.coefficient))
    oracle.assert_bounded([g for g in after if g.numel()], max_norm * (1 + 1e-4), p)


@SAME
@given(lists_of(any_float32), dtypes, orders, backends)
def test_bits_are_untouched_within_the_limit(values, dtype, p, backend):
    with_zeros = [[*v, 0.0, -0.0] for v in values]
    grads = [g.where(g.isfinite(), 0) for g in tensors(with_zeros, torch.float32)]
    grads = [g.to(dtype) for g in grads]
    grads = [g.where(g.isfinite(), 0) for g in grads]
    params = copies(grads)
    before = oracle.look(params)
    truth = oracle.norm(grads, p)
    assume(math.isfinite(truth))
    max_norm = truth * (1 + 3e-6) if truth > 1e-37 else 1e-36
    assert not bool(clip(params, max_norm, p, backend).clipped)
    oracle.assert_untouched(params, before)


@settings(SAME, max_examples=300)
@given(gradients, fractions, orders, backends)
def test_clipping_twice_changes_nothing(grads, fraction, p, backend):
    params = copies(grads)
    max_norm = oracle.norm(grads, p) * fraction
    clip(params, max_norm, p, backend)
    before = oracle.look(params)
    again = clip(params, max_norm, p, backend)
    if max_norm:
        oracle.assert_untouched(params, before)
        assert not bool(again.clipped)


@SAME
@given(larger(dtypes), fractions, orders, backends)
def test_every_element_is_multiplied_by_one_coefficient(grads, fraction, p, backend):
    mark = 0.7
    marked = [torch.cat([g, g.new_tensor([mark, -mark])]) for g in grads]
    marked = [g.where(g.isfinite(), 0) for g in marked]
    params = copies(marked)
    result = clip(params, oracle.norm(marked, p) * fraction, p, backend)
    oracle.assert_scaled(marked, oracle.gradients(params), float(result.coefficient))
    after = {oracle.bits(p.grad[-2]) for p in params} | {oracle.bits(-p.grad[-1]) for p in params}
    assert len(after) == 1, "equal elements became different ones"


@SAME
@given(gradients, fractions, orders, backends, st.randoms(use_true_random=False))
def test_the_order_of_tensors_does_not_matter(grads, fraction, p, backend, random):
    max_norm = oracle.norm(grads, p) * fraction
    assume(max_norm > 0)
    shuffled = [
        g[torch.tensor(random.sample(range(len(g)), len(g)), dtype=torch.int64)] for g in grads
    ]
    random.shuffle(shuffled)
    one = clip(copies(grads), max_norm, p, backend)
    other = clip(copies(shuffled), max_norm, p, backend)
    assert oracle.relative(other.norm_pre, float(one.norm_pre)) <= oracle.accuracy(grads)
    assert oracle.relative(other.coefficient, float(one.coefficient)) <= oracle.accuracy(grads)


@SAME
@given(gradients, orders, backends, st.data())
def test_the_cut_does_not_matter(grads, p, backend, data):
    dtype = grads[0].dtype
    whole = torch.cat([g.reshape(-1) for g in grads])
    cuts = data.draw(st.lists(st.integers(0, len(whole)), max_size=12).map(sorted))
    pieces = [g.clone() for g in whole.tensor_split(cuts)]
    one = clip(copies([whole]), math.inf, p, backend).norm_pre
    other = clip(copies(pieces), math.inf, p, backend).norm_pre
    assert one.dtype == other.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert oracle.relative(other, float(one)) <= oracle.accuracy(grads)


@SAME
@given(gradients, fractions, orders, backends, st.integers(-40, 40))
def test_powers_of_two_scale_everything_exactly(grads, fraction, p, backend, exponent):
    factor = 2.0**exponent
    max_norm = oracle.norm(grads, p) * fraction
    params, scaled = copies(grads), copies([g * factor for g in grads])
    one = clip(params, max_norm, p, backend)
    other = clip(scaled, max_norm * factor, p, backend)
    assert float(other.norm_pre) == float(one.norm_pre) * factor
    assert float(other.coefficient) == float(one.coefficient)
    for plain, big in zip(params, scaled, strict=True):
        assert oracle.bits(plain.grad * factor) == oracle.bits(big.grad)


@SAME
@given(gradients, fractions, orders, backends, st.data())
def test_none_empty_and_repeated_parameters_add_nothing(grads, fraction, p, backend, data):
    max_norm = oracle.norm(grads, p) * fraction
    assume(max_norm > 0)
    params, cluttered = copies(grads), copies(grads)
    dtype = grads[0].dtype
    clutter = [
        oracle.parameter(None),
        oracle.parameter(torch.ones(0, dtype=dtype)),
        oracle.parameter(torch.ones(3, 0, dtype=dtype)),
        *data.draw(st.lists(st.sampled_from(cluttered), max_size=4)),
    ]
    mixed = [*cluttered, *clutter]
    one = clip(params, max_norm, p, backend)
    other = clip(mixed, max_norm, p, backend)
    assert oracle.relative(other.norm_pre, float(one.norm_pre)) <= oracle.accuracy(grads)
    assert int(other.nonfinite) == 0
    oracle.assert_scaled(grads, oracle.gradients(cluttered), float(other.coefficient))


@SAME
@given(larger(dtypes), fractions, orders)
def test_both_backends_give_the_same_numbers(grads, fraction, p):
    grads = [g.where(g.isfinite(), 0) for g in grads]
    max_norm = oracle.norm(grads, p) * fraction
    one, other = (clip(copies(grads), max_norm, p, backend) for backend in oracle.BACKENDS)
    assert oracle.relative(one.norm_pre, float(other.norm_pre)) <= 1e-6
    assert oracle.relative(one.coefficient, float(other.coefficient)) <= 1e-6
    assert bool(one.clipped) == bool(other.clipped)
