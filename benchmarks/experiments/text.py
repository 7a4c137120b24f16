"""A small transformer that learns the characters of the help texts which CPython brings."""

from collections.abc import Mapping
from functools import cache
from math import nan
from typing import Any

import torch
from shared import Begun, Run, train
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

WIDTH, CONTEXT, BATCH = 32, 32, 8
TESTED = 256
"""Windows whose loss is the result."""
OPTIMIZERS = {
    "AdamW": lambda named: torch.optim.AdamW(named, lr=0.01, fused=True),
    "SGD": lambda named: torch.optim.SGD(named, lr=0.3, momentum=0.9, fused=True),
    "slow SGD": lambda named: torch.optim.SGD(named, lr=0.03, momentum=0.9, fused=True),
}


@cache
def tokens() -> tuple[Tensor, Tensor, int]:
    """Return the text to train on, the last tenth to test on, and how many characters there are."""
    from pydoc_data.topics import topics  # noqa: PLC0415 - a long module

    text = "".join(topics[name] for name in sorted(topics))
    characters = {each: number for number, each in enumerate(sorted(set(text)))}
    numbers = torch.tensor([characters[each] for each in text])
    tenth = len(numbers) // 10
    return numbers[:-tenth], numbers[-tenth:], len(characters)


class Transformer(nn.Module):
    """Two layers, normed before each."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, WIDTH)
        self.position = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters)
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        self.register_buffer("mask", mask)

    def forward(self, characters: Tensor) -> Tensor:
        hidden = self.embedding(characters) + self.position
        return self.head(self.norm(self.layers(hidden, mask=self.mask, is_causal=True)))


def loss_of(model: nn.Module, text: Tensor, starts: Tensor) -> Tensor:
    """Return the loss of predicting each next character of some windows."""
    windows = text[starts[:, None] + torch.arange(CONTEXT + 1)]
    return cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def begun(optimizer: str, seed: int, factors: Mapping[int, float]) -> Begun:
    """Return a training that can begin; see ``trained``."""
    torch.manual_seed(seed)
    learned, _, characters = tokens()
    model = Transformer(characters)
    order = torch.Generator().manual_seed(seed)

    def loss_at(step: int) -> Tensor:
        starts = torch.randint(len(learned) - CONTEXT, (BATCH,), generator=order)
        return loss_of(model, learned, starts) * factors.get(step, 1.0)

    return Begun(model, OPTIMIZERS[optimizer](model.named_parameters()), loss_at)


def trained(
    policy: Any, optimizer: str, seed: int, steps: int, factors: Mapping[int, float]
) -> tuple[float, Run]:
    """Train one, and return its loss on the last tenth of the text, and what became of the run.

    Args:
        policy: What clips.
        optimizer: A name in ``OPTIMIZERS``.
        seed: Of the first weights and of the batches.
        steps: How many steps.
        factors: What the loss of some steps is multiplied by.
    """
    training = begun(optimizer, seed, factors)
    run, model, (_, unseen, _) = train(training, policy, steps), training.model, tokens()
    starts = torch.linspace(0, len(unseen) - CONTEXT - 1, TESTED).long()
    with torch.no_grad():
        return (nan if run.lost else float(loss_of(model, unseen, starts))), run
