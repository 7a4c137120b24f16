"""The operations of each backend, for matrices of one row and of many, on both of their paths."""

from math import inf

import pytest
import torch

from gradclip.clipping.kernels import Batch, carry_out, choose, device, foreach, total
from pairwise import pairwise

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(), (0,), (1,), (127,), (128,), (129,), (9000,), (3, 5), (4, 2500), (2, 3, 700)]
SHAPES += [(5, 3, 256), (2, 33_000), (3, 0)]


KERNELS = ["foreach", "reference", "foreach as on an accelerator", "no float64"]


@pytest.fixture(params=KERNELS)
def kernels(request, monkeypatch):
    name = request.param.split()[0]
    if request.param == "foreach as on an accelerator":
        monkeypatch.setattr(foreach, "_on_cpu", lambda batch: False)
    if request.param == "no float64":
        monkeypatch.setattr(foreach, "_on_cpu", lambda batch: False)
        monkeypatch.setattr(device, "_WITHOUT_FLOAT64", frozenset({"cpu"}))
        name = "foreach"
    return choose(name).on(torch.device("cpu"))


def scale_(kernels, batch, coefficients):
    carry_out(kernels.scaling(batch, coefficients))


def tensors_of(dtype):
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for shape in SHAPES]


def as_rows(tensors):
    """Many rows for the tensors that have a leading dimension, one for the others."""
    return [t.shape[0] if t.dim() > 1 else 1 for t in tensors]


def truth(tensors, rows, p):
    """Each row's norm, from float64."""
    norms = [
        torch.linalg.vector_norm(row, p) if row.numel() else torch.tensor(0.0)
        for tensor, n in zip(tensors, rows, strict=True)
        for row in tensor.double().reshape(n, -1)
    ]
    return torch.stack([norm.double() for norm in norms])


class TestSums:
    @pytest.mark.smoke
    @pairwise("kernels", kernels=KERNELS, dtype=DTYPES, many=[False, True], p=[1.0, 2.0])
    def test_power_sums(self, kernels, dtype, many, p):
        tensors = tensors_of(dtype)
        rows = as_rows(tensors) if many else [1] * len(tensors)
        before = [t.clone() for t in tensors]
        sums_RA = kernels.power_sums(Batch.of(tensors, rows), p)
        assert sums_RA.dtype is torch.float64
        torch.testing.assert_close(
            sums_RA[:, 0] ** (1 / p), truth(tensors, rows, p), rtol=2e-7, atol=0
        )
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))

    @pairwise("kernels", kernels=KERNELS, dtype=DTYPES, many=[False, True])
    def test_abs_max(self, kernels, dtype, many):
        tensors = tensors_of(dtype)
        rows = as_rows(tensors) if many else [1] * len(tensors)
        maxima_R = kernels.abs_max(Batch.of(tensors, rows))[:, 0]
        torch.testing.assert_close(maxima_R, truth(tensors, rows, inf), rtol=0, atol=0)

    @pairwise("kernels", kernels=KERNELS, dtype=DTYPES, many=[False, True], p=[0.5, 3.0])
    def test_scaled_power_sums(self, kernels, dtype, many, p):
        tensors = tensors_of(dtype)
        rows = as_rows(tensors) if many else [1] * len(tensors)
        scale_R = torch.linspace(0.5, 3, sum(rows), dtype=torch.float64)
        norms_R = (
            kernels.scaled_power_sums(Batch.of(tensors, rows), p, scale_R)[:, 0] ** (1 / p)
            * scale_R
        )
        torch.testing.assert_close(norms_R, truth(tensors, rows, p), rtol=1e-12, atol=0)


@pairwise(
    "kernels",
    kernels=KERNELS,
    dtype=DTYPES,
    position=[0, 1, 126, 127, 128, 8191, 8999],
    value=[float("nan"), inf, -inf],
)
def test_nothing_non_finite_is_lost(kernels, dtype, position, value):
    tensor = torch.ones(9000, dtype=dtype)
    tensor[position] = value
    expected = torch.tensor(value).abs().double()
    batch = Batch.of([tensor, tensor[:10].clone().fill_(1)])
    for sums in (
        kernels.power_sums(batch, 2.0),
        kernels.power_sums(batch, 1.0),
        kernels.abs_max(batch),
    ):
        torch.testing.assert_close(sums[0, 0], expected, equal_nan=True)
        assert sums[1].isfinite().any()


@pytest.mark.parametrize("magnitude", [1e-300, 1e-170, 1e-20, 1.0, 1e150, 1e300])
def test_one_of_three_sums_of_squares_is_in_range(kernels, magnitude):
    tensor = torch.full((9001,), magnitude, dtype=torch.float64)
    middle, down, up = kernels.power_sums(Batch.of([tensor]), 2.0)[0].tolist()
    truths = [9001**0.5 * magnitude * scale for scale in (1.0, 2.0**-600, 2.0**600)]
    assert any(
        0 < total < inf and abs(total**0.5 / true - 1) < 1e-13
        for total, true in zip((middle, down, up), truths, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
class TestScale:
    def test_one_coefficient_for_all(self, kernels, dtype):
        tensors = tensors_of(dtype)
        expected = [(t.double() * 0.3).to(dtype) for t in tensors]
        scale_(kernels, Batch.of(tensors), torch.tensor([0.3], dtype=torch.float64))
        for tensor, wanted in zip(tensors, expected, strict=True):
            rounding = torch.finfo(dtype).eps
            torch.testing.assert_close(tensor, wanted, rtol=rounding, atol=0)

    def test_one_coefficient_per_row(self, kernels, dtype):
        tensors = tensors_of(dtype)
        rows = as_rows(tensors)
        coefficients_R = torch.linspace(0.1, 1.0, sum(rows), dtype=torch.float64)
        expected = []
        for tensor, factors in zip(tensors, coefficients_R.split(rows), strict=True):
            shape = (-1, *(1,) * (tensor.dim() - 1)) if tensor.dim() > 1 else ()
            expected.append((tensor.double() * factors.reshape(shape)).to(dtype))
        scale_(kernels, Batch.of(tensors, rows), coefficients_R)
        for tensor, wanted in zip(tensors, expected, strict=True):
            torch.testing.assert_close(tensor, wanted, rtol=torch.finfo(dtype).eps, atol=0)

    def test_the_coefficient_is_not_rounded_to_a_coarse_dtype(self, kernels, dtype):
        """torch rounds a number to bfloat16 before it multiplies a list of tensors by it."""
        tensor = torch.ones(2000, dtype=dtype)
        scale_(kernels, Batch.of([tensor]), torch.tensor([0.00284025], dtype=torch.float64))
        expected = torch.full((2000,), 0.00284025, dtype=torch.float64).to(dtype)
        assert torch.equal(tensor, expected)


def test_a_coefficient_that_float32_cannot_hold(request):
    """1e-42 is a float32 with 9 bits; two steps keep the product right."""
    for name in ("foreach", "reference"):
        tensor = torch.full((5,), 3e38)
        kernels = choose(name).on(torch.device("cpu"))
        scale_(kernels, Batch.of([tensor]), torch.tensor([1.23456e-42], dtype=torch.float64))
        torch.testing.assert_close(tensor, torch.full((5,), 3.70368e-4), rtol=1e-6, atol=0)


@pytest.mark.smoke
@pairwise("kernels", kernels=KERNELS, dtype=DTYPES, limit=[0.0, 0.25, 1e10])
def test_clamp(kernels, dtype, limit):
    extremes = [torch.tensor([inf, -inf, 0.1]), torch.tensor([float("nan"), 0.1])]
    tensors = [*tensors_of(dtype), *(t.to(dtype) for t in extremes)]
    top = min(limit, torch.finfo(dtype).max)
    expected = [t.clamp(-top, top) for t in tensors]
    before = [t.clone() for t in tensors]
    clamped = kernels.clamp_(Batch.of(tensors), limit, True)
    assert int(clamped.changed) > 0
    for sums_RA, of in ((clamped.before_RA, before), (clamped.after_RA, expected)):
        norms_R = truth(of, [1] * len(of), 2.0)
        torch.testing.assert_close(sums_RA[:, 0].sqrt(), norms_R, rtol=2e-7, atol=0, equal_nan=True)
    for tensor, wanted in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=0, equal_nan=True)
    assert int(kernels.clamp_(Batch.of(tensors), max(limit, 0.25), True).changed) == 0


@pytest.mark.parametrize("many", [False, True])
def test_a_coefficient_of_zero_sets_zeros_whatever_was_there(kernels, many):
    tensor = torch.tensor([[1.0, inf], [2.0, float("nan")], [3.0, inf]])
    batch = Batch.of([tensor], [3] if many else None)
    scale_(kernels, batch, torch.tensor([0.0, 0.5, 0.0] if many else [1.0], dtype=torch.float64))
    assert tensor[1, 0] == (1.0 if many else 2.0)
    assert tensor[0].tolist() == ([0.0, 0.0] if many else [1.0, inf])
    scale_(kernels, Batch.of([tensor]), torch.zeros(1, dtype=torch.float64))
    assert torch.equal(tensor, torch.zeros_like(tensor))


def test_a_gathered_float64_tensor_is_not_written():
    """A single contiguous tensor is gathered without a copy."""
    tensors = [torch.full((10,), 3.0, dtype=torch.float64) for _ in range(20)]
    foreach.power_sums(Batch.of(tensors), 2.0)
    foreach.abs_max(Batch.of(tensors))
    assert all(t.sum() == 30 for t in tensors)


def test_more_small_tensors_than_are_gathered_at_once(monkeypatch):
    monkeypatch.setattr(total, "GATHERED", 100)
    tensors = [torch.full((n,), float(n)) for n in range(60)]
    sums = foreach.power_sums(Batch.of(tensors), 2.0)[:, 0].tolist()
    assert sums == [float(n) ** 3 for n in range(60)]


@pairwise(
    "kernels",
    kernels=KERNELS,
    dtype=DTYPES,
    shape=[(2048,), (16, 128)],
    odd=[None, 0.0, 1e-30, 1e30, inf, float("nan")],
)
def test_tensors_of_one_shape_that_are_gathered_in_lanes(kernels, dtype, shape, odd):
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype) for _ in range(200)]
    if odd is not None:
        value = torch.tensor(odd, dtype=torch.float64).to(dtype)
        tensors[7].fill_(1.0).view(-1)[5] = value
        tensors[8].fill_(value)
    norms_R = kernels.power_sums(Batch.of(tensors), 2.0)[:, 0].sqrt()
    expected_R = truth(tensors, [1] * len(tensors), 2.0)
    torch.testing.assert_close(norms_R, expected_R, rtol=2e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_a_matrix_are_each_in_range(dtype):
    """Zeros, squares that vanish or overflow, and a NaN spoil no other row."""
    torch.manual_seed(0)
    matrix = torch.randn(7, 512)
    for row, size in enumerate((1.0, 0.0, 1e-4, 1e4, 1e-30, 1e30)):
        fits = dtype is not torch.float16 or 1e-5 < size < 1e5
        matrix[row] *= size if fits else 1.0
    matrix = matrix.to(dtype)
    matrix[6, 3] = torch.nan
    tensors = [matrix, torch.ones(3, dtype=dtype)]
    for top in (inf, 0.5):
        batch = Batch.of(tensors, [7, 1]).limited(top)
        clamped = [tensor.double().clamp(-top, top) for tensor in tensors]
        sums_RA = choose("foreach").on(torch.device("cpu")).power_sums(batch, 2.0)
        expected = truth(clamped, [7, 1], 2.0)
        torch.testing.assert_close(
            sums_RA[:, 0].sqrt(), expected, rtol=2e-7, atol=0, equal_nan=True
        )
