"""E4: what does clipping cost where it is not needed, and where is it too low?

    python benchmarks/experiments/price.py [--seeds 5] [--steps 400]

Writes ``benchmarks/results/experiment_price.csv``. Softmax regression on digits, by SGD on all
images at each step, so that its gradients are exact; or with noise of heavy tails added to the
loss, whose gradient has a random direction and a length of Student's t with 1.5 degrees of
freedom. ``loss`` is that of the images, without noise.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from digits import digits
from shared import Begun, Row, Run, main, policies, train
from torch import Tensor, nn
from torch.distributions import StudentT
from torch.nn.functional import cross_entropy, normalize

from gradclip import NormClip

LEARNING_RATE = 0.5
LIMITS = (0.01, 0.1, 1.0, 10.0)
NOISES = {"none": 0.0, "heavy tails": 1.0}


def trained(policy: Any, noise: float, seed: int, steps: int) -> tuple[float, Run]:
    """Train, and return the loss without noise, and what became of the run."""
    torch.manual_seed(seed)
    images, classes, *_ = digits(seed)
    model = nn.Linear(64, 10)
    lengths = StudentT(1.5).sample((steps,)) * noise

    def loss_at(step: int) -> Tensor:
        loss = cross_entropy(model(images), classes)
        if noise:
            direction = normalize(torch.randn(640), dim=0).view(10, 64)
            loss = loss + lengths[step] * (direction * model.weight).sum()
        return loss

    optimizer = torch.optim.SGD(model.named_parameters(), lr=LEARNING_RATE, fused=True)
    run = train(Begun(model, optimizer, loss_at), policy, steps)
    with torch.no_grad():
        return float(cross_entropy(model(images), classes)), run


def rows(seeds: int, steps: int) -> Iterator[Row]:
    compared = policies(1.0, "autoclip", "adagc_paper")
    del compared["norm"], compared["agc"]  # all limits are below; AGC leaves out the only layer
    compared |= {f"norm, {limit:g}": NormClip(max_norm=limit) for limit in LIMITS}
    runs = product(NOISES.items(), compared.items(), range(seeds))
    for (noise, scale), (name, policy), seed in runs:
        loss, run = trained(policy, scale, seed, steps)
        about: Row = {"noise": noise, "policy": name, "seed": seed, "loss": loss}
        yield {**about, **run.columns()}


if __name__ == "__main__":
    main("price", __doc__, rows, steps=400)
