"""The random state of a process: Python's, NumPy's, torch's, CUDA's."""

import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

__all__ = ["RandomState"]


@dataclass(frozen=True)
class RandomState:
    """The state of every global generator at one moment.

    Args:
        python: ``random.getstate()``.
        torch: The state of torch's default generator.
        cuda: Those of the CUDA devices; empty where CUDA was not used.
        numpy: ``numpy.random.get_state()``; None where NumPy was not imported.
    """

    python: Any
    torch: Tensor
    cuda: tuple[Tensor, ...]
    numpy: Any

    @classmethod
    def capture(cls) -> Self:
        """Read every generator, without changing it."""
        # Without CUDA in use, asking for its generators would start it.
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ()
        numpy = sys.modules.get("numpy")
        return cls(
            python=random.getstate(),
            torch=torch.get_rng_state(),
            cuda=tuple(cuda),
            numpy=None if numpy is None else numpy.random.get_state(),
        )

    def restore(self) -> None:
        """Set every generator back."""
        random.setstate(self.python)
        torch.set_rng_state(self.torch)
        if self.cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(self.cuda)
        numpy = sys.modules.get("numpy")
        if numpy is not None and self.numpy is not None:
            numpy.random.set_state(self.numpy)

    def state_dict(self) -> dict[str, Any]:
        """Return the states as numbers, strings and tensors."""
        numpy = None
        if self.numpy is not None:
            name, keys, *rest = self.numpy
            numpy = [name, torch.tensor([int(key) for key in keys]), *rest]
        return {
            "python": torch.tensor(self.python[1]),
            "python_gauss": self.python[2],
            "torch": self.torch,
            "cuda": list(self.cuda),
            "numpy": numpy,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """Make the states that ``state_dict`` returned."""
        version = random.getstate()[0]
        numpy = None
        if state["numpy"] is not None:
            name, keys, *rest = state["numpy"]
            numpy = (name, keys.tolist(), *rest)
        return cls(
            python=(version, tuple(state["python"].tolist()), state["python_gauss"]),
            torch=state["torch"],
            cuda=tuple(state["cuda"]),
            numpy=numpy,
        )
