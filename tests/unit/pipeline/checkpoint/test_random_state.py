import random

import numpy as np
import torch

from gradclip.pipeline.checkpoint.rng import RandomState


def draw():
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),  # noqa: NPY002 - the global generator is what is tested
        float(np.random.randn()),  # noqa: NPY002
        torch.rand(3).tolist(),
    ]


def test_it_brings_every_generator_back():
    draw()
    state = RandomState.capture()
    first = draw()
    draw()
    state.restore()
    assert draw() == first


def test_it_goes_through_a_file_that_is_loaded_with_weights_only(tmp_path):
    draw()
    state = RandomState.capture()
    first = draw()
    torch.save(state.state_dict(), tmp_path / "state.pt")
    again = RandomState.from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    again.restore()
    assert draw() == first
    # A run that resumed writes what it loaded.
    RandomState.from_state_dict(again.state_dict()).restore()
    assert draw() == first


def test_capturing_draws_nothing():
    RandomState.capture().restore()
    state = RandomState.capture()
    RandomState.capture()
    first = draw()
    state.restore()
    assert draw() == first


def test_a_state_without_numpy_leaves_numpy_alone():
    state = RandomState.capture().state_dict() | {"numpy": None}
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.RandomState(3).rand()
    RandomState.from_state_dict(state).restore()
    assert np.random.rand() == expected  # noqa: NPY002
