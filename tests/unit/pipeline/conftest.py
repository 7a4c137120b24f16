"""What the tests of the pipeline share: a fresh accelerator, a small run, weights as hex."""

from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state in the process; no test may see that of another."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def weights(model: nn.Module) -> list[str]:
    """Return every parameter's bytes, as hex."""
    return [parameter.detach().numpy().tobytes().hex() for parameter in model.parameters()]


def linear(values: list[float] | None = None) -> nn.Linear:
    """Return a layer with one row of known weights and no bias."""
    values = [0.0, 0.0] if values is None else values
    layer = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([values]))
    return layer


@pytest.fixture(name="weights")
def _weights():
    return weights


@pytest.fixture(name="linear")
def _linear():
    return linear
