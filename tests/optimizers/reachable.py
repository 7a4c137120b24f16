"""Everything that an optimizer holds: each tensor and each number that can be reached from it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_NOT_STATE = {
    "step",
    "__getstate__",
    "_optimizer_step_pre_hooks",
    "_zero_grad_profile_name",  # a label, made by the first zero_grad
    "_need_device_dtype_check_for_fused",  # whether a check was made already
}
"""What a held step adds, and what no step depends on."""


def reachable(optimizer: object) -> dict[str, object]:
    """Return bits of tensors and values of numbers, by the path on which they are reached.

    Gradients are left out: they are those of the next step.
    """
    return dict(_walk(optimizer, "", set()))


def _walk(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, object]]:
    if isinstance(value, _PLAIN):
        yield path, repr(value)
    elif isinstance(value, Tensor):
        yield from _bits(value, path)
    elif id(value) not in seen:
        seen.add(id(value))
        for name, each in _parts(value):
            yield from _walk(each, f"{path}.{name}", seen)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a container or an object holds."""
    if isinstance(value, list | tuple | set | frozenset):
        value = dict(enumerate(value))
    elif not isinstance(value, dict):
        is_state = isinstance(value, torch.optim.Optimizer) or not callable(value)
        value = getattr(value, "__dict__", {}) if is_state else {}
    for number, (key, each) in enumerate(value.items()):
        if key not in _NOT_STATE if isinstance(key, str) else True:
            yield key if isinstance(key, str) else f"#{number}", each  # some are addresses


def _bits(tensor: Tensor, path: str) -> Iterator[tuple[str, object]]:
    kind = type(tensor)
    if kind not in (Tensor, torch.nn.Parameter) and hasattr(kind, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()  # a quantized one
        for name in names:
            yield from _bits(getattr(tensor, name), f"{path}.{name}")
        return
    value = tensor.detach().contiguous().cpu()
    yield path, (str(value.dtype), value.shape, value.reshape(-1).view(torch.uint8).tolist())
