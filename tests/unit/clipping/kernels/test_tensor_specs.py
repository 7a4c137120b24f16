"""What is recognised from one step to the next, and what is looked at anew."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

from gradclip import GradientClipper
from gradclip.clipping.collect import overlap
from gradclip.clipping.kernels import Batch, tensor_specs
from gradclip.clipping.kernels.tensor_specs import SpecsCache, TensorSpecs
from gradclip.errors import OverlappingGradientsError, UnsupportedGradientError

CHANGES = {
    "shape": torch.ones(4, 3),
    "strides": torch.ones(4, 3).t(),
    "dtype": torch.ones(3, 4, dtype=torch.bfloat16),
    "device": torch.ones(3, 4, device="meta"),
    "layout": torch.ones(3, 4).to_sparse(),
    "sign": torch._neg_view(torch.ones(3, 4)),
    "class": torch.nn.Parameter(torch.ones(3, 4)),
}


@pytest.fixture(params=["in one call", "one by one"])
def known(request, monkeypatch):
    """torch compares thousands of tensors in one call; without that it takes a little longer."""
    if request.param == "one by one":
        monkeypatch.setattr(tensor_specs, "_Guards", None)
    return SpecsCache(capacity=2)


@pytest.mark.parametrize("changed", CHANGES.values(), ids=CHANGES)
def test_any_change_is_seen(known, changed):
    before = torch.zeros(3, 4)
    found = known.add([torch.ones(2), before])
    assert known.find([torch.ones(2), torch.ones(3, 4)]) is found
    assert known.find([torch.ones(2), changed]) is None
    assert known.find([torch.ones(2)]) is None
    assert known.find([torch.ones(2), None]) is None


def test_the_layouts_used_last_are_kept(known):
    ones, twos, threes = ([torch.ones(n)] for n in (1, 2, 3))
    first, second = known.add(ones), known.add(twos)
    assert known.find(ones) is first
    known.add(threes)
    assert known.find(twos) is None
    assert known.find(ones) is first
    assert second is not first


def test_a_layout_keeps_no_gradient_alive(known):
    gradient = torch.ones(5)
    known.add([gradient])
    gone = weakref.ref(gradient)
    del gradient
    gc.collect()
    assert gone() is None


def test_the_parts_are_of_one_device_one_dtype_and_flat_or_not():
    tensors = [
        torch.ones(2, 3),
        torch.ones(4, dtype=torch.float64),
        torch.ones(6)[::2],
        torch.ones(3, 2).t(),
        torch.ones(5, dtype=torch.float64),
    ]
    batch = Batch.of(tensors, [2, 1, 1, 2, 1])
    parts = [
        ([tensors.index(t) for t in part.tensors], rows.on(torch.device("cpu")).tolist())
        for part, rows in _identified(batch.parts)
    ]
    # By rows a transposed matrix is not flat; as one row it is.
    assert parts == [([0], [0, 1]), ([1, 4], [2, 6]), ([2, 3], [3, 4, 5])]
    assert batch.specs.row_order.on(torch.device("cpu")).tolist() == [0, 1, 2, 4, 5, 6, 3]
    assert TensorSpecs.of(tensors).flat == [True, True, False, True, True]


def _identified(parts):
    """Tensors compare by identity here."""
    for part, rows in parts:
        yield Batch([_Same(t) for t in part.tensors], part.specs), rows


class _Same:
    def __init__(self, tensor):
        self.tensor = tensor

    def __eq__(self, other):
        return self.tensor is other

    __hash__ = None


def test_a_gradient_that_becomes_unsupported_is_found_at_that_step():
    module = torch.nn.Linear(4, 1, bias=False)
    module.weight.grad = torch.ones(1, 4)
    clipper = GradientClipper(module, 1.0)
    clipper.clip()
    module.weight = torch.nn.Parameter(torch.zeros(1, 4, device="meta"))
    module.weight.grad = torch.ones(1, 4, device="meta")
    with pytest.raises(UnsupportedGradientError, match="meta"):
        clipper.clip()


def test_gradients_that_come_to_overlap_are_found_at_that_step():
    shared = torch.full((6,), 3.0)
    weights = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.ones(4)
    clipper = GradientClipper(weights, 1.0)
    clipper.clip()
    weights[0].grad, weights[1].grad = shared[:4], shared[2:]
    for _ in range(2):  # not remembered as harmless
        with pytest.raises(OverlappingGradientsError):
            clipper.clip()
    assert shared.tolist() == [3.0] * 6
    weights[1].grad = torch.ones(4)
    clipper.clip()
    # The same addresses in other shapes.
    weights[1].data = torch.zeros(2)
    weights[0].grad, weights[1].grad = shared[:4], shared[4:]
    clipper.clip()


def test_several_small_channels_last_gradients():
    weights = [torch.nn.Parameter(torch.zeros(8, 3, 3, 3)) for _ in range(5)]
    for weight in weights:
        weight.grad = torch.randn(8, 3, 3, 3).to(memory_format=torch.channels_last)
    truth = torch.stack([weight.grad.double().norm() for weight in weights]).norm()
    result = GradientClipper(weights, 1.0).clip()
    assert float(result.norm_pre) == pytest.approx(float(truth), rel=1e-6)


def test_inference_tensors_are_refused_before_one_is_changed():
    weights = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    with torch.inference_mode():
        weights[1].grad = torch.ones(3)
    weights[0].grad = torch.ones(3)
    clipper = GradientClipper(weights, 1.0)
    with pytest.raises(UnsupportedGradientError, match="inference_mode"):
        clipper.clip()
    assert weights[0].grad.tolist() == [1.0] * 3


def test_a_result_can_be_copied_and_pickled():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    result = GradientClipper([weight], 1.0).clip()
    for copied in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert copied.to_host() == result.to_host()


def test_channels_last_gradients_are_found_apart_without_looking_at_bytes(monkeypatch):
    monkeypatch.setattr(overlap, "_check_extents", lambda *given: pytest.fail("looked at bytes"))
    weight = torch.nn.Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    weight.grad = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert float(GradientClipper([weight], 1.0).clip().norm_pre) == pytest.approx(120**0.5)
