"""The Triton kernels against float64: on a GPU where there is one, else in Triton's interpreter.

Chunks are small, so that a few hundred elements have many of them.
"""

import os
import sys
from math import inf, isnan, nan
from threading import Thread

import pytest
import torch

import oracle
from gradclip import GradientClipper, NormClip, ObserveClip, ValueClip, clip_grad_norm_
from gradclip.clipping.kernels import Batch, carry_out, choose
from gradclip.clipping.kernels.tables import Addresses, Table
from gradclip.clipping.measure import norm
from pairwise import ALL_COMBINATIONS, pairwise

triton = pytest.importorskip("gradclip.clipping.kernels.triton")
triton_plan = pytest.importorskip("gradclip.clipping.kernels.triton_plan")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
CHUNK, BLOCK = 64, 16
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CLOSE = {"rtol": 1e-6, "atol": 0}
# One element, the lengths around a block and a chunk, and several chunks with a ragged end.
LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 150]

pytestmark = [
    pytest.mark.skipif(
        not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="no GPU, no interpreter"
    ),
    # NumPy runs the interpreter, and says what a GPU does silently.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(triton_plan, "CHUNK", CHUNK)
    monkeypatch.setattr(triton_plan, "BLOCK", BLOCK)
    monkeypatch.setattr(triton_plan, "RECOUNT", BLOCK)
    monkeypatch.setattr(triton_plan, "FOLD", BLOCK)
    monkeypatch.setattr(triton_plan, "PROGRAMS", 7)


@pytest.fixture
def kernels():
    return choose("triton").on(DEVICE)


def scale_(kernels, batch, coefficients):
    carry_out(kernels.scaling(batch, coefficients))


def random(length, dtype, offset=0, scale=1.0):
    """A tensor that begins ``offset`` elements behind aligned memory."""
    generator = torch.Generator().manual_seed(length * 100 + offset)
    values = torch.randn(length, generator=generator, dtype=torch.float64) * scale
    return torch.zeros(length + offset, dtype=dtype, device=DEVICE)[offset:].copy_(values)


def ragged(dtype, scale=1.0):
    return [random(n, dtype, offset, scale) for n in LENGTHS for offset in (0, 3)]


def truth(tensors, p):
    return torch.tensor([oracle.norm([t.cpu()], p) for t in tensors], dtype=torch.float64)


def root(sums_RA, p):
    if sums_RA.shape[1] == 3:
        return norm._root(sums_RA.cpu(), p)
    return sums_RA[:, 0].cpu() if p == inf else sums_RA[:, 0].cpu() ** (1 / p)


def measured(kernels, batch, p):
    if p in {1.0, 2.0}:
        return root(kernels.power_sums(batch, p), p)
    if p == inf:
        return root(kernels.abs_max(batch), p)
    scale_R = torch.full((len(batch.specs.row_sizes),), 2.0, dtype=torch.float64, device=DEVICE)
    return root(kernels.scaled_power_sums(batch, p, scale_R), p) * 2


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0, inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_ragged_tensors_aligned_or_not(kernels, dtype, p):
    tensors = ragged(dtype)
    before = [t.clone() for t in tensors]
    found = measured(kernels, Batch.of(tensors), p)
    precise = dtype is torch.float64 or p in {0.5, inf}
    torch.testing.assert_close(found, truth(tensors, p), rtol=1e-13 if precise else 1e-6, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_alignment_does_not_show_in_a_single_bit(kernels, dtype):
    aligned = random(3 * CHUNK + 5, dtype)
    tensors = [aligned]
    for offset in (1, 3, 4, 8):
        view = torch.empty(len(aligned) + offset, dtype=dtype, device=DEVICE)[offset:]
        tensors.append(view.copy_(aligned))
    batch = Batch.of(tensors)
    for p in (1.0, 2.0, 3.0):
        assert len(set(measured(kernels, batch, p).tolist())) == 1
    clamped = kernels.clamp_(batch, 0.5, True)
    for sums_RA in (clamped.before_RA, clamped.after_RA):
        assert len(set(map(tuple, sums_RA.tolist()))) == 1
    scale_(kernels, batch, 0.3)
    assert all(torch.equal(tensor, aligned) for tensor in tensors)


@pairwise(dtype=DTYPES, p=[1.0, 2.0, 3.0, inf], value=[nan, inf, -inf])
def test_nothing_non_finite_is_lost_wherever_it_is(kernels, dtype, p, value):
    generator = torch.Generator().manual_seed(0)
    edges = [0, 1, BLOCK - 1, BLOCK, CHUNK - 1, CHUNK, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 8]
    number = 32 if ALL_COMBINATIONS else 3
    anywhere = torch.randint(0, 2 * CHUNK + 9, (number,), generator=generator).tolist()
    tensors = []
    for position in edges + anywhere:
        tensors.append(random(2 * CHUNK + 9, dtype, offset=position % 2))
        tensors[-1][position] = value
    found = measured(kernels, Batch.of(tensors), p)
    assert all(found.isnan() if isnan(value) else found == inf), found


@pairwise(
    dtype=[torch.float32, torch.bfloat16],
    magnitude=[1e-44, 2e-38, 1e-30, 1e-20, 1e-12, 1e12, 1e25, 3e38],
    p=[1.0, 2.0, 3.0, "clamp"],
)
def test_magnitudes_that_float32_sums_lose(kernels, dtype, magnitude, p):
    tensors = [
        torch.full((150,), magnitude, dtype=dtype, device=DEVICE),
        torch.cat([torch.ones(1), torch.full((149,), magnitude)]).to(DEVICE, dtype),
        torch.zeros(150, dtype=dtype, device=DEVICE),
    ]
    batch = Batch.of(tensors)
    if p == "clamp":
        clamped = kernels.clamp_(batch, magnitude / 2, False)
        top = float(torch.tensor(magnitude / 2, dtype=dtype))
        torch.testing.assert_close(root(clamped.before_RA, 2.0), truth(tensors, 2.0), **CLOSE)
        limited = [t.clamp(-top, top) for t in tensors]
        torch.testing.assert_close(root(clamped.after_RA, 2.0), truth(limited, 2.0), **CLOSE)
    else:
        torch.testing.assert_close(measured(kernels, batch, p), truth(tensors, p), **CLOSE)


def test_a_power_that_float32_cannot_hold(kernels):
    scale_R = torch.full((1,), 4.0, dtype=torch.float64, device=DEVICE)
    batch = Batch.of([torch.tensor([3.0, 4.0], device=DEVICE)])
    assert kernels.scaled_power_sums(batch, 1e300, scale_R).tolist() == [[1.0]]


@pytest.mark.parametrize("magnitude", [5e-324, 1e-300, 1e-170, 1e-20, 1.0, 1e150, 1e300])
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_float64_from_end_to_end_of_its_range(magnitude, p):
    weight = torch.nn.Parameter(torch.zeros(150, dtype=torch.float64, device=DEVICE))
    weight.grad = torch.full((150,), magnitude, dtype=torch.float64, device=DEVICE)
    result = GradientClipper([weight], ObserveClip(norm_type=p), backend="triton").clip()
    assert float(result.norm_pre) == pytest.approx(oracle.norm([weight.grad.cpu()], p), rel=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
class TestScale:
    def test_it_is_one_rounding_of_the_product(self, kernels, dtype):
        tensors = ragged(dtype)
        expected = [(t.double() * 0.3).to(dtype) for t in tensors]
        scale_(kernels, Batch.of(tensors), 0.3)
        for tensor, wanted in zip(tensors, expected, strict=True):
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(tensor, wanted, rtol=eps, atol=0)

    def test_one_leaves_every_bit_and_zero_sets_zeros(self, kernels, dtype):
        values = [-0.0, 0.0, nan, inf, -inf, torch.finfo(dtype).tiny / 4, 1.5]
        tensor = torch.tensor(values, dtype=dtype, device=DEVICE)
        bits = tensor.clone().view(torch.uint8)
        one = torch.ones(1, dtype=torch.float64, device=DEVICE)
        scale_(kernels, Batch.of([tensor]), one)
        assert torch.equal(tensor.view(torch.uint8), bits)
        scale_(kernels, Batch.of([tensor]), one * 0)
        assert torch.equal(tensor, torch.zeros_like(tensor))

    def test_each_row_has_its_own(self, kernels, dtype):
        tensors = [torch.ones(5, 70, dtype=dtype, device=DEVICE), random(100, dtype)]
        expected = [t.clone() for t in tensors]
        coefficients_R = torch.tensor(
            [0.5, 1.0, 0.0, 0.25, 2.0**-70, 0.5], dtype=torch.float64, device=DEVICE
        )
        scale_(kernels, Batch.of(tensors, [5, 1]), coefficients_R)
        expected[0] = (expected[0].double() * coefficients_R[:5, None]).to(dtype)
        expected[1] = (expected[1].double() * 0.5).to(dtype)
        for tensor, wanted in zip(tensors, expected, strict=True):
            assert torch.equal(tensor, wanted)


@pytest.mark.smoke
def test_a_coefficient_that_float32_cannot_hold(kernels):
    tensor = torch.full((100,), 3e38, device=DEVICE)
    scale_(kernels, Batch.of([tensor]), 1.23456e-42)
    torch.testing.assert_close(tensor.cpu(), torch.full((100,), 3.70368e-4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("limit", [0.0, 0.3, 1e300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_clamping_counts_and_sums_on_the_way(kernels, dtype, limit):
    tensors = [*ragged(dtype), torch.tensor([inf, -inf, 0.1, -0.1], dtype=dtype, device=DEVICE)]
    before = [t.clone() for t in tensors]
    # The limit as the dtype has it: 0.3 is 0.3008 in bfloat16.
    top = float(torch.tensor(min(limit, torch.finfo(dtype).max), dtype=dtype))
    expected = [t.clamp(-top, top) for t in tensors]
    clamped = kernels.clamp_(Batch.of(tensors), limit, True)
    for tensor, wanted in zip(tensors, expected, strict=True):
        assert torch.equal(tensor, wanted)
    changed = sum(int((a != b).sum()) for a, b in zip(before, expected, strict=True))
    assert int(clamped.changed) == changed > 0
    for sums_RA, of in ((clamped.before_RA, before), (clamped.after_RA, expected)):
        rtol = 1e-13 if dtype is torch.float64 else 1e-6
        torch.testing.assert_close(root(sums_RA, 2.0), truth(of, 2.0), rtol=rtol, atol=0)


def test_what_clamping_leaves_is_known_without_a_write(kernels):
    tensors = ragged(torch.float32)
    before = [t.clone() for t in tensors]
    seen = kernels.clamp_(Batch.of(tensors), 0.3, False)
    assert all(torch.equal(tensor, was) for tensor, was in zip(tensors, before, strict=True))
    done = kernels.clamp_(Batch.of(tensors), 0.3, True)
    assert int(seen.changed) == int(done.changed) > 0
    assert torch.equal(seen.before_RA, done.before_RA)
    assert torch.equal(seen.after_RA, done.after_RA)
    assert not torch.equal(tensors[-1], before[-1])


def test_a_nan_is_not_clamped_and_shows(kernels):
    tensor = torch.tensor([nan, 5.0, -5.0], device=DEVICE)
    clamped = kernels.clamp_(Batch.of([tensor]), 1.0, True)
    assert tensor[0].isnan()
    assert tensor[1:].tolist() == [1.0, -1.0]
    assert int(clamped.changed) == 2
    assert clamped.before_RA.isnan().all()


@pytest.mark.parametrize("numbers", [True, False])
@pytest.mark.parametrize("counts", [True, False])
def test_coefficients(kernels, counts, numbers):
    norms_S = torch.tensor([0.0, 1.0, 2.0, 1e300, inf, nan] * 5, dtype=torch.float64, device=DEVICE)
    limits = 2.0 if numbers else torch.full_like(norms_S, 2.0)
    flag = torch.tensor(counts, device=DEVICE)
    found = kernels.coefficients(norms_S, limits, limits, flag, 2.0**-21, 0.0)
    expected = (
        choose("foreach").on(DEVICE).coefficients(norms_S, limits, limits, flag, 2.0**-21, 0.0)
    )
    torch.testing.assert_close(found, expected, rtol=1e-15, atol=0, equal_nan=True)


def test_what_is_not_one_stretch_of_memory_is_measured_and_scaled_too(kernels):
    strided = torch.arange(40.0, device=DEVICE).reshape(5, 8)[:, ::2]
    transposed = torch.arange(12.0, device=DEVICE).reshape(3, 4).t()
    before = [strided.clone(), transposed.clone()]
    for tensor, was in zip((strided, transposed), before, strict=True):
        batch = Batch.of([tensor])
        torch.testing.assert_close(measured(kernels, batch, 2.0), truth([was], 2.0))
        scale_(kernels, batch, 0.5)
        assert torch.equal(tensor, was * 0.5)


def test_elements_beyond_two_to_the_31(kernels, monkeypatch):
    """Only what is touched takes memory on the CPU; on a GPU the tensor takes 4.3 GB."""
    monkeypatch.setattr(triton_plan, "CHUNK", 1 << 30)
    make = torch.zeros if ON_GPU else torch.empty
    tensor = make((1 << 31) + 20, dtype=torch.float16, device=DEVICE)
    tensor[-20:] = 0.0
    tensor[-17:] = 2.0
    batch = Batch.of([tensor])
    plan = batch.specs.plan(triton_plan.Chunks)
    assert plan.table.on(torch.device("cpu"))[-1].tolist() == [0, 1 << 31, 20, 0]
    if not ON_GPU:  # the interpreter would take hours for the chunks before the last
        plan.chunks = 1
        last = plan.table.on(DEVICE)[-1:]
        plan.table = Table(last)
        plan.firsts = Table(torch.tensor([0, 1]))
    assert kernels.power_sums(batch, 2.0).tolist() == [[68.0]]
    scale_(kernels, batch, 0.5)
    assert tensor[-20:].tolist() == [0.0] * 3 + [1.0] * 17


# --- through the clipper -----------------------------------------------------------------------


def model(dtypes=(torch.float32, torch.bfloat16, torch.float64), scale=1.0):
    parameters = []
    for number, length in enumerate((5, 64, 150, 1, 0, 33)):
        dtype = dtypes[number % len(dtypes)]
        parameter = torch.nn.Parameter(torch.zeros(length, dtype=dtype, device=DEVICE))
        parameter.grad = random(length, dtype, number, scale)
        parameters.append(parameter)
    return parameters


@pytest.mark.parametrize(
    "policy",
    [1.0, 1e9, 0.0, NormClip(max_norm=1.0, norm_type=inf), NormClip(max_norm=1.0, norm_type=1.0),
     NormClip(max_norm=1.0, norm_type=3.0), ValueClip(clip_value=0.25), ObserveClip()],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("grad_scale", [None, 4.0])
def test_a_clipper_answers_as_the_reference_does(policy, grad_scale):
    ours, theirs = model(), model()
    result = GradientClipper(ours, policy, backend="triton").clip(grad_scale).to_host()
    wanted = GradientClipper(theirs, policy, backend="reference").clip(grad_scale).to_host()
    for name in ("norm_pre", "norm_post", "coefficient", "threshold"):
        assert getattr(result, name) == pytest.approx(getattr(wanted, name), rel=1e-6), name
    assert (result.clipped, result.skipped) == (wanted.clipped, wanted.skipped)
    for a, b in zip(ours, theirs, strict=True):
        eps = max(torch.finfo(a.dtype).eps, 1e-6)
        torch.testing.assert_close(a.grad, b.grad, rtol=eps, atol=0)


@pytest.mark.parametrize("policy", [1.0, ValueClip(clip_value=0.25)], ids=str)
@pytest.mark.parametrize("nonfinite", ["skip", "propagate", "raise"])
def test_a_nan_ends_as_with_the_other_backends(policy, nonfinite):
    def run(backend):
        parameters = model()
        parameters[2].grad[70] = nan
        clipper = GradientClipper(parameters, policy, nonfinite=nonfinite, backend=backend)
        try:
            stats = clipper.clip().to_host()
        except RuntimeError as error:
            return [p.grad for p in parameters], str(error)
        return [p.grad for p in parameters], (stats.skipped, stats.nonfinite)

    ours, said = run("triton")
    theirs, wanted = run("reference")
    assert said == wanted
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0, equal_nan=True)


def test_autograd_learns_of_what_was_written():
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0], device=DEVICE))
    (gradient,) = torch.autograd.grad((weight**3).sum(), weight, create_graph=True)
    weight.grad = gradient
    later = (gradient * gradient).sum()
    GradientClipper([weight], 1.0, backend="triton").clip()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(later, weight)


def test_threads_with_models_of_one_shape_do_not_meet():
    """The functions share what they know of shapes, but not where the gradients are."""
    addresses = Addresses(torch.device("cpu"), 1)
    wrong = []

    def ask(mine):
        for _ in range(3000):
            wrong.extend(set(addresses.of([mine]).tolist()) - {mine})

    threads = [Thread(target=ask, args=(number,)) for number in range(1, 4)]
    patience = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as they can
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(patience)
    assert not wrong


def test_gradients_that_come_go_and_move_are_planned_anew():
    parameters = model()
    clipper = GradientClipper(parameters, 1e9, backend="triton")

    def check():
        truth = oracle.norm([p.grad.cpu() for p in parameters if p.grad is not None])
        assert float(clipper.clip().norm_pre) == pytest.approx(truth, rel=1e-6)

    check()
    kept = [p.grad for p in parameters]
    parameters[2].grad = parameters[2].grad * 2  # elsewhere
    check()
    parameters[0].grad.mul_(3)  # in place
    check()
    parameters[1].grad = None
    check()
    parameters[1].grad = kept[1]
    check()
    parameters[3].grad = torch.full_like(kept[3], 7.0)
    check()
    parameters[2].data = parameters[2].data.float()
    parameters[2].grad = kept[2].float()  # another dtype
    check()


def test_zeroed_again_and_again_as_training_does():
    weight = torch.nn.Parameter(torch.ones(100, device=DEVICE))
    clipper = GradientClipper([weight], 1.0, backend="triton")
    for step in range(1, 6):
        weight.grad = None
        (weight * step).sum().backward()
        assert float(clipper.clip().norm_pre) == pytest.approx(10.0 * step)
        assert float(weight.grad.norm()) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.smoke
def test_the_function_too(monkeypatch):
    monkeypatch.setenv("GRADCLIP_BACKEND", "triton")
    parameters = model()
    truth = oracle.norm([p.grad.cpu() for p in parameters])
    assert float(clip_grad_norm_(parameters, 1.0)) == pytest.approx(truth, rel=1e-6)
    assert oracle.norm([p.grad.cpu() for p in parameters]) == pytest.approx(1.0, rel=1e-2)
