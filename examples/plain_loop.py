"""Clip in a loop of your own: make a clipper once, call it between backward and step.

The targets carry noise with heavy tails (Student's t, 1.5 degrees of freedom): now and then the
gradient of a batch is a hundred times larger than the usual, and spoils what was learned.
"""

import math

import torch
from torch import nn

import gradclip


def train(max_norm: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    clipper = gradclip.GradientClipper(optimizer, max_norm)
    noise = torch.distributions.StudentT(1.5)

    clipped, largest = 0, 0.0
    for _ in range(500):
        inputs = torch.randn(64, 8)
        targets = inputs.sum(dim=1, keepdim=True) + noise.sample((64, 1))
        loss = nn.functional.mse_loss(model(inputs), targets)

        optimizer.zero_grad()
        loss.backward()
        result = clipper.clip()
        with gradclip.withhold(optimizer, result.skipped):  # a NaN makes no update
            optimizer.step()

        stats = result.to_host()
        clipped += stats.clipped
        largest = max(largest, stats.norm_pre)

    inputs = torch.randn(1000, 8)
    with torch.no_grad():
        error = nn.functional.mse_loss(model(inputs), inputs.sum(dim=1, keepdim=True))
    print(
        f"max_norm {max_norm}: clipped {clipped} of 500 steps, largest norm {largest:.0f}, "
        f"error {error:.2f}"
    )


train(max_norm=math.inf)  # measures, and changes nothing
train(max_norm=5.0)
