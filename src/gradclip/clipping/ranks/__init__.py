"""Gradients that several processes hold together: who has what, and what they tell each other.

Imported only where there are several; this module alone can be imported everywhere.
"""

import sys
from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor


def is_shared(parameter: Tensor) -> bool:
    """Return whether a parameter is a DTensor, or lies in a shard of FSDP1."""
    return hasattr(parameter, "_spec") or getattr(parameter, "_fsdp_flattened", False)


def may_be_shared(parameters: Iterable[Tensor]) -> bool:
    """Return whether another rank may hold a part of a parameter."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    known = sys.modules
    if "torch.distributed.tensor" not in known and "torch.distributed.fsdp" not in known:
        return False
    return any(map(is_shared, parameters))
