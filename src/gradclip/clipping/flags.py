"""Flags that cost nothing: a bool where the host knows it, a 0-d bool tensor elsewhere."""

from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor

Flag: TypeAlias = bool | Tensor
"""A bool on the CPU, where reading is free; a 0-d bool tensor on an accelerator."""

_FALSE_AND_TRUE = torch.tensor(False, device="cpu"), torch.tensor(True, device="cpu")


def host_waits_for(device: torch.device) -> bool:
    """Return whether reading a number from a device would make the host wait."""
    return device.type != "cpu"


def as_flag(flag: Flag, device: torch.device) -> Tensor:
    """Return a flag as 0-d bool tensor; filled on the device, since the host waits for a copy."""
    if not isinstance(flag, bool):
        return flag
    if device.type == "cpu":
        return _FALSE_AND_TRUE[flag]
    return torch.full((), flag, dtype=torch.bool, device=device)


def as_known(flag: Flag) -> Flag:
    """Return a flag as bool where reading it costs nothing."""
    if isinstance(flag, bool) or host_waits_for(flag.device):
        return flag
    return bool(flag)


def negated(flag: Flag) -> Flag:
    """Return whether a flag is false."""
    return not flag if isinstance(flag, bool) else ~flag


def all_of(flags: Iterable[Flag]) -> Flag:
    """Return whether all are true: as bool where that is known without reading a tensor."""
    tensors = []
    for flag in flags:
        if flag is False:
            return False
        if flag is not True:
            tensors.append(flag)
    if not tensors:
        return True
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors).all()


def any_of(flags: Iterable[Flag]) -> Flag:
    """Return whether any is true: as bool where that is known without reading a tensor."""
    tensors = []
    for flag in flags:
        if flag is True:
            return True
        if flag is not False:
            tensors.append(flag)
    if not tensors:
        return False
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors).any()
