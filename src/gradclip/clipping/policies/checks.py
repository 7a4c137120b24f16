"""What the first answer of a policy is checked for: mistakes of its author, in plain words."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gradclip.clipping.policies.base import Decision, Measurement, Policy, PolicyState
from gradclip.errors import ArgumentTypeError, ArgumentValueError


def check_decision(policy: Policy, decision: object, norms_S: Tensor) -> None:
    """Refuse an answer that cannot be followed.

    Raises:
        ArgumentTypeError: GC011, for something of another kind.
        ArgumentValueError: GC010, for thresholds or targets that are not one per scope.
    """
    name = f"{type(policy).__name__}.decide"
    if not isinstance(decision, Decision):
        raise ArgumentTypeError(
            f"{name} returned a {type(decision).__name__}: expected a Decision. No gradient was "
            "changed."
        )
    for field in ("thresholds", "targets"):
        value = getattr(decision, field)
        if isinstance(value, Tensor) and value.shape not in (norms_S.shape, torch.Size([])):
            raise ArgumentValueError(
                f"{name} returned {field} of shape {tuple(value.shape)} for "
                f"{len(norms_S)} scopes: expected ({len(norms_S)},), or one number for all. No "
                "gradient was changed."
            )
    skip = decision.skip
    if not isinstance(skip, bool) and not (
        isinstance(skip, Tensor) and skip.dtype is torch.bool and skip.numel() == 1
    ):
        raise ArgumentTypeError(
            f"{name} returned skip={skip!r}: expected a bool, or a tensor with one bool. No "
            "gradient was changed."
        )


class _Origins(TorchFunctionMode):
    """Follows some tensors through torch: notes everything that is computed from them.

    Args:
        tensors: Those to follow.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._followed = {id(tensor): tensor for tensor in tensors}  # kept, so that ids stay theirs

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(map(self.has, tree_leaves((args, kwargs)))):
            made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
            self._followed |= {id(tensor): tensor for tensor in made}
        return result

    def has(self, value: object) -> bool:
        """Return whether a value is one of them, or was computed from one."""
        return id(value) in self._followed


def check_skip_is_shared(policy: Policy, seen: Measurement, state: PolicyState) -> None:
    """Refuse a skip, or a shared history, that follows from scopes that other ranks do not see.

    Some ranks would step, and others would not.

    Raises:
        ArgumentValueError: GC010.
    """
    if policy.scope == "group":
        return
    weights = [] if seen.weight_norms_S is None else [seen.weight_norms_S]
    origins = _Origins([seen.norms_S, *weights, *state.per_scope.values()])
    with origins:
        answer = policy.decide(seen, state)
    if any(map(origins.has, [answer.skip, *answer.state.shared.values()])):
        raise ArgumentValueError(
            f"{policy!r} decides by the norm of each {policy.scope}, which only some ranks see, "
            "whether to skip the step, or what its shared history is: some ranks would step, and "
            "others would not. Decide by total_norm, which all ranks know. No gradient was changed."
        )
