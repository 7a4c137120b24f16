"""A model whose gradients are what a batch says, so that plain arithmetic knows every step."""

import torch
from torch import nn


class TinyModel(nn.Module):
    """Two layers, of zeros: the gradient of each weight is the entry of its name in the batch."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 1, bias=False), nn.Linear(2, 1, bias=False)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, body, head):
        return (self.body.weight * body).sum() + (self.head.weight * head).sum()


MOMENTUM = 0.5
"""With it a step on gradients of zero moves the weights too: only no step at all does not."""


def sgd(model, **options):
    """Return an optimizer with a group for each layer: first the body, then the head."""
    groups = [{"params": [named]} for named in model.named_parameters()]
    return torch.optim.SGD(groups, lr=1.0, momentum=MOMENTUM, **options)


def batches(gradients):
    return [{name: torch.tensor(row) for name, row in gradient.items()} for gradient in gradients]


def weights(model):
    return {name: getattr(model, name).weight.flatten().tolist() for name in ("body", "head")}
