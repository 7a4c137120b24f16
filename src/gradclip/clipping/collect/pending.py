"""Gradients that FSDP2 keeps to itself while an accumulation window is open."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from gradclip.errors import UnsupportedGradientError


def require_reduced(parameters: Sequence[Tensor]) -> None:
    """Refuse parameters without a gradient whose gradients wait to be reduced.

    Raises:
        UnsupportedGradientError: GC020.
    """
    wanted = set(map(id, parameters))
    if any(id(each.sharded_param) in wanted and _is_pending(each) for each in _managed()):
        raise UnsupportedGradientError(
            "an accumulation window is open: FSDP2 has gradients of these parameters that are not "
            "reduced yet (set_requires_gradient_sync(False)), and until then their .grad is None, "
            "so their norm is not known. Clip once per window, behind the backward pass that "
            "reduces: where accelerator.sync_gradients is true, or after "
            "set_requires_gradient_sync(True). No gradient was changed."
        )


def _managed() -> Iterator[Any]:
    """Yield what FSDP2 knows of each parameter that it has; it has no public name for any of it."""
    known = sys.modules.get("torch.distributed._composable_state")
    if known is None or "torch.distributed.fsdp" not in sys.modules:
        return
    for kept in list(known._module_state_mapping.values()):  # noqa: SLF001
        state = kept()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # an older torch has one
            groups = [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            yield from getattr(group, "fsdp_params", ())


def _is_pending(managed: Any) -> bool:
    """Return whether there is a whole gradient, of this rank's samples alone."""
    unsharded = getattr(managed, "_unsharded_param", None)
    return (
        getattr(managed, "unsharded_accumulated_grad", None) is not None
        or getattr(unsharded, "grad", None) is not None
    )
