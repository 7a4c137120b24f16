"""A limit for each group of parameters: by the names of the model, each with a norm of its own.

Some tokens are frequent and some rare, so the gradient of the embedding has other sizes than that
of the rest, and one limit for both would be set by whichever is larger.

Where the optimizer has such groups already, a list has a limit for each, and no names are needed:
gradclip.attach(optimizer, [0.05, 0.5]).
"""

import torch
from torch import nn

import gradclip

LIMITS = {
    "embedding.*": 0.05,  # the first pattern that matches wins
    "head.bias": None,  # left alone, and not counted
    "*": gradclip.NormClip(max_norm=0.5),
}


class Model(nn.Module):
    """Predicts the token that follows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.Tanh())
        self.head = nn.Linear(32, 50)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits, (tokens, 50)."""
        return self.head(self.body(self.embedding(tokens)))


torch.manual_seed(0)
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
clipper = gradclip.GradientClipper(model, LIMITS)
frequencies = 1.0 / torch.arange(1, 51)

clipped = dict.fromkeys(["embedding.*", "*"], 0)
for _ in range(200):
    tokens = torch.multinomial(frequencies, 65, replacement=True)
    loss = nn.functional.cross_entropy(model(tokens[:-1]), (tokens[:-1] + 1) % 50)
    optimizer.zero_grad()
    loss.backward()
    result = clipper.clip()
    with gradclip.withhold(optimizer, result.skipped):
        optimizer.step()
    for pattern, group in result.to_host().groups.items():
        clipped[pattern] += group.clipped

for pattern, group in result.groups.items():
    print(
        f"{pattern:12} clipped {clipped[pattern]:3} of 200 steps; "
        f"last norm {float(group.norm_pre):.3f} -> {float(group.norm_post):.3f}"
    )
print(f"loss {loss.item():.3f}")
