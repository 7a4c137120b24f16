"""The common step of a small model on a CPU: one norm of all gradients, and one limit.

There the checks and results of the ordinary way take longer than the arithmetic. This way reads
all gradients as one, and answers only where nothing is unusual. Otherwise nothing was done, and the
ordinary way begins from the start: it alone knows what to do about a NaN.
"""

from collections.abc import Sequence
from math import hypot, inf, isfinite, nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradclip.clipping import flags
from gradclip.clipping.apply.coefficients import quotient
from gradclip.clipping.collect.gradients import COARSE_GUARD
from gradclip.clipping.collect.overlap import Bytes
from gradclip.clipping.kernels import SpecsCache, TensorSpecs
from gradclip.clipping.kernels.blocks import representable
from gradclip.clipping.kernels.writes import clamp_each
from gradclip.clipping.policies import FixedLimit, Policy
from gradclip.clipping.step.ownership import Role

_SMALL = 1 << 16
"""Elements of all gradients together up to which a model is small."""

FEW = 64
"""Tensors up to which a copy of each costs less than to concatenate those of one shape."""

_UNCUT = 1 << 15
"""Elements of a tensor that torch copies and multiplies without starting threads."""

_PIECE = 1 << 14
"""Elements that are summed at a time, for the same reason; its dot product starts some earlier."""

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""Squares of their elements neither vanish nor overflow in float64."""

_CPU = torch.device("cpu")
_ORDERS = (2.0, inf)
_LARGEST = torch.finfo(torch.float32).max
_COARSE = 2.0**-100
"""Smaller coefficients are applied in steps."""


class LeanStep(NamedTuple):
    """What a small model's gradients came to; nothing is written yet.

    Args:
        gradients: Those that exist.
        policy: What bounds them.
        threshold: Above this their norm is brought down, or their elements.
        one_threshold: The same of the norm; NaN where elements are clamped.
        order: p of the norm.
        norm: Their norm, which float32 has room for.
        number: What they are multiplied by.
        factor: The same in float32, which multiplies any of their dtypes; None for 1.
        ceiling: What elements are clamped to, as their dtype has it; None where none exceeds it.
        left: The norm of what is left behind that.
        each_T: The norm of each gradient, float64 (T,), where a record asks for it.
    """

    gradients: list[Tensor]
    policy: Policy
    threshold: float
    one_threshold: float
    order: float
    norm: float
    number: float
    factor: Tensor | None
    ceiling: float | None
    left: float | None
    each_T: Tensor | None

    def write(self, role: Role) -> None:
        """Multiply or clamp the gradients, and let a role mark them."""
        if self.factor is not None:
            torch._foreach_mul_(self.gradients, self.factor)
        if self.ceiling is not None:
            _clamp(self.gradients, self.ceiling)
        role.mark([(self.gradients, self.policy)] if self.policy.writes else [])


class Lean:
    """Reads the gradients of a small model under one limit that numbers say completely.

    Args:
        policy: What bounds them.
        limit: The policy as numbers.
        each: Whether a record asks for the norm of each gradient.
    """

    def __init__(self, policy: Policy, limit: FixedLimit, *, each: bool) -> None:
        self._policy, self._each = policy, each
        self._threshold, self._target = limit.threshold, limit.target
        self._order, self._element_limit = policy.order, policy.element_limit
        self._shown = limit.threshold, limit.threshold
        if self._element_limit is not None:
            self._shown = self._element_limit, nan
        self._ceilings: dict[torch.dtype, float] = {}

    @classmethod
    def of(cls, policy: Policy | None, *, each: bool = False) -> "Lean | None":
        """Return what reads for a policy; None for one that needs more than one norm."""
        limit = None if policy is None else policy.fixed()
        if policy is None or limit is None:
            return None
        is_one_norm = policy.scope == "group" and policy.order in _ORDERS
        plain = limit.target > 0 and limit.skip_above == inf
        return cls(policy, limit, each=each) if is_one_norm and plain else None

    def read(self, found: Sequence[Tensor | None], known: SpecsCache) -> LeanStep | None:
        """Read gradients, and prepare to scale them; None where that takes the ordinary way.

        Args:
            found: The gradient of each parameter, if it has one.
            known: Recognises gradients that the ordinary way has checked before.
        """
        there = _there(found, known)
        if there is None:
            return None
        gradients, plan, dtype = there
        ceiling = None if self._element_limit is None else self._ceiling(dtype)
        norm, left, each_T = plan.norms(gradients, self._order, ceiling, each=self._each)
        if not norm <= _LARGEST:  # NaN, too
            return None
        number = quotient(norm, self._threshold, self._target, COARSE_GUARD)
        if number < _COARSE:
            return None
        factor = None
        if number != 1:
            factor = torch.scalar_tensor(number, dtype=torch.float32, device="cpu")
        if left is None:
            ceiling = None
        shown, one, order = *self._shown, self._order
        return LeanStep(
            gradients, self._policy, shown, one, order, norm, number, factor, ceiling, left, each_T
        )

    def clamp(self, found: Sequence[Tensor | None], known: SpecsCache, role: Role) -> bool:
        """Clamp gradients whose norm nobody asks for; False where that is not all there is to do.

        Args:
            found: The gradient of each parameter, if it has one.
            known: Recognises gradients that the ordinary way has checked before.
            role: Marks them.
        """
        there = None if self._element_limit is None else _there(found, known)
        if there is None:
            return False
        gradients, _, dtype = there
        ceiling = self._ceiling(dtype)
        _clamp(gradients, ceiling)
        role.mark([(gradients, self._policy)] if self._policy.writes else [])
        return True

    def _ceiling(self, dtype: torch.dtype) -> float:
        """Return what elements are clamped to, as a dtype has it."""
        if (known := self._ceilings.get(dtype)) is None:
            known = self._ceilings[dtype] = float(representable(self._element_limit or 0.0, dtype))
        return known


def _there(
    found: Sequence[Tensor | None], known: SpecsCache
) -> tuple[list[Tensor], "_Gathering", torch.dtype] | None:
    """Return the gradients that exist, how they are gathered, and of what dtype they are.

    None where anything about them is unusual.
    """
    gradients: Any = found
    specs = known.find(gradients)  # what holds a None fits none
    if specs is None:
        gradients = [each for each in found if each is not None]
        specs = known.find(gradients)
    if specs is None or not (plan := specs.plan(_Gathering)).fit or flags.host_waits_for(_CPU):
        return None
    if not plan.bytes.lie_apart(list(map(Tensor.data_ptr, gradients))):
        return None
    return gradients, plan, specs.dtypes[0]


class _Gathering:
    """Whether tensors are few and plain enough to be summed as one, and where that is done."""

    def __init__(self, specs: TensorSpecs) -> None:
        self.bytes = specs.plan(Bytes)
        self._shapes, self._sizes = specs.shapes, specs.row_sizes
        self.fit = (
            len(set(specs.dtypes)) == 1
            and specs.dtypes[0] in _DTYPES
            and set(specs.devices) == {_CPU}
            and all(specs.plain)
            and all(specs.dense)
            and self.bytes.packed
            and specs.one_row_each
            and all(0 < size <= _UNCUT for size in self._sizes)
            and sum(self._sizes) <= _SMALL
            and len(specs) <= FEW
        )
        self._free: list[tuple[list[Tensor], Sequence[Tensor]]] = []

    def norms(
        self, tensors: list[Tensor], order: float, ceiling: float | None, *, each: bool
    ) -> tuple[float, float | None, Tensor | None]:
        """Return the norm of all, and of what is left of them: finite just where all elements are.

        Args:
            tensors: The gradients.
            order: p of the norms: 2, or inf.
            ceiling: What elements are clamped to.
            each: Whether to return the norm of each, too.

        Returns:
            The norm, and that of the clamped elements; None for it where none exceeds the ceiling.
            The norm of each, float64 (T,).
        """
        try:
            buffer = self._free.pop()
        except IndexError:  # the first call, or another thread has it
            buffer = self._buffer()
        places, pieces = buffer
        torch._foreach_copy_(places, tensors)
        norm, left = _norm(pieces, order), None
        each_T = torch.stack(torch._foreach_norm(places, order)) if each else None  # noqa: SLF001
        if ceiling is not None and norm > ceiling and _norm(pieces, inf) > ceiling:
            for piece in pieces:
                piece.clamp_(-ceiling, ceiling)
            left = _norm(pieces, order)
        self._free.append(buffer)
        return norm, left, each_T

    def _buffer(self) -> tuple[list[Tensor], Sequence[Tensor]]:
        """Return the place of each tensor in memory of float64, and that memory in pieces.

        It is kept: to get the pages of new memory takes longer than to fill them.
        """
        with torch.inference_mode(mode=False):  # it is for calls of any mode
            values = torch.empty(sum(self._sizes), dtype=torch.float64, device="cpu")
            each = zip(values.split(self._sizes), self._shapes, strict=True)
            return [place.view(shape) for place, shape in each], values.split(_PIECE)


def _norm(pieces: Sequence[Tensor], order: float) -> float:
    norms = [torch.linalg.vector_norm(piece, order).item() for piece in pieces]
    if order != inf:
        return hypot(*norms)
    return max(norms) if isfinite(sum(norms)) else inf  # the largest of a NaN is any of them


def _clamp(gradients: list[Tensor], ceiling: float) -> None:
    clamp_each(gradients, [-ceiling] * len(gradients), [ceiling] * len(gradients))
