"""Images of digits, 8 x 8 pixels, as scikit-learn brings them."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from shared import Begun, Run, is_finite, train
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

BATCH = 64


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images (n, 64) between 0 and 1 and their classes: 1437 to train on, 360 to test."""
    images, classes = _all()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(images, dtype=torch.float32)[order] / 16
    classes = torch.tensor(classes)[order]
    return images[360:], classes[360:], images[:360], classes[:360]


@cache
def _all() -> tuple[Any, Any]:
    return load_digits(return_X_y=True)


def begun(make: Callable[[], nn.Module], lr: float, seed: int) -> Begun:
    """Return a training by SGD with momentum 0.9 that can begin."""
    torch.manual_seed(seed)
    images, classes, _, _ = digits(seed)
    model = make()

    def loss_at(_: int) -> Tensor:
        chosen = torch.randint(len(images), (BATCH,))
        return cross_entropy(model(images[chosen]), classes[chosen])

    optimizer = torch.optim.SGD(model.named_parameters(), lr=lr, momentum=0.9, fused=True)
    return Begun(model, optimizer, loss_at)


def trained(
    make: Callable[[], nn.Module], lr: float, policy: Any, seed: int, steps: int
) -> tuple[float, Run]:
    """Train by SGD with momentum 0.9, and return the accuracy and what became of the run.

    Args:
        make: Makes the model.
        lr: Learning rate.
        policy: What clips.
        seed: Of the first weights, of the batches, and of which images are for testing.
        steps: How many steps.
    """
    training = begun(make, lr, seed)
    run, model = train(training, policy, steps), training.model
    _, _, unseen, unseen_classes = digits(seed)
    if not is_finite(model):
        return 0.1, run  # that of guessing
    with torch.no_grad():
        found = (model(unseen).argmax(1) == unseen_classes).float().mean()
    return float(found), run
