"""What the order of an epoch follows from: generators and seeds, of the process and of a loader."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from gradclip.pipeline.checkpoint.rng import RandomState

__all__ = ["Moment", "parts"]

_SEEDS = ("iteration", "initial_seed")
"""What Accelerate's loaders and samplers seed an epoch with."""


@dataclass(frozen=True)
class Moment:
    """Everything that the order of the data follows from, at one moment."""

    random: RandomState
    loader: dict[str, Any]

    @classmethod
    def capture(cls, loader: object) -> Self:
        """Read the generators and seeds, without changing them."""
        state: dict[str, Any] = {}
        for path, part in parts(loader).items():
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                state[f"{path}.generator"] = generator.get_state()
            for name in _SEEDS:
                if isinstance(value := _own(part).get(name), int):
                    state[f"{path}.{name}"] = value
        return cls(RandomState.capture(), state)

    def restore(self, loader: object) -> None:
        """Set them back, of the process and of the loader's parts."""
        for path, part in parts(loader).items():
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator) and f"{path}.generator" in self.loader:
                generator.set_state(self.loader[f"{path}.generator"])
            for name in _SEEDS:
                if name in _own(part) and f"{path}.{name}" in self.loader:
                    setattr(part, name, self.loader[f"{path}.{name}"])
        self.random.restore()

    def state_dict(self) -> dict[str, Any]:
        """Return them as numbers, strings and tensors."""
        return {"random": self.random.state_dict(), "loader": self.loader}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """Make what ``state_dict`` returned."""
        return cls(RandomState.from_state_dict(state["random"]), dict(state["loader"]))


def parts(loader: object) -> dict[str, Any]:
    """Return the loader and the samplers behind it, each once, by path."""
    parts: dict[str, Any] = {}
    waiting = [("loader", loader)]
    while waiting:
        path, part = waiting.pop()
        if not any(part is known for known in parts.values()):
            parts[path] = part
            waiting += [
                (f"{path}.{name}", behind)
                for name in ("batch_sampler", "sampler")
                if (behind := getattr(part, name, None)) is not None
            ]
    return parts


def _own(part: object) -> dict[str, Any]:
    return getattr(part, "__dict__", {})
