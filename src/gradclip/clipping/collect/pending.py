"""Gradients that FSDP2 keeps to itself while an accumulation window is open."""

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from gradclip.errors import UnsupportedGradientError


def require_reduced(parameters: Callable[[], Sequence[Tensor]], *, has_gradients: bool) -> None:
    """Refuse parameters whose gradients wait to be reduced.

    Args:
        parameters: Returns what is clipped.
        has_gradients: Whether any has a gradient; then only an open window is looked for, which
            takes a look at each module and not at each parameter.

    Raises:
        UnsupportedGradientError: GC020.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return
    groups = list(_groups())
    if has_gradients:
        groups = [group for group in groups if not getattr(group, "reduce_grads", True)]
    if not groups:
        return
    wanted = set(map(id, parameters()))
    managed = chain.from_iterable(getattr(group, "fsdp_params", ()) for group in groups)
    if any(id(each.sharded_param) in wanted and _is_pending(each) for each in managed):
        raise UnsupportedGradientError(
            "an accumulation window is open: FSDP2 has gradients of these parameters that are not "
            "reduced yet (set_requires_gradient_sync(False)), and until then their .grad is None, "
            "or of the window before, so their norm is not known. Clip once per window, behind the "
            "backward pass that reduces: where accelerator.sync_gradients is true, or after "
            "set_requires_gradient_sync(True). No gradient was changed."
        )


def _groups() -> Iterator[Any]:
    """Yield what FSDP2 knows of the parameters of each module; it has no public name for it."""
    known = sys.modules.get("torch.distributed._composable_state")
    if known is None:
        return
    for kept in list(known._module_state_mapping.values()):  # noqa: SLF001
        state = kept()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # an older torch has one
            groups = [getattr(state, "_fsdp_param_group", None)]
        yield from (group for group in groups if group is not None)


def _is_pending(managed: Any) -> bool:
    """Return whether there is a whole gradient, of this rank's samples alone."""
    unsharded = getattr(managed, "_unsharded_param", None)
    return (
        getattr(managed, "unsharded_accumulated_grad", None) is not None
        or getattr(unsharded, "grad", None) is not None
    )
