"""What the answer of a policy is checked for: mistakes of its author, in plain words."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gradclip.clipping import flags
from gradclip.clipping.policies.base import Decision, Measurement, Policy, PolicyState
from gradclip.errors import ArgumentTypeError, ArgumentValueError


def check_skips(policies: Iterable[Policy | None], tolerated: int) -> None:
    """Refuse a policy that asks to skip more steps in a row than are tolerated.

    Args:
        policies: Those of a clipper.
        tolerated: Its ``max_consecutive_skips``.

    Raises:
        ArgumentValueError: GC010.
    """
    for policy in policies:
        if policy is not None and policy.skips_in_a_row > tolerated:
            raise ArgumentValueError(
                f"max_consecutive_skips={tolerated} is below the max_spikes="
                f"{policy.skips_in_a_row} of {policy!r}: a level of the norm that has risen for "
                "good would end in an error, and not in a step that follows it. Raise "
                "max_consecutive_skips, or lower max_spikes."
            )


def check_decision(policy: Policy, decision: object, norms_S: Tensor) -> None:
    """Refuse an answer that cannot be followed, before anything is written.

    Raises:
        ArgumentTypeError: GC011, for something of another kind.
        ArgumentValueError: GC010, for thresholds or targets that are not one per scope, not on the
            device of the norms, or, where the host can see it for nothing, negative or NaN.
    """
    if not isinstance(decision, Decision):
        raise _wrong_kind(policy, f"a {type(decision).__name__}: expected a Decision")
    _check_numbers(policy, "thresholds", decision.thresholds, norms_S)
    if decision.targets is not decision.thresholds:
        _check_numbers(policy, "targets", decision.targets, norms_S)
    skip = decision.skip
    is_flag = isinstance(skip, Tensor) and skip.dtype is torch.bool and skip.numel() == 1
    if not (isinstance(skip, bool) or is_flag):
        raise _wrong_kind(policy, f"skip={skip!r}: expected a bool, or a tensor with one bool")
    if not isinstance(decision.state, PolicyState):
        raise _wrong_kind(policy, f"state={decision.state!r}: expected a PolicyState")


def _check_numbers(policy: Policy, name: str, value: object, norms_S: Tensor) -> None:
    if isinstance(value, Tensor):
        count = len(norms_S)
        if value.shape not in (norms_S.shape, torch.Size([])):
            raise _out_of_range(
                policy,
                f"{name} of shape {tuple(value.shape)} for {count} scopes: expected ({count},), or "
                "one number for all",
            )
        if not value.is_floating_point() or value.device != norms_S.device:
            raise _out_of_range(
                policy,
                f"{name} of {value.dtype} on {value.device}: expected {norms_S.dtype} on "
                f"{norms_S.device}",
            )
        seen = value.numel() and not flags.host_waits_for(value.device)
        wrong = seen and not value.amin().item() >= 0
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_kind(policy, f"{name}={value!r}: expected a number or a tensor")
    else:
        wrong = not value >= 0
    if wrong:
        raise _out_of_range(policy, f"{name}={value!r}: expected numbers >= 0")


def _wrong_kind(policy: Policy, what: str) -> ArgumentTypeError:
    name = type(policy).__name__
    return ArgumentTypeError(f"{name}.decide returned {what}. No gradient was changed.")


def _out_of_range(policy: Policy, what: str) -> ArgumentValueError:
    name = type(policy).__name__
    return ArgumentValueError(f"{name}.decide returned {what}. No gradient was changed.")


class _Origins(TorchFunctionMode):
    """Follows some tensors through torch: notes everything that is computed from them.

    Args:
        tensors: Those to follow.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._followed = {id(tensor): tensor for tensor in tensors}  # kept, so that ids stay theirs
        self.was_read = False
        """Whether the host read one of them."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(map(self.has, tree_leaves((args, kwargs)))):
            name = getattr(func, "__name__", "")
            # In place, or by assignment: the first argument is computed from the others then.
            written = [args[0]] if name.endswith("_") and args else []
            made = [*tree_leaves(result), *written]
            tensors = [each for each in made if isinstance(each, Tensor)]
            self._followed |= {id(tensor): tensor for tensor in tensors}
            self.was_read |= name in _READS
        return result

    def has(self, value: object) -> bool:
        """Return whether a value is one of them, or was computed from one."""
        return id(value) in self._followed


_READS = frozenset({"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__array__"})


def decide_by_shared(policy: Policy, seen: Measurement, state: PolicyState) -> Decision:
    """Ask a policy on several ranks for the first time.

    A skip, or a shared history, that follows from scopes that other ranks do not see is refused:
    some ranks would step, and others would not.

    Raises:
        ArgumentValueError: GC010.
    """
    if policy.scope == "group":
        return policy.decide(seen, state)
    weights = [] if seen.weight_norms_S is None else [seen.weight_norms_S]
    origins = _Origins([seen.norms_S, *weights, *state.per_scope.values()])
    with origins:
        answer = policy.decide(seen, state)
    check_decision(policy, answer, seen.norms_S)
    if origins.was_read or any(map(origins.has, [answer.skip, *answer.state.shared.values()])):
        raise ArgumentValueError(
            f"{policy!r} decides by the norm of each {policy.scope}, which only some ranks see, "
            "whether to skip the step, or what its shared history is, or reads such a norm on the "
            "host: some ranks would step, and others would not. Decide by total_norm, which all "
            "ranks know. No gradient was changed."
        )
    return answer
