"""What a device can do: float64, graph capture, streams, copies to the host; and torch.compile."""

import sys
from collections import defaultdict
from collections.abc import Callable, Collection
from functools import wraps
from threading import Lock
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # noqa: SLF001
"""Tells a stream without making an object of it; builds for the CPU have none."""

_WITHOUT_FLOAT64 = frozenset({"mps"})


def result_device_of(devices: Collection[torch.device]) -> torch.device:
    """Return where float64 results of tensors on some devices belong: an accelerator if it can.

    A device that has no float64 hands its tensors to the CPU, block by block.
    """
    able = [d for d in devices if d.type != "cpu" and d.type not in _WITHOUT_FLOAT64]
    return min(able, key=str) if able else torch.device("cpu")


def is_capturing(device: torch.device) -> bool:
    """Return whether work on a device goes into a CUDA graph just now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def stream_of(device: torch.device) -> int:
    """Return which stream work on a device goes to: work on another stream does not wait for it."""
    if device.type != "cuda":
        return 0
    if _raw_stream is not None and device.index is not None:
        stream: int = _raw_stream(device.index)
        return stream
    return torch.cuda.current_stream(device).cuda_stream


class HostCopy:
    """A copy of some numbers to the host that the host does not wait for.

    Args:
        values: Numbers on an accelerator, of any shape.
    """

    def __init__(self, values: Tensor) -> None:
        self._read: list[float] | None = None
        self._reading = Lock()
        self._kind = values.device, values.dtype, values.shape
        try:
            self._there = _FREE[self._kind].pop()
        except IndexError:
            with torch.inference_mode(False):  # the next copy may begin outside of that mode
                host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            self._there = host, torch.Event(values.device.type)
        host, copied = self._there
        host.copy_(values, non_blocking=True)
        # On the stream of the values' device: the current device may be another one.
        copied.record(torch.accelerator.current_stream(values.device))

    def read(self) -> list[float]:
        """Return the numbers; the host waits until they are there."""
        with self._reading:  # given back twice, the memory would be that of two copies
            if self._read is None:
                host, copied = self._there
                copied.synchronize()
                self._read = host.reshape(-1).tolist()
                _FREE[self._kind].append(self._there)
            return self._read


_FREE: defaultdict[tuple[Any, ...], list[tuple[Tensor, Any]]] = defaultdict(list)
"""Pinned memory, and events, of copies that were read: the next copies take them."""


def copy_to_host(values: Tensor) -> HostCopy | None:
    """Begin to copy numbers to the host; None inside a CUDA graph, whose replays have no host."""
    return None if is_capturing(values.device) else HostCopy(values)


def untraced(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Make a function a graph break around which ``torch.compile`` goes on.

    Its verdicts depend on addresses and on what was seen before, which no graph may fix. Does not
    import the compiler, which takes seconds, where nothing was compiled.
    """
    disabled: list[Callable[_Arguments, _Result]] = []

    @wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if not disabled:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return call
