"""Numbers that the host reads a few steps late, so that it waits for no device."""

from collections import deque
from typing import Generic, TypeVar

import torch
from torch import Tensor

from gradclip.clipping.kernels.tables import is_capturing

LAG = 4
"""Steps after which a number is read where reading at once would make the host wait."""

_Note = TypeVar("_Note")


class Lagged(Generic[_Note]):
    """Copies numbers from an accelerator while it goes on, and hands them out ``LAG`` steps later.

    Every rank does so at the same step. Nothing is copied inside a CUDA graph that is captured:
    its replays have no host.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[Tensor, torch.Event, _Note]] = deque()
        self.used = False
        """Whether anything was ever copied."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Copy and pickle without what is on its way."""
        return Lagged, ()

    def push(self, values: Tensor, note: _Note) -> tuple[list[float], _Note] | None:
        """Begin to copy the numbers of this step; return those of ``LAG`` steps ago, if any."""
        if is_capturing(values.device):
            return None
        self.used = True
        copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        copy.copy_(values, non_blocking=True)
        event = torch.Event(values.device.type)
        event.record()
        self._pending.append((copy, event, note))
        return self.pop() if len(self._pending) > LAG else None

    def pop(self) -> tuple[list[float], _Note] | None:
        """Return the oldest numbers that wait, waiting for them; None if there are none."""
        if not self._pending:
            return None
        copy, event, note = self._pending.popleft()
        event.synchronize()
        return copy.reshape(-1).tolist(), note

    def clear(self) -> None:
        """Forget what waits."""
        self._pending.clear()
