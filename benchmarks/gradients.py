"""Random gradients of a model, without the model."""

import torch
from models import Case
from torch import Tensor

LIMIT = 1.0
SPIKE = 1.1 * LIMIT


class Gradients:
    """Random gradients of a model, with a norm of a fifth of the limit."""

    def __init__(self, case: Case, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        block = torch.randn(min(1 << 22, case.elements), generator=generator, device=device)
        block *= 0.2 * LIMIT / case.elements**0.5
        self.parameters: list[Tensor] = []
        offset = 0
        for shape in case.shapes:
            # The weights themselves are not needed, and would take as much memory again.
            weight = torch.zeros((), dtype=case.dtype, device=device).expand(shape)
            parameter = torch.nn.Parameter(weight)
            gradient = torch.empty(shape, dtype=case.dtype, device=device)
            flat, done = gradient.view(-1), 0
            while done < len(flat):
                piece = block[offset : offset + len(flat) - done]
                flat[done : done + len(piece)] = piece
                done, offset = done + len(piece), (offset + len(piece)) % len(block)
            parameter.grad = gradient
            self.parameters.append(parameter)
        self.first = self.gradients()[0].view(-1)[:1]
        self._kept: list[Tensor] = []

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def spike(self) -> None:
        """Make the next call clip."""
        self.first.fill_(SPIKE)

    def keep(self) -> None:
        """Remember what the gradients are now."""
        self._kept = [gradient.clone() for gradient in self.gradients()]

    def restore(self) -> None:
        """Make them what they were then."""
        torch._foreach_copy_(self.gradients(), self._kept)

    def move(self) -> None:
        """Put the gradients elsewhere, as ``zero_grad(set_to_none=True)`` does."""
        for parameter in self.parameters:
            parameter.grad = parameter.grad.clone() if parameter.grad is not None else None
        self.first = self.gradients()[0].view(-1)[:1]

    def norm(self) -> float:
        total = 0.0
        for gradient in self.gradients():
            total += sum(float(p.double().square().sum()) for p in gradient.view(-1).split(1 << 24))
        return total**0.5
