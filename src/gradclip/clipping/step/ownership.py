"""Who clips the gradients that an optimizer steps on: one, or an error that names both.

An owner, such as an attachment or a callback, clips before every step of an optimizer. It claims
the optimizer, so that two owners are found before the first step. A guest, such as a
``GradientClipper`` or a function in the loop, cannot know of it. Both leave marks on gradients
that they clipped. An owner looks for the marks of others before the step; a guest never refuses.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol
from weakref import WeakMethod, ref

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gradclip.clipping.step.wrappers import unwrapped
from gradclip.errors import DoubleClippingError

_CLAIMS: Any = WeakIdKeyDictionary()
"""Owner and label by optimizer, of which some compare by value, or cannot be hashed."""

_MARKING: "list[_Marking]" = []
"""What has left marks; it is kept here as long as a gradient that it marked lives."""


def claim(optimizer: torch.optim.Optimizer, owner: object, label: str) -> None:
    """Claim an optimizer: its owner clips before every step.

    Args:
        optimizer: A torch optimizer, or a wrapper of one.
        owner: What clips; it is not kept alive.
        label: What an error calls it.

    Raises:
        DoubleClippingError: GC101, something else has claimed it; nothing was changed.
    """
    check_unclaimed(optimizer, owner, label)
    _CLAIMS[unwrapped(optimizer)] = ref(owner), label


def release(optimizer: torch.optim.Optimizer, owner: object) -> None:
    """Give up a claim; harmless where there is none."""
    inner = unwrapped(optimizer)
    known = _CLAIMS.get(inner)
    if known is not None and known[0]() is owner:
        del _CLAIMS[inner]


def owner_of(optimizer: torch.optim.Optimizer) -> object | None:
    """Return what has claimed an optimizer; None if nothing has."""
    known = _CLAIMS.get(unwrapped(optimizer))
    return None if known is None else known[0]()


def check_unclaimed(optimizer: torch.optim.Optimizer, owner: object, label: str) -> None:
    """Refuse to clip what another owner clips before every step.

    Raises:
        DoubleClippingError: GC101, naming both; nothing was changed.
    """
    inner = unwrapped(optimizer)
    # What only looks like an optimizer cannot be attached to.
    known = _CLAIMS.get(inner) if isinstance(inner, torch.optim.Optimizer) else None
    other = None if known is None else known[0]()
    if known is None or other is None or other is owner:
        return
    raise DoubleClippingError(
        f"the gradients of this {type(inner).__name__} are already clipped before "
        f"every step, by {known[1]}; {label} would clip them again, and a second limit silently "
        "changes what the first one means. Keep one of them: remove() takes an attachment or a "
        "callback off, and limits by parameter go into one policy. Where the handle of an "
        "attachment is lost, gradclip.attached(optimizer) returns it; where a callback is lost, "
        "make the optimizer anew. No gradient was changed."
    )


class Role(Protocol):
    """What an engine is to others that clip the same gradients."""

    def admit(self, policy: object) -> None:
        """Look at a policy that is assigned during the run, before anything is changed."""
        ...

    def check(self, gradients: Sequence[Tensor]) -> None:
        """Look at gradients that will be clipped, before anything is changed."""
        ...

    def mark(self, clipped: Iterable[tuple[Sequence[Tensor], object]]) -> None:
        """Note which gradients were clipped at this call, and by which policy."""
        ...


class _Mark(NamedTuple):
    """A gradient that was clipped, as it was then; it is not kept alive.

    Its identity tells at once that it is none of those of a step; a new one may have the same.
    """

    identity: int
    gradient: "ref[Tensor]"
    version: int
    address: int
    policy: object

    @property
    def alive(self) -> Tensor | None:
        """The gradient, if it still lives."""
        found = self.gradient()
        if found is not None:
            found._fix_weakref()  # type: ignore[attr-defined]  # noqa: SLF001 - as torch's own TensorWeakRef
        return found

    def stands(self) -> bool:
        """Return whether the gradient lives, and was not written since."""
        found = self.alive
        if found is None:
            return False
        version = found._version  # noqa: SLF001 - how often it was written, as autograd counts
        return (version, _address(found)) == (self.version, self.address)


class _Marking:
    """Leaves marks on gradients that it clipped.

    Args:
        label: What an error calls it.
        calls: Of how many calls the marks are kept.
        few: How many marks stand for all gradients of a call.
    """

    owners = 0
    """How many owners were ever made."""

    def __init__(self, label: str, *, calls: int = 1, few: int = 1) -> None:
        self.label, self._few = label, few
        self.released = False
        """Whether it has given its gradients up, so that its marks mean nothing any more."""
        self.marks: deque[list[_Mark]] = deque(maxlen=calls)
        self._seen = -1

    def __getstate__(self) -> dict[str, object]:
        """Copy and pickle without marks: they are of gradients that exist now."""
        return {**vars(self), "marks": deque[list[_Mark]](maxlen=self.marks.maxlen)}

    def mark(self, clipped: Iterable[tuple[Sequence[Tensor], object]]) -> None:
        """Mark a few gradients that stand for all; each of them where an owner came since."""
        if torch.is_inference_mode_enabled():
            return  # nothing counts changes there
        every, self._seen = self._seen != _Marking.owners, _Marking.owners
        marks: list[_Mark] = []
        for gradients, policy in clipped:
            stride = 1 if every else max(1, -(-len(gradients) // self._few))
            some = gradients[::stride]
            marks += [_Mark(id(g), ref(g), g._version, _address(g), policy) for g in some]  # noqa: SLF001 - as autograd
        self.marks.append(marks)
        if self not in _MARKING:
            _forget_marks_of_none()
            _MARKING.append(self)

    def is_marked(self) -> bool:
        """Return whether its marks mean something: a gradient that it marked still lives."""
        return not self.released and any(
            m.alive is not None for m in chain.from_iterable(list(self.marks))
        )


class Guest(_Marking):
    """Clips in a loop that may have an owner: leaves marks, and never refuses."""

    def admit(self, policy: object) -> None:
        """Refuse nothing."""

    def check(self, gradients: Sequence[Tensor]) -> None:
        """Refuse nothing: to clip twice in a loop is its author's choice."""


class Owner(_Marking):
    """Clips before every step: refuses gradients that a guest or another owner clipped.

    Args:
        label: What an error calls it.
        admits: Refuses a policy that is assigned, where it cannot be followed.
    """

    def __init__(self, label: str, admits: Callable[[object], None] | None = None) -> None:
        super().__init__(label)
        # Weakly: its marks keep it as long as the gradients live, and those their optimizer.
        self._admits = None if admits is None else WeakMethod(admits)
        _Marking.owners += 1
        _forget_marks_of_none()  # it looks at all marks, at every step

    def __getstate__(self) -> dict[str, Any]:
        admits = None if self._admits is None else self._admits()
        return {**super().__getstate__(), "_admits": admits}

    def __setstate__(self, state: dict[str, Any]) -> None:
        admits = state["_admits"]
        vars(self).update(state, _admits=None if admits is None else WeakMethod(admits))

    def admit(self, policy: object) -> None:
        """Refuse a policy that the owner cannot follow."""
        admits = None if self._admits is None else self._admits()
        if admits is not None:
            admits(policy)

    def check(self, gradients: Sequence[Tensor]) -> None:
        """Refuse to clip what another one clipped, where nothing has changed since.

        Raises:
            DoubleClippingError: GC101, naming both.
        """
        if torch.is_inference_mode_enabled():
            return
        mine: set[int] | None = None
        for other in _MARKING:
            if other is self or other.released:
                continue
            mine = {id(gradient) for gradient in gradients} if mine is None else mine
            for mark in chain.from_iterable(list(other.marks)):  # threads have engines of their own
                if mark.identity in mine and mark.stands():
                    self._refuse(other, mark)

    def _refuse(self, other: _Marking, mark: _Mark) -> None:
        raise DoubleClippingError(
            f"the gradients of this step were already clipped by {other.label} ({mark.policy!r}); "
            f"{self.label} would clip them again, and a second limit silently changes what the "
            "first one means. Keep one of them: limits by parameter go into one policy, and where "
            "two optimizers share a parameter, each needs a backward pass of its own. No gradient "
            f"was changed by {self.label}, and no step was made."
        )


def _forget_marks_of_none() -> None:
    """Forget what has left marks, where none of the gradients that it marked lives."""
    _MARKING[:] = [each for each in list(_MARKING) if each.is_marked()]


def _address(gradient: Tensor) -> int:
    """Return where a gradient lies, if it has memory of its own."""
    return gradient.data_ptr() if gradient.layout is torch.strided else 0
