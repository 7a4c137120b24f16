"""Corners where one rule meets another: wrappers, order, several groups, rounding."""

from math import inf, nan

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import gradclip
from gradclip import GradientClipper, NormClip, ValueClip, withhold
from gradclip.clipping.kernels import Batch, choose
from gradclip.errors import ArgumentValueError, NonFiniteGradientError, StateError


def parameter(*values, dtype=torch.float32):
    weight = torch.nn.Parameter(torch.zeros(len(values), dtype=dtype))
    weight.grad = torch.tensor(values, dtype=dtype)
    return weight


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_fused_optimizer_behind_a_wrapper_is_withheld(kind):
    """found_inf must reach the optimizer that reads it."""
    weight = torch.nn.Parameter(torch.ones(3))
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    inner = kind([weight], lr=0.1, weight_decay=0.1, fused=True, **options)
    optimizer = Accelerator(cpu=True).prepare(inner)
    weight.grad = torch.ones(3)
    optimizer.step()
    before, state = weight.detach().clone(), str(inner.state_dict())
    weight.grad = torch.tensor([nan, 1.0, 1.0])
    result = GradientClipper(optimizer, 1.0).clip()
    with withhold(optimizer, result.skipped):
        optimizer.step()
    assert torch.equal(weight, before)
    assert str(inner.state_dict()) == state
    assert not hasattr(inner, "found_inf")


@pytest.mark.parametrize(("value", "limit"), [(1e200, 1e-130), (1e308, 1e-20), (1e300, 1e-20)])
@pytest.mark.parametrize("backend", ["foreach", "reference"])
def test_a_coefficient_that_is_no_float64_at_all(value, limit, backend):
    weight = parameter(value, value, dtype=torch.float64)
    GradientClipper([weight], limit, backend=backend).clip()
    norm = float(torch.linalg.vector_norm(weight.grad / limit)) * limit
    assert limit * (1 - 1e-5) <= norm <= limit


class TestPropagateByPattern:
    """Every gradient is clipped or none is touched, whatever the policies are."""

    def test_a_nan_in_one_group_keeps_all(self):
        weights = {"a": parameter(3.0, 4.0), "b": parameter(nan, 1.0), "c": parameter(inf, 40.0)}
        before = {name: weight.grad.clone() for name, weight in weights.items()}
        policy = {"a": 1.0, "b": ValueClip(clip_value=0.5), "c": ValueClip(clip_value=2.0)}
        clipper = GradientClipper(list(weights.items()), policy, nonfinite="propagate")
        assert not clipper.clip().clipped
        for name, weight in weights.items():
            torch.testing.assert_close(weight.grad, before[name], equal_nan=True, rtol=0, atol=0)

    def test_a_ceiling_of_zero_waits_for_the_others(self):
        weights = {"a": parameter(3.0, 4.0), "b": parameter(inf, 1.0)}
        policy = {"a": 0.0, "b": NormClip(max_norm=1.0, norm_type=inf)}
        GradientClipper(list(weights.items()), policy, nonfinite="propagate").clip()
        assert weights["a"].grad.tolist() == [3.0, 4.0]
        assert weights["b"].grad.tolist() == [inf, 1.0]


def test_a_state_of_the_same_patterns_in_another_order_is_refused():
    """The first match wins, so another order is another policy."""
    weights = [("head.weight", parameter(1.0)), ("b.weight", parameter(1.0))]
    one = GradientClipper(weights, {"head.*": 1.0, "*.weight": 2.0})
    other = GradientClipper([weights[1], *weights[:1]], {"b*": 2.0, "head.*": 1.0})
    with pytest.raises(StateError):
        other.load_state_dict(one.state_dict())
    saved = one.state_dict()
    turned = saved | {"clip_modes": dict(reversed(saved["clip_modes"].items()))}
    with pytest.raises(StateError):
        one.load_state_dict(turned)


@pytest.mark.parametrize("backend", ["foreach", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_clamping_twice_is_not_clamping_again(backend, dtype):
    """0.3 is 0.3008 in bfloat16, which does not exceed it."""
    weight = parameter(1.0, -0.1, dtype=dtype)
    clipper = GradientClipper([weight], ValueClip(clip_value=0.3), backend=backend)
    assert bool(clipper.clip().clipped)
    assert not bool(clipper.clip().clipped)
    kernels = choose(backend).on(torch.device("cpu"))
    assert int(kernels.clamp_(Batch.of([weight.grad]), 0.3, True).changed) == 0


def test_total_norms_are_numbers_of_any_kind_and_not_negative():
    for norm in (5.0, 5, np.float32(5.0), torch.tensor(5.0), torch.tensor([5.0])):
        weight = parameter(3.0, 4.0)
        gradclip.clip_grads_with_norm_([weight], 1.0, norm)
        torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8]))
    for norm in (-5.0, torch.tensor(-5.0)):
        with pytest.raises(ArgumentValueError, match="-5"):
            gradclip.clip_grads_with_norm_([weight], 1.0, norm)


def test_the_tensor_at_fault_has_the_number_that_it_was_given_as():
    tensor = torch.ones(2)
    with pytest.raises(NonFiniteGradientError, match=r"tensors\[2\]"):
        gradclip.get_total_norm([tensor, tensor, torch.tensor([nan])], error_if_nonfinite=True)
