"""Accelerate keeps its state in the process; no test may see that of another."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from accelerate.state import AcceleratorState, GradientState

# `make test-integrations` installs what is missing.
collect_ignore_glob = [] if find_spec("trl") else ["*transformers*", "*trl*"]


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
