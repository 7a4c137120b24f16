"""FSDP1: which parameters lie flattened in shards, and over which process group."""

import sys
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gradclip.errors import ArgumentValueError


def is_flattened(parameter: Tensor) -> bool:
    """Return whether FSDP1 holds a parameter in a flat one (or it is one)."""
    return getattr(parameter, "_fsdp_flattened", False)


def flat_groups(module: nn.Module | None) -> dict[int, ProcessGroup | None]:
    """Return by ``id`` of each parameter that FSDP1 manages over which group it is split.

    None stands for ``NO_SHARD``, whose gradients are whole on every rank.

    Args:
        module: What has FSDP1 modules in it; None knows of none.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if module is None or fsdp is None:
        return {}
    groups: dict[int, ProcessGroup | None] = {}
    for each in fsdp.FullyShardedDataParallel.fsdp_modules(module):
        handle: Any = each._handle  # noqa: SLF001 - FSDP1 has no public name for any of this
        if handle is None:
            continue
        flat = handle.flat_param
        group = handle.process_group if handle.uses_sharded_strategy else None
        groups[id(flat)] = group
        for parameter in getattr(flat, "_params", None) or ():
            groups[id(parameter)] = group
    return groups


def unknown_flat(name: str) -> ArgumentValueError:
    """Say that a flat parameter alone does not tell who has the rest of it."""
    return ArgumentValueError(
        f"{name} is a shard that FSDP1 holds, and a bare parameter does not tell which ranks have "
        "the others, so its norm would be that of this rank alone. Give the module: "
        "GradientClipper(fsdp_model, ...), or AcceleratorClipper(..., model=fsdp_model). The "
        "functions and gradclip.attach see parameters only. No gradient was changed."
    )


def require_root(module: nn.Module | None) -> None:
    """Refuse a part of what one instance of FSDP1 wraps, once the first forward pass tells.

    Raises:
        ArgumentValueError: GC010.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if module is None or fsdp is None:
        return
    outermost: list[nn.Module] = [module]
    for each in outermost:
        if not isinstance(each, fsdp.FullyShardedDataParallel):
            outermost += each.children()
        elif each._is_root is False:  # noqa: SLF001 - None before the first forward pass
            raise ArgumentValueError(
                "this module is a part of a model that FSDP1 wraps, and not its root, so its norm "
                "would be that of a part: give the root, GradientClipper(fsdp_model, ...). To "
                "clip a part alone, give the root and a policy by name: {'encoder.*': 1.0, '*': "
                "None}. No gradient was changed."
            )
