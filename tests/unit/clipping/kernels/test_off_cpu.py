"""Torch's own operations on accelerators: how many they are, and those without float64."""

from math import inf, isnan, nan

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from gradclip.clipping.kernels import Batch, blocks, carry_out, device, foreach


class Logged(TorchDispatchMode):
    """Notes every operation."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation.name())
        return operation(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def as_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(foreach, "_on_cpu", lambda batch: False)


VIEWS = {
    "aten::view",
    "aten::view.dtype",
    "aten::unsqueeze",
    "aten::lift_fresh",
    "aten::detach",
    "aten::slice.Tensor",
    "aten::select.int",
}


def logged(call):
    with Logged() as log:
        call()
    return [name for name in log.names if name not in VIEWS]


@pytest.mark.parametrize("zeroes", [True, False])
def test_as_many_operations_as_torch_takes(zeroes):
    parameters = [torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(148)]
    for parameter in parameters:
        parameter.grad = torch.ones(4, 4)
    theirs = logged(lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True))
    batch = Batch.of([parameter.grad for parameter in parameters])

    def clip():
        sums_RA = foreach.power_sums(batch, 2.0)
        carry_out(foreach.scaling(batch, 0.5 * sums_RA.sum(0), zeroes=zeroes))

    ours = logged(clip)
    assert len(ours) <= len(theirs) + 5, (ours, theirs)
    assert sum("_foreach" in name for name in ours) == 2 + zeroes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_factor_is_not_rounded_first_and_zero_sets_zeros(dtype):
    values = torch.tensor([[1.0, -3.0], [0.5, 7.0]]).to(dtype)
    tensors = [values.clone(), torch.tensor(5.0).to(dtype), torch.full((3,), 2.0, dtype=dtype)]
    precise = [t.to(torch.promote_types(dtype, torch.float32), copy=True) for t in tensors]
    carry_out(foreach.scaling(Batch.of(tensors), 0.3004, zeroes=True))
    for tensor, exact in zip(tensors, precise, strict=True):
        assert torch.equal(tensor, (exact * 0.3004).to(dtype))
    tensors[0][0, 0], tensors[2][1] = nan, inf
    carry_out(foreach.scaling(Batch.of(tensors), 0.0, zeroes=True))
    assert all(not tensor.any() for tensor in tensors)


@pytest.fixture
def without_float64(monkeypatch):
    """Nothing may be converted to float64 but sums; results are on the CPU."""

    def refuse(*given):
        raise AssertionError("a gradient was copied")

    monkeypatch.setattr(device, "_WITHOUT_FLOAT64", frozenset({"cpu", "mps"}))
    monkeypatch.setattr("gradclip.clipping.kernels.off_cpu.result_device_of", lambda devices: None)
    monkeypatch.setattr(blocks, "double_blocks", refuse)


@pytest.mark.usefixtures("without_float64")
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, inf])
@pytest.mark.parametrize("magnitude", [1e-42, 1e-30, 1.0, 1e30])
def test_a_device_without_float64_loses_nothing(p, magnitude):
    generator = torch.Generator().manual_seed(0)
    sizes = [(300, 700), (5,), (0,), (64, 3)]
    tensors = [torch.randn(size, generator=generator) * magnitude for size in sizes]
    tensors += [torch.zeros(9), torch.randn(8, 9, generator=generator).mul_(magnitude).t()]
    batch = Batch.of(tensors)
    if p == 3.0:
        scale_R = torch.full(
            (len(tensors),), float(max(t.abs().max() for t in tensors if t.numel()))
        )
        scale_R = scale_R.double()
        found = foreach.scaled_power_sums(batch, p, scale_R)[:, 0].pow(1 / p) * scale_R
    elif p == inf:
        found = foreach.abs_max(batch)[:, 0]
    else:
        found = foreach.power_sums(batch, p)[:, 0].pow(1 / p)
    truth = torch.tensor([oracle.norm([t], p) for t in tensors], dtype=torch.float64)
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("without_float64")
@pytest.mark.parametrize("value", [nan, inf, 3e38])
def test_a_device_without_float64_sees_what_is_not_finite(value):
    tensors = [torch.ones(10), torch.ones(100_000)]
    tensors[1][70_000] = value
    sums_R = foreach.power_sums(Batch.of(tensors), 2.0)[:, 0].tolist()
    expected = value if value != 3e38 else float(torch.tensor(value)) ** 2 + 99_999
    assert sums_R == [10.0, pytest.approx(expected, nan_ok=True)]
    clamped = foreach.power_sums(Batch.of(tensors).limited(2.0), 2.0)[:, 0].tolist()
    expected = nan if isnan(value) else 99_999 + 4.0
    assert clamped == [10.0, pytest.approx(expected, nan_ok=True)]
