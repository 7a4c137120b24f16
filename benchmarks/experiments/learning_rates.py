"""E3: at how high a learning rate does a deep network without norms still train?

    python benchmarks/experiments/learning_rates.py [--seeds 5] [--steps 100]

Writes ``benchmarks/results/experiment_learning_rates.csv``. 16 residual blocks without any layer
that norms learn digits, by SGD with momentum 0.9, at five learning rates. The accuracy is that on
360 other images.
"""

from collections.abc import Iterator
from itertools import product

from digits import trained
from shared import Row, main, policies
from torch import Tensor, nn

LEARNING_RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
BLOCKS, WIDTH = 16, 64


class Residual(nn.Module):
    """A perceptron around which its input goes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.outer(self.inner(hidden).relu())


class Deep(nn.Module):
    """Many of them, and a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Residual() for _ in range(BLOCKS)))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(images))


def rows(seeds: int, steps: int) -> Iterator[Row]:
    runs = product(LEARNING_RATES, policies(1.0, "adagc_paper").items(), range(seeds))
    for lr, (name, policy), seed in runs:
        found, run = trained(Deep, lr, policy, seed, steps)
        yield {"lr": lr, "policy": name, "seed": seed, "accuracy": found, **run.columns()}


if __name__ == "__main__":
    main("learning_rates", __doc__, rows, steps=100)
