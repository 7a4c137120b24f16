"""What is asked of all gradients together: one sum, of as few stretches of memory as there are."""

from math import inf, isnan, nan

import numpy as np
import pytest
import torch
from torch.autograd.profiler import profile

import oracle
from gradclip import GradientClipper, NormClip
from gradclip.clipping.kernels import Batch, halves
from pairwise import pairwise

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
SHAPES = [(), (0,), (7,), (300,), (3, 5), (1000, 3), (64, 32), (5, 400), (130, 130), (3, 9001)]


def placed(values, order, hole=0):
    """Put tensors into one buffer, in some order, with a NaN in each hole between two of them."""
    room = sum(value.numel() + hole for value in values)
    buffer, views, start = torch.full((room,), nan, dtype=values[0].dtype), {}, 0
    for index in order(range(len(values))):
        value = values[index]
        view = buffer[start : start + value.numel()].view(value.shape)
        views[index] = view.copy_(value)
        start += value.numel() + hole
    return [views[index] for index in range(len(values))]


PLACES = {
    "apart": lambda values: [value.clone() for value in values],
    "adjacent": lambda values: placed(values, list),
    "backwards": lambda values: placed(values, reversed),
    "with holes": lambda values: placed(values, list, hole=1),
    "half and half": lambda values: placed(values[:5], list) + placed(values[5:], reversed, hole=3),
    "transposed": lambda values: [v.t().contiguous().t() if v.dim() > 1 else v for v in values],
    "with gaps": lambda values: [torch.stack([v, v], -1)[..., 0] for v in values],
}


@pairwise(
    place=list(PLACES),
    dtype=DTYPES,
    p=[1.0, 2.0, inf],
    scale=[0.0, 1e-42, 1e-30, 1.0, 1e30],
    odd=[None, nan, inf, 1e25, 1e-25],
    probed=[True, False],
)
def test_the_total_is_that_of_all_elements(place, dtype, p, scale, odd, probed, monkeypatch):
    monkeypatch.setattr(halves, "can_sum", lambda: probed)
    values = [(oracle.randn(*shape, seed=i) * scale).to(dtype) for i, shape in enumerate(SHAPES)]
    if odd is not None:
        values[8].view(-1)[7] = odd
    parameters = oracle.parameters(*PLACES[place](values))
    policy = NormClip(max_norm=inf, norm_type=p)
    result = GradientClipper(parameters, policy, nonfinite="propagate").clip()
    truth = nan if odd is not None and isnan(odd) else oracle.norm(values, p)
    np.testing.assert_allclose(float(result.measured_S), truth, rtol=3e-7)
    finite = all(bool(value.isfinite().all()) for value in values)
    assert (result.tensor_sums_T is None) == finite
    assert int(result.nonfinite) == sum(not bool(v.isfinite().all()) for v in values)
    for parameter, value in zip(parameters, values, strict=True):
        torch.testing.assert_close(parameter.grad, value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_that_float32_loses_are_counted_in_float64(dtype):
    values = [(oracle.randn(*shape, seed=1) * 1e-30).to(dtype) for shape in ((64, 32), (130, 130))]
    clipper = GradientClipper(oracle.parameters(*values), NormClip(max_norm=inf))
    assert float(clipper.clip().norm_pre) == pytest.approx(oracle.norm(values), rel=3e-7, abs=0)


@pytest.mark.parametrize("order", [list, reversed])
def test_adjacent_gradients_are_read_and_written_as_one(order):
    parameters = [torch.nn.Parameter(torch.zeros(10)) for _ in range(100)]
    clipper = GradientClipper(parameters, 1.0)
    for _ in range(3):  # other memory each time
        views = list(order(torch.ones(1000).split(10)))
        for parameter, view in zip(parameters, views, strict=True):
            parameter.grad = view
        versions = [view._version for view in views]
        with profile() as made:
            result = clipper.clip()
        names = [each.name for each in made.function_events]
        assert names.count("aten::mul_") == 1
        assert len(names) < 100
        assert float(result.norm_pre) == pytest.approx(1000**0.5)
        for view, version in zip(views, versions, strict=True):
            torch.testing.assert_close(view, torch.full((10,), 1000**-0.5))
            assert view._version > version


def test_memory_that_is_adjacent_by_chance_is_not_joined():
    memory = np.ones(30, dtype=np.float32)
    tensors = [torch.from_numpy(memory[:10]), torch.from_numpy(memory[10:])]
    assert len(Batch.of(tensors).joined().tensors) == 2
    buffer = torch.zeros(20)
    mixed = [buffer[:3], buffer[3:5].view(torch.bfloat16), buffer[5:7]]
    assert len(Batch.of(mixed).joined().tensors) == 3
    with_hole = [buffer[:3], buffer[3:3], buffer[3:5], buffer[6:8]]
    assert [len(each) for each in Batch.of(with_hole).joined().tensors] == [5, 2]


def test_gradients_that_move_apart_are_found_apart():
    """A layout is remembered, and looked at again where an address changed."""
    buffer = torch.arange(12.0)
    layouts = [
        list(buffer.split(4)),
        [buffer[4:8], buffer[:4], buffer[8:]],
        [buffer[:4], torch.arange(4.0, 8.0), buffer[8:]],
    ]
    weights = [torch.nn.Parameter(torch.zeros(4)) for _ in range(3)]
    clipper = GradientClipper(weights, NormClip(max_norm=inf, norm_type=1.0))
    for layout in [*layouts, *reversed(layouts)]:
        for weight, gradient in zip(weights, layout, strict=True):
            weight.grad = gradient
        assert float(clipper.clip().norm_pre) == 66.0


def test_what_is_skipped_was_counted_before_it_was_zeroed():
    weights = oracle.parameters(torch.ones(3), torch.tensor([1.0, nan]), torch.tensor([inf]))
    result = GradientClipper(weights, 1.0, nonfinite="skip").clip()
    assert not any(bool(weight.grad.any()) for weight in weights)
    assert int(result.nonfinite) == 2
    assert result.to_host().skip_reason == "nonfinite"
