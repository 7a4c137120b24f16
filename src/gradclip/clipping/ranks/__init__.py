"""Gradients that several processes hold together: who has what, and what they tell each other.

Imported only where there are several; this module alone can be imported everywhere.
"""

import os
import sys
from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor


def is_shared(parameter: Tensor) -> bool:
    """Return whether a parameter is a DTensor, or lies in a shard of FSDP1."""
    return hasattr(parameter, "_spec") or getattr(parameter, "_fsdp_flattened", False)


def is_debugging() -> bool:
    """Return whether the environment asks that ranks compare what they hold alike."""
    asked = os.environ.get("GRADCLIP_DEBUG", "") not in ("", "0")
    return asked and _have_peers() and dist.get_world_size() > 1


def _have_peers() -> bool:
    return dist.is_available() and dist.is_initialized()


def may_be_shared(parameters: Iterable[Tensor]) -> bool:
    """Return whether another rank may hold a part of a parameter, or is to be compared with."""
    if not _have_peers():
        return False
    if is_debugging():
        return True
    known = sys.modules
    if "torch.distributed.tensor" not in known and "torch.distributed.fsdp" not in known:
        return False
    return any(map(is_shared, parameters))
