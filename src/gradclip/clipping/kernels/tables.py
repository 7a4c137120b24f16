"""Small tables of numbers on a device, brought there without making the host wait.

A copy from pinned memory is queued behind what the device is doing, and torch's allocator keeps
that memory until the copy was made. A captured CUDA graph copies again at each replay, so what it
copies from is never given back.
"""

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradclip.clipping.kernels.device import is_capturing, stream_of
from gradclip.errors import CaptureError

_CAPTURED: list[Tensor] = []
"""Memory that captured graphs use at each replay, so that it is never freed."""


def keep_for_replays(memory: Tensor) -> Tensor:
    """Return memory that a graph works on and does not own; it is never freed."""
    _CAPTURED.append(memory)
    return memory


class Table:
    """Numbers that depend on shapes alone: copied once for each stream that asks.

    Args:
        values: Of any dtype, on the CPU.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._copies: dict[tuple[torch.device, int], Tensor] = {}

    @classmethod
    def of(
        cls, values: Sequence[float] | Sequence[Sequence[float]], dtype: torch.dtype = torch.int64
    ) -> "Table":
        """Make a table of Python's numbers."""
        return cls(torch.tensor(values, dtype=dtype, device="cpu"))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as one that was not copied to any device yet."""
        return Table, (self._values,)

    def __len__(self) -> int:
        return len(self._values)

    def on(self, device: torch.device) -> Tensor:
        """Return the table on a device.

        Raises:
            CaptureError: GC022, if it is not there yet and a CUDA graph is being captured: what
                is copied then is there in replays only.
        """
        if device == self._values.device:
            return self._values
        if is_capturing(device):
            return self._before_capture(device)
        key = device, stream_of(device)
        if key not in self._copies:
            host = self._values.pin_memory() if device.type == "cuda" else self._values
            self._copies[key] = host.to(device, non_blocking=True)
        return self._copies[key]

    def _before_capture(self, device: torch.device) -> Tensor:
        for (there, _), copy in self._copies.items():
            if there == device:
                return keep_for_replays(copy)
        raise CaptureError(
            "clip() has not seen gradients of these shapes before this CUDA graph is captured, and "
            "its tables have to be on the device by then. Run the step two or three times before "
            "the capture, as torch.cuda.graph asks anyway."
        )


class Addresses:
    """Addresses that are copied to a device only when they moved.

    Args:
        device: Where they are needed.
        count: How many there are.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self._device = device
        self._count = count
        self._there: dict[int, tuple[Sequence[int], Tensor]] = {}
        self._capture: tuple[Sequence[int] | None, Tensor | None] = (None, None)
        # Pinned memory cannot always be had during a capture.
        self._spare: Tensor | None = self._pinned()

    def of(self, addresses: Sequence[int]) -> Tensor:
        """Return the addresses, int64, on the device."""
        if is_capturing(self._device):
            return self._captured(addresses)
        if self._spare is None:
            self._spare = self._pinned()
        stream = stream_of(self._device)
        last, there = self._there.get(stream, (None, None))
        if there is None or addresses != last:
            there = self._copy(self._pinned(), addresses)
            self._there[stream] = addresses, there
        return there

    def _captured(self, addresses: Sequence[int]) -> Tensor:
        """Give a graph a table of its own, which later steps do not touch: one for each call."""
        called, there = self._capture
        if there is None or addresses is not called:
            host = self._pinned() if self._spare is None else self._spare
            self._spare = None
            there = self._copy(keep_for_replays(host), addresses)
            self._capture = addresses, there
        return there

    def _copy(self, host: Tensor, addresses: Sequence[int]) -> Tensor:
        # An array takes a list of Python's integers several times as fast as a tensor does.
        host.copy_(torch.frombuffer(array("q", addresses), dtype=torch.int64))
        return host.to(self._device, non_blocking=True)

    def _pinned(self) -> Tensor:
        pinned = self._device.type == "cuda"
        return torch.empty(self._count, dtype=torch.int64, device="cpu", pin_memory=pinned)
