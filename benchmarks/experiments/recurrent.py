"""E1: does clipping let a recurrent network train at higher learning rates?

    python benchmarks/experiments/recurrent.py [--seeds 5] [--steps 500]

Writes ``benchmarks/results/experiment_recurrent.csv``. A recurrent network of ReLUs, whose
recurrent weights begin as the identity (Le et al. 2015), reads images of digits as 16 steps of 4
pixels. Its gradients explode. SGD with momentum 0.9; the accuracy is that on 360 other images.
"""

from collections.abc import Iterator
from itertools import product

import torch
from digits import trained
from shared import Row, main, policies
from torch import Tensor, nn

from gradclip import NormClip

LEARNING_RATES = (0.003, 0.01, 0.03, 0.1)
HIDDEN = 64


class Recurrent(nn.Module):
    """Reads 16 times 4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.RNN(4, HIDDEN, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(HIDDEN, 10)
        with torch.no_grad():
            self.layer.weight_hh_l0.copy_(torch.eye(HIDDEN))
            self.layer.bias_hh_l0.zero_()
            self.layer.bias_ih_l0.zero_()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layer(images.unflatten(1, (16, 4)))[0][:, -1])


def rows(seeds: int, steps: int) -> Iterator[Row]:
    compared = policies(1.0, "zscore, cap", "autoclip", "adagc_paper")
    compared["norm, 0.3"] = NormClip(max_norm=0.3)
    for lr, (name, policy), seed in product(LEARNING_RATES, compared.items(), range(seeds)):
        found, run = trained(Recurrent, lr, policy, seed, steps)
        yield {"lr": lr, "policy": name, "seed": seed, "accuracy": found, **run.columns()}


if __name__ == "__main__":
    main("recurrent", __doc__, rows, steps=500)
