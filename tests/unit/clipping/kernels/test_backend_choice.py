"""Which backend runs: "auto", the environment, what is not installed, what does not compile."""

from types import SimpleNamespace

import pytest
import torch

from gradclip import GradientClipper
from gradclip.clipping import kernels
from gradclip.clipping.kernels import Batch, Write, carry_out, choose, foreach, reference
from gradclip.clipping.kernels.writes import run_each
from gradclip.errors import ArgumentTypeError, ArgumentValueError, CaptureError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("GRADCLIP_BACKEND", raising=False)
    kernels._automatic.cache_clear()
    yield
    kernels._automatic.cache_clear()


def test_auto_is_the_portable_backend_on_a_cpu():
    assert choose("auto").on(CPU) is foreach


def test_auto_is_triton_on_cuda_where_it_is_installed(monkeypatch):
    pytest.importorskip("triton")
    triton = kernels._load("triton")
    assert choose("auto").on(CUDA)._active is triton
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    kernels._automatic.cache_clear()
    assert choose("auto").on(CUDA) is foreach


def test_auto_is_the_portable_backend_on_rocm(monkeypatch):
    """ROCm's devices are called CUDA too, and nobody has proven the kernels there."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choose("auto").on(CUDA) is foreach


def test_the_environment_takes_the_place_of_auto_alone(monkeypatch):
    monkeypatch.setenv("GRADCLIP_BACKEND", "reference")
    assert choose("auto").on(CPU) is reference
    assert choose("foreach").on(CPU) is foreach
    monkeypatch.setenv("GRADCLIP_BACKEND", "")
    assert choose("auto").on(CPU) is foreach
    monkeypatch.setenv("GRADCLIP_BACKEND", "fast")
    with pytest.raises(ArgumentValueError, match="GRADCLIP_BACKEND='fast' is unknown"):
        GradientClipper([torch.nn.Parameter(torch.ones(1))], 1.0)


def test_what_cannot_run_is_said_before_anything_is_changed(monkeypatch):
    with pytest.raises(ArgumentValueError, match="expected 'auto', 'foreach', 'triton'"):
        choose("cuda")
    with pytest.raises(ArgumentTypeError):
        choose(None)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "find_spec", lambda name: None)
        with pytest.raises(ArgumentValueError, match="pip install triton"):
            choose("triton")
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), 5.0)
    with pytest.raises(ArgumentValueError, match="runs on CUDA devices, and a gradient is on cpu"):
        GradientClipper([weight], 1.0, backend="triton").clip()
    assert weight.grad.tolist() == [5.0] * 3


def scale_(kernels, batch, coefficients):
    carry_out(kernels.scaling(batch, coefficients))


class Broken:
    """A backend whose kernels do not compile."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def __getattr__(self, name):
        def fail(*given):
            self.calls += 1
            raise self.error

        return fail


def test_a_kernel_that_does_not_compile_falls_back_with_one_warning():
    broken = Broken(RuntimeError("Failed to find C compiler.\n Please specify via CC"))
    both = kernels._WithFallback(broken, foreach)
    batch = Batch.of([torch.tensor([3.0, 4.0])])
    with pytest.warns(RuntimeWarning, match="Failed to find C compiler. Please.*GRADCLIP_BACKEND"):
        assert both.power_sums(batch, 2.0).tolist() == [[25.0]]
    scale_(both, batch, 0.5)  # no second warning: warnings are errors here
    assert batch.tensors[0].tolist() == [1.5, 2.0]
    assert broken.calls == 1


def test_a_kernel_that_fails_when_it_is_launched_falls_back_too():
    """It is compiled then, before it writes anything."""

    def launch():
        raise RuntimeError("ptxas was not found")

    broken = SimpleNamespace(scaling=lambda *given: [Write(run_each, ([launch],))])
    both = kernels._WithFallback(broken, foreach)
    batch = Batch.of([torch.tensor([3.0, 4.0])])
    with pytest.warns(RuntimeWarning, match="ptxas was not found"):
        scale_(both, batch, 0.5)
    scale_(both, batch, 0.5)
    assert batch.tensors[0].tolist() == [0.75, 1.0]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, CaptureError])
def test_what_no_backend_survives_is_raised(error):
    both = kernels._WithFallback(Broken(error("no memory")), foreach)
    with pytest.raises(error):
        both.power_sums(Batch.of([torch.ones(2)]), 2.0)


def test_every_backend_has_every_operation():
    for name in kernels._BACKENDS:
        if name == "triton":
            pytest.importorskip("triton")
        module = kernels._load(name)
        operations = kernels.Kernels.__annotations__.keys() - {"fused"}  # None where there is none
        assert all(callable(getattr(module, each)) for each in operations)
        assert hasattr(module, "fused")
    wrapped = kernels._WithFallback(SimpleNamespace(), foreach)
    assert all(hasattr(wrapped, each) for each in kernels.Kernels.__annotations__)
