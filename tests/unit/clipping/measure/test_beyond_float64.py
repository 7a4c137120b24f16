"""Float64 gradients whose norm, or whose coefficient, no float64 is precise enough for."""

import math
from typing import Literal

import pytest
import torch

import oracle
from gradclip import GradientClipper, NormClip, ObserveClip, ValueClip, clip_grads_with_norm_
from gradclip.clipping import Policy, flags
from gradclip.clipping.kernels import foreach
from gradclip.clipping.policies import Decision
from gradclip.clipping.step.nonfinite import SkipCounter
from gradclip.config import Ceiling, NormOrder
from pairwise import pairwise

F64, C64, C128 = torch.float64, torch.complex64, torch.complex128
LARGEST = torch.finfo(F64).max
ORDERS = [0.5, 1.0, 2.0, 3.0, math.inf]

pytestmark = [
    # NumPy runs Triton's interpreter, and says what a GPU does silently.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


class Limit(Policy):
    """Gives each scope one limit."""

    scope: Literal["group", "tensor", "unit"] = "group"
    clip_mode: Literal["test-limit"] = "test-limit"
    max_norm: Ceiling
    norm_type: NormOrder = 2.0

    @property
    def order(self):
        return self.norm_type

    def decide(self, seen, state):
        limits_S = torch.full_like(seen.norms_S, self.max_norm)
        return Decision(limits_S, limits_S)


@pytest.fixture(params=["the host reads", "the host reads nothing"])
def reading(request, monkeypatch):
    """As on a CPU, and as on an accelerator."""
    if request.param == "the host reads nothing":
        monkeypatch.setattr(foreach, "_on_cpu", lambda batch: False)
        monkeypatch.setattr(flags, "host_waits_for", lambda device: True)
        monkeypatch.setattr(SkipCounter, "record", lambda self, *given, expected: False)


def check(params, result, limit, p):
    """The norm afterwards is the limit, from below; what is reported fits."""
    after = oracle.norm(oracle.gradients(params), p)
    assert limit * (1 - 1e-12) <= after <= limit
    stats = result.to_host()
    assert (stats.clipped, stats.skipped, stats.nonfinite) == (True, False, 0)
    assert stats.norm_pre <= LARGEST
    assert stats.norm_post == pytest.approx(limit, rel=1e-12)
    assert 0 < stats.coefficient < 1


@pairwise(p=ORDERS, backend=[*oracle.BACKENDS, "triton"], limit=[1.0, 1e-20, 1e300])
def test_a_norm_that_no_float64_is(p, backend, limit):
    """Of [1.7e308] * 4 the norm is 3.4e308: clipped to 1, it was 1.891."""
    if backend == "triton":
        pytest.importorskip("triton")
    params = oracle.parameters(torch.full((4,), 1.7e308, dtype=F64), torch.ones(2, dtype=F64))
    policy = NormClip(max_norm=limit, norm_type=p)
    check(params, GradientClipper(params, policy, backend=backend).clip(), limit, p)


@pairwise("reading", reading=["the host reads", "the host reads nothing"], p=ORDERS)
def test_finite_parts_whose_modulus_no_float64_is(reading, p):
    """complex128 with parts of 1.7e308 has moduli of 2.4e308: it was infinite, and skipped."""
    largest = torch.full((3,), complex(1.7e308, -1.7e308), dtype=C128)
    params = oracle.parameters(largest, torch.ones(2, dtype=F64))
    check(params, GradientClipper(params, NormClip(max_norm=1.0, norm_type=p)).clip(), 1.0, p)


@pairwise(
    "reading",
    reading=["the host reads", "the host reads nothing"],
    value=[1e300, 1e-5],
    grad_scale=[1e-20, 1e-310, 1e20],
    p=[1.0, 2.0, 3.0, math.inf],
)
def test_scales_that_lead_out_of_float64(reading, value, grad_scale, p):
    """1e300 with a scale of 1e-20 is 1e320: it was infinite, and skipped."""
    params = oracle.parameters(torch.full((4,), value, dtype=F64))
    true = value / 1e20 / grad_scale * 1e20 if grad_scale > 1 else math.inf
    limit = min(true, 1e10) / 4
    result = GradientClipper(params, NormClip(max_norm=limit, norm_type=p)).clip(grad_scale)
    # The gradients are still multiplied by the scale, and may have become subnormal by it.
    if limit * grad_scale > 1e-290:
        check_scaled(params, result, limit, grad_scale, p)
    assert not bool(result.skipped)
    assert int(result.nonfinite) == 0


def check_scaled(params, result, limit, grad_scale, p):
    after = oracle.norm(oracle.gradients(params), p)
    assert after / grad_scale == pytest.approx(limit, rel=1e-12)
    assert float(result.norm_post) == pytest.approx(limit, rel=1e-12)
    assert bool(result.clipped)


def test_a_norm_beyond_float64_before_it_is_unscaled():
    """[1.7e308] * 4 with a scale of 65536 has the norm 5.19e303, which is a float64."""
    params = oracle.parameters(torch.full((4,), 1.7e308, dtype=F64))
    result = GradientClipper(params, ObserveClip()).clip(65536.0)
    assert float(result.norm_pre) == pytest.approx(1.7e308 / 65536 * 2, rel=1e-13)


@pairwise("reading", reading=["the host reads", "the host reads nothing"],
          scope=["group", "tensor", "unit"], p=[1.0, 2.0, 3.0, math.inf])  # fmt: skip
@pytest.mark.parametrize(("value", "limit"), [(1e300, 3e-23), (1.7e308, 1.0), (1.7e308, 1e-15)])
def test_every_scope_has_a_precise_coefficient(reading, scope, p, value, limit):
    """A norm of 1.4e300 and a target of 3e-23 have a quotient of 2.1e-323: it was 6.8 % low."""
    params = oracle.parameters(
        torch.full((2, 4), value, dtype=F64), torch.tensor([3.0, 4.0], dtype=F64)
    )
    result = GradientClipper(params, Limit(scope=scope, max_norm=limit, norm_type=p)).clip()
    rows = {
        "group": [oracle.gradients(params)],
        "tensor": [[params[0].grad], [params[1].grad]],
        "unit": [[params[0].grad[0]], [params[0].grad[1]], [params[1].grad]],
    }[scope]
    for row in rows:
        assert limit * (1 - 1e-12) <= oracle.norm(row, p) <= limit
    assert not bool(result.skipped)
    assert float(result.norm_post) == pytest.approx(
        oracle.norm([torch.tensor([limit] * len(rows), dtype=F64)], p), rel=1e-12
    )


def test_a_small_order_has_a_large_norm():
    """With p = 0.01 a hundred ones have the norm 1e200, and ten thousand one beyond float64."""
    for count in (100, 10_000):
        params = oracle.parameters(torch.ones(count))
        result = GradientClipper(params, NormClip(max_norm=1.0, norm_type=0.01)).clip()
        assert math.isfinite(float(result.norm_pre))
        assert not bool(result.skipped)


@pytest.mark.parametrize("odd", [math.inf, math.nan])
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("dtype", [F64, C128])
def test_what_is_not_finite_is_not_taken_for_large(dtype, p, odd):
    params = oracle.parameters(
        torch.full((4,), 1.7e308, dtype=dtype), torch.tensor([odd, 1.0], dtype=dtype)
    )
    result = GradientClipper(params, NormClip(max_norm=1.0, norm_type=p)).clip()
    assert bool(result.skipped)
    assert int(result.nonfinite) == 1
    assert not math.isfinite(float(result.norm_pre))


def test_values_are_clamped_whatever_the_norm_is():
    params = oracle.parameters(torch.full((4,), 1.7e308, dtype=F64), torch.ones(2, dtype=F64))
    result = GradientClipper(params, ValueClip(clip_value=2.0)).clip()
    assert params[0].grad.tolist() == [2.0] * 4
    assert params[1].grad.tolist() == [1.0] * 2
    assert float(result.norm_post) == pytest.approx(math.sqrt(18), rel=1e-13)


def test_a_known_norm_with_a_tiny_quotient():
    params = oracle.parameters(torch.full((2,), 1e300, dtype=F64))
    clip_grads_with_norm_(params, 3e-23, oracle.norm(oracle.gradients(params)))
    assert 3e-23 * (1 - 1e-12) <= oracle.norm(oracle.gradients(params)) <= 3e-23
