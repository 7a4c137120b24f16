"""The common step on a GPU: a few launches, a verdict on the device, and nothing else.

There the operations between the passes over the gradients, and the calls of Python that start
them, take longer than the arithmetic. This way answers only where a backend can do all of it at
once. Otherwise nothing was done, and the ordinary way begins from the start.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from math import inf
from typing import Any, TypeAlias

from torch import Size, Tensor

from gradclip.clipping.arguments import Options, check_grad_scale, check_one_number
from gradclip.clipping.collect.gradients import COARSE_GUARD
from gradclip.clipping.collect.overlap import Bytes
from gradclip.clipping.kernels import Backends, SpecsCache, TensorSpecs
from gradclip.clipping.kernels.fused import FusedClip, FusedStep, Layout, Limit, Report
from gradclip.clipping.policies import Policy
from gradclip.clipping.step.ownership import Role

Found: TypeAlias = Sequence[Tensor | None]
"""The gradient of each parameter of a pattern, if it has one."""

_ORDERS = {1.0, 2.0, inf}
"""p of norms that one read of the gradients gives."""

_EXTREME = 2.0**300
"""Divided by a number within it, norms of float32 have squares that float64 holds."""


class Fused:
    """Clips in few launches, where numbers say completely what bounds every pattern.

    Args:
        policies: By pattern.
        limits: The same as numbers.
        options: The checked keywords.
        backends: The choice of backend.
        role: What notes who clipped what.
        kept: How many layouts are kept, each with memory on the device.
    """

    def __init__(
        self,
        policies: Mapping[str, Policy],
        limits: list[Limit],
        options: Options,
        backends: Backends,
        role: Role,
        kept: int,
    ) -> None:
        self._policies, self._limits = list(policies.values()), limits
        self._order = self._policies[0].order
        self._skips = options.nonfinite == "skip"
        self._backends, self._role, self._kept = backends, role, kept
        self._may_defer = len(limits) == 1 and limits[0].element_limit is None
        self._known: dict[tuple[int, ...], tuple[list[TensorSpecs], Layout | None]] = {}

    @classmethod
    def of(
        cls,
        policies: Mapping[str, Policy | None],
        options: Options,
        backends: Backends,
        role: Role,
        *,
        by_pattern: bool,
        kept: int = 4,
    ) -> "Fused | None":
        """Return what clips by some policies; None for those that need another way."""
        bounding = {name: policy for name, policy in policies.items() if policy is not None}
        orders = {policy.order for policy in bounding.values()}
        one_norm_each = all(policy.scope == "group" for policy in bounding.values())
        limits = []
        for policy in bounding.values():
            fixed = policy.fixed()
            if fixed is None:
                return None
            zero = 0 in (fixed.target, policy.element_limit)
            zeroes = policy.writes and (options.nonfinite == "skip" or (zero and not by_pattern))
            limits.append(
                Limit(
                    fixed.threshold,
                    fixed.target,
                    fixed.skip_above,
                    COARSE_GUARD,
                    otherwise=0.0 if zeroes else 1.0,
                    writes=policy.writes,
                    element_limit=policy.element_limit,
                )
            )
        # Clamping writes before the verdict, which may have to come first.
        first = options.nonfinite == "raise" or (by_pattern and options.nonfinite == "propagate")
        if first and any(limit.clamps for limit in limits):
            return None
        few = len(bounding) == len(policies) and len(orders) == 1 and orders <= _ORDERS
        if not (few and one_norm_each):
            return None
        return cls(bounding, limits, options, backends, role, kept)

    def clip(
        self,
        found: Sequence[Found],
        caches: Sequence[SpecsCache],
        judge: Callable[[FusedClip], bool],
        grad_scale: float | Tensor | None = None,
        *,
        defer: bool = False,
    ) -> FusedClip | None:
        """Clip; None where that takes the ordinary way, and nothing was done.

        Args:
            found: Of each pattern the gradient of each parameter, if it has one.
            caches: Of each pattern, what recognises gradients that the ordinary way has checked.
            judge: Asked before anything is multiplied: whether to go on. It raises where an error
                is due.
            grad_scale: What the gradients are still multiplied by.
            defer: Leave it to the caller to multiply, if there is one coefficient.
        """
        scale = None if grad_scale is None else _checked(grad_scale)
        given, specs = _recognised(found, caches)
        layout = self._layout(specs) if len(specs) == len(found) else None
        if layout is None or not (scale is None or _is_usual(scale, layout)):
            return None
        deferred = defer and self._may_defer
        tensors = given[0] if len(given) == 1 else list(chain.from_iterable(given))
        addresses = list(map(Tensor.data_ptr, tensors))
        clips: list[FusedClip] = []
        errors: list[Exception] = []

        def allows() -> bool:
            apart = layout.specs.plan(Bytes).lie_apart(addresses)
            for each in self._written(given) if apart else ():
                self._role.check(each[0])
            return apart

        def accepts(report: Report) -> bool:
            clips.append(FusedClip(report, report.to_host(), layout, deferred))
            try:
                return judge(clips[0])
            except Exception as error:  # noqa: BLE001 - raised below: it is none of the backend
                errors.append(error)
                return False

        scales = layout.scales and not deferred
        step = FusedStep(layout, tensors, addresses, scale, scales, allows, accepts)
        run = self._backends.on(layout.device).fused
        if run is None or run(step) is None:
            if errors:
                raise errors.pop()  # kept in this frame, it would keep the gradients
            return None
        self._role.mark(self._written(given))
        return clips[0]

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle as one that knows nothing yet: identities are others there."""
        return {**vars(self), "_known": {}}

    def serves(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether parameters are where this can be done."""
        return bool(parameters) and self._backends.on(parameters[0].device).fused is not None

    def _written(self, given: Sequence[list[Tensor]]) -> list[tuple[list[Tensor], Policy]]:
        """Return the gradients that may be changed, and the policy of each pattern."""
        each = zip(given, self._policies, self._limits, strict=True)
        return [(tensors, policy) for tensors, policy, limit in each if limit.writes]

    def _layout(self, specs: list[TensorSpecs]) -> Layout | None:
        """Return what all gradients together are like; None where they are nothing usual."""
        key = tuple(map(id, specs))
        known = self._known.get(key)  # another thread may clear it
        if known is None:
            if len(self._known) >= self._kept:
                self._known.clear()
            layout = (
                Layout(specs, self._limits, self._order, skips=self._skips)
                if self._is_usual(specs)
                else None
            )
            known = specs, layout  # an identity means the same as long as it is kept
            self._known[key] = known
        return known[1]

    @staticmethod
    def _is_usual(specs: list[TensorSpecs]) -> bool:
        """Return whether gradients are plain tensors of one device, without gaps."""
        return (
            all(all(each.plain) and all(each.dense) for each in specs)
            and all(each.plan(Bytes).packed and all(map(Size.numel, each.shapes)) for each in specs)
            and len({device for each in specs for device in each.devices}) == 1
        )


def _checked(scale: float | Tensor) -> float | Tensor | None:
    """Check what gradients are multiplied by; a tensor on a device stays as it is."""
    if isinstance(scale, Tensor) and scale.device.type != "cpu":
        check_one_number(scale)
        return scale
    return check_grad_scale(scale)


def _is_usual(scale: float | Tensor, layout: Layout) -> bool:
    if isinstance(scale, Tensor):
        return scale.device == layout.device
    return 1 / _EXTREME <= scale <= _EXTREME


def _recognised(
    found: Sequence[Found], caches: Sequence[SpecsCache]
) -> tuple[list[list[Tensor]], list[TensorSpecs]]:
    """Return the gradients of each pattern, and their specs, up to one that has none."""
    given: list[list[Tensor]] = []
    specs: list[TensorSpecs] = []
    for each, cache in zip(found, caches, strict=True):
        there: Any = each
        known = cache.find(there)  # what holds a None fits none
        if known is None:
            there = [one for one in each if one is not None]
            known = cache.find(there)
        if known is None:
            break
        given.append(there)
        specs.append(known)
    return given, specs
