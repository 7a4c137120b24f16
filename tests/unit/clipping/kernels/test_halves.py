"""Sums of squares of bfloat16 and float16 on the CPU, by dot products that are added in float32."""

import math

import pytest
import torch

from gradclip import get_total_norm
from gradclip.clipping.kernels import halves

KINDS = sorted(halves.HALVES, key=str)
SIZES = (8193, 65536, 1 << 20, (1 << 20) + 511)


def values(kind, count, dtype):
    generator = torch.Generator().manual_seed(count)
    if kind == "random":
        return torch.randn(count, generator=generator).to(dtype)
    if kind == "constant":
        return torch.full((count,), 0.37, dtype=dtype)
    if kind == "small":  # squares that vanish in float32
        return (torch.randn(count, generator=generator) * 2.0**-60).to(dtype)
    spiky = torch.zeros(count, dtype=dtype)
    spiky[:: count // 7] = 100.0
    return spiky


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("kind", ["random", "constant", "spiky", "small"])
def test_the_norm_is_that_of_float64(kind, dtype):
    for count in SIZES:
        tensor = values(kind, count, dtype)
        exact = math.sqrt(math.fsum(tensor.double().square().tolist()))
        got = get_total_norm([tensor]).item()
        assert math.isclose(got, exact, rel_tol=3e-7, abs_tol=1e-45), (kind, count, got, exact)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("at", [0, 70_000, -1])
def test_what_is_not_finite_is_what_it_is(bad, at, dtype):
    tensor = values("random", 100_003, dtype)
    tensor[at] = bad
    got = get_total_norm([tensor]).item()
    assert math.isnan(got) if math.isnan(bad) else got == math.inf


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_the_largest_numbers_do_not_overflow(dtype):
    tensor = torch.full((10_000,), torch.finfo(dtype).max, dtype=dtype)
    got = get_total_norm([tensor.view(100, 100)]).item()
    exact = math.fsum(tensor.double().square().tolist()) ** 0.5
    # An infinite norm would say that an element is.
    assert got == pytest.approx(min(exact, torch.finfo(torch.float32).max))


def test_this_torch_adds_up_as_expected(monkeypatch):
    assert halves.can_sum()
    monkeypatch.setattr(halves, "square_sums", lambda flat, width: 1 / 0)
    halves.can_sum.cache_clear()
    try:
        assert not halves.can_sum()
        tensor = values("random", 100_003, torch.bfloat16)  # the other way serves
        exact = math.sqrt(math.fsum(tensor.double().square().tolist()))
        assert math.isclose(get_total_norm([tensor]).item(), exact, rel_tol=3e-7)
    finally:
        halves.can_sum.cache_clear()


def test_the_sum_does_not_depend_on_the_number_of_threads():
    tensor = values("random", 1 << 22, torch.bfloat16)
    threads, found = torch.get_num_threads(), set()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.add(halves.square_sums(tensor, 512).sum(dtype=torch.float64).item())
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
