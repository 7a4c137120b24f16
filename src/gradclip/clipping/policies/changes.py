"""Which policy may take the place of another one during a run: the history has to fit."""

from typing import Any

from gradclip.clipping.policies.base import Policy, PolicyState, Scopes
from gradclip.errors import ArgumentValueError

_COUNTED = "warmup"
"""A field by which norms are counted into the history; it does not show in the shapes of that."""


def is_same_kind(old: Policy | None, new: Policy | None) -> bool:
    """Return whether a policy goes on with the history of the one before it."""
    return type(old) is type(new)


def check_change(name: str, old: Policy | None, new: Policy | None, scopes: Scopes | None) -> None:
    """Refuse a policy that cannot take the place of another one.

    Args:
        name: Whose policy it is: a name pattern, or "group 0".
        old: The policy so far; None leaves the gradients alone.
        new: The next one.
        scopes: What both are told; None where nothing is bounded.

    Raises:
        ArgumentValueError: GC010.
    """
    if old is None or new is None or scopes is None:
        if old is not new:
            raise refused(f"{name!r} has {old!r}, and would have {new!r}")
        return
    for what, before, after in (
        ("scope", old.scope, new.scope),
        ("norm_type", old.order, new.order),
        ("units", dict(old.unit_dims), dict(new.unit_dims)),
    ):
        if before != after:
            raise refused(f"{what} of {name!r} is {before!r}, and would be {after!r}")
    if not is_same_kind(old, new):
        return
    changed = [each for each in type(old).model_fields if getattr(old, each) != getattr(new, each)]
    kept, fresh = (_shapes(each.initial_state(scopes)) for each in (old, new))
    if kept != fresh or _COUNTED in changed:
        raise refused(f"{old!r} has a history to which {new!r} cannot go on ({', '.join(changed)})")


def refused(reason: str) -> ArgumentValueError:
    """Return the error for a policy that cannot be assigned."""
    return ArgumentValueError(
        f"policy cannot be changed like that during a run: {reason}. Give such a policy before the "
        "first step of a run. Nothing was changed."
    )


def _shapes(state: PolicyState) -> dict[tuple[str, str], Any]:
    return {
        (kind, name): (tensor.shape, tensor.dtype)
        for kind, tensors in vars(state).items()
        for name, tensor in tensors.items()
    }
