"""Clipping by value: when elements are clamped, and what that leaves."""

from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from gradclip.clipping import flags
from gradclip.clipping.apply.scaling import adopted
from gradclip.clipping.flags import Flag, as_flag, as_known
from gradclip.clipping.kernels import Backends, Clamped, Write
from gradclip.clipping.measure.group import Found, Group
from gradclip.clipping.measure.norm import Sums, by_scope, in_order, read, read_again
from gradclip.clipping.measure.scopes import OneScope

_EUCLIDEAN = 2.0
_ROUNDED = 1 + 2.0**-20
"""More than what a norm can be too small by."""


@dataclass(frozen=True, eq=False)
class Finish:
    """How clamping a pattern ends.

    Args:
        changed: Whether it changes anything.
        left_S: The norms of what is left, (S,).
        writes: What clamps, unless that was done.
    """

    changed: Flag
    left_S: Tensor
    writes: list[Write]


class Clamping:
    """Clamps the patterns whose policy limits each element.

    On the CPU gradients are measured first. What clamping leaves is found where the norm says that
    an element may exceed the limit, and written at the end. An accelerator reads gradients once,
    and sums what is there and what is left together.

    Args:
        backends: The choice of backend.
        skips: Whether a NaN makes the step one that should not be made.
        raises: Whether it is an error.
        together: There may be several patterns: under "propagate" all are clamped then, or none.
    """

    def __init__(self, backends: Backends, *, skips: bool, raises: bool, together: bool) -> None:
        self._backends = backends
        self._skips, self._raises = skips, raises
        self._together = together and not (skips or raises)

    def _goes_first(self, device: torch.device) -> bool:
        """Return whether patterns are clamped as they are measured, before the verdict.

        So it is where the host would have to wait for a verdict; what is skipped is zeroed then.
        """
        return flags.host_waits_for(device) and not self._raises and not self._together

    def read(
        self, group: Group, scale: float | Tensor | None, device: torch.device
    ) -> Clamped | None:
        """Read gradients for their norm and for what clamping leaves, where one pass does both.

        Args:
            group: The pattern.
            scale: What its gradients are still multiplied by.
            device: That of the results.
        """
        limit, gradients = _limit(group, scale), group.gradients
        if limit is None or not any(map(flags.host_waits_for, gradients.devices)):
            return None
        at_once = self._goes_first(device)
        found: list[Clamped] = []
        for part, _ in gradients.written.parts:
            there = limit.to(part.device) if isinstance(limit, Tensor) else limit
            found.append(self._backends.on(part.device).clamp_(part, there, at_once))
        changed = torch.stack([clamped.changed.to(device) for clamped in found]).sum()
        if at_once and gradients.has_sparse and int(changed):
            gradients.adopt_coalesced()
        before_RA = in_order([clamped.before_RA for clamped in found], gradients.written, device)
        after_RA = in_order([clamped.after_RA for clamped in found], gradients.written, device)
        return Clamped(before_RA, after_RA, changed)

    def foresee(
        self, group: Group, found: Found, scale: float | Tensor | None, device: torch.device
    ) -> Found:
        """Find out what clamping leaves, for ranks that have to know before they write.

        A collective after the write could fail after it, and gradients would be half clipped.

        Returns:
            What was found, with ``left`` and ``changed`` of this rank if elements are limited.
        """
        limit = _limit(group, scale)
        if limit is None:
            return found
        within = not (found.clamped or flags.host_waits_for(device)) and _is_within(
            float(limit), by_scope(group.of.order, found.norm.rows_RA, OneScope()).norms()
        )
        left, moved, writes = self._left(group, found, limit, device, within=within)
        changed = as_flag(moved, device).to(torch.float64)
        return replace(found, left=left, changed=changed, writes=writes)

    def finish(
        self,
        group: Group,
        found: Found,
        norms_S: Tensor,
        scale: float | Tensor | None,
        *,
        bounded: Flag,
        unwanted: Flag,
    ) -> Finish:
        """Prepare to clamp a pattern unless that was done.

        Args:
            group: The pattern.
            found: What was found in it.
            norms_S: The norms before.
            scale: What its gradients are still multiplied by.
            bounded: Whether nothing forbids the step.
            unwanted: Whether a policy asks to skip it.
        """
        limit, device, clamped = _limit(group, scale), norms_S.device, found.clamped
        refused = bounded is False and (self._skips or self._together)
        done = clamped is not None and self._goes_first(device)
        if limit is None or ((refused or unwanted is True) and not done):
            return Finish(False, norms_S, [])
        if found.left is not None and found.changed is not None:
            left, changed, writes = found.left, as_known(found.changed > 0), found.writes
        elif clamped is None and self._leaves_alone(group, norms_S):
            return Finish(False, norms_S, [])
        else:
            left, changed, writes = self._left(group, found, limit, device, within=False)
        left_S = left.norms(scale)
        if self._together and isinstance(bounded, Tensor):
            unlimited = torch.full((), inf, dtype=torch.float64, device=device)
            limit = torch.where(bounded, limit, unlimited)
            changed, left_S = changed & bounded, torch.where(bounded, left_S, norms_S)
        if clamped is not None and not done:
            idle = group.gradients.has_sparse and not int(clamped.changed)
            writes = [] if idle else self._writes(group, limit)
        return Finish(changed, norms_S if changed is False else left_S, list(writes))

    def _left(
        self,
        group: Group,
        found: Found,
        limit: float | Tensor,
        device: torch.device,
        *,
        within: bool,
    ) -> tuple[Sums, Flag, list[Write]]:
        """Find out what clamping leaves.

        Args:
            group: The pattern.
            found: What was found in it.
            limit: That of its elements as they are.
            device: That of the results.
            within: Whether it is known that no element exceeds it.

        Returns:
            The norm of what is left, whether an element changes, and what clamps on the CPU.
        """
        order, clamped = found.norm.order, found.clamped
        writes: list[Write] = []
        known: Tensor | None
        changed: Flag
        if clamped is not None:
            known = clamped.after_RA if order == _EUCLIDEAN else None
            changed = as_known(clamped.changed > 0)
        else:
            writes = [] if within else self._writes(group, limit)
            known = None if writes else found.norm.rows_RA
            changed = bool(writes)
        batch = group.gradients.measured(order).limited(limit)
        left = read(self._backends, batch, device, order, group.rows, known)
        left, _ = read_again(self._backends, batch, left, group.rows)
        return left, changed, writes

    def _writes(self, group: Group, limit: float | Tensor) -> list[Write]:
        """Prepare to clamp a pattern wherever it is."""
        writes = []
        for part, _ in group.gradients.written.parts:
            there = limit.to(part.device) if isinstance(limit, Tensor) else limit
            writes += self._backends.on(part.device).clamping(part, there)
        return adopted(group.gradients, writes)

    @staticmethod
    def _leaves_alone(group: Group, norms_S: Tensor) -> bool:
        """Return whether it is plain to see that no element exceeds the limit."""
        if not group.gradients.tensors:
            return True
        limit = group.of.element_limit
        known = limit is not None and not flags.host_waits_for(norms_S.device)
        return known and limit is not None and _is_within(limit, norms_S)


def _limit(group: Group, scale: float | Tensor | None) -> float | Tensor | None:
    """Return the limit of each element as it is now, still multiplied by the scale."""
    limit = group.of.element_limit
    if limit is None or not group.of.writes:
        return None
    return limit if scale is None else limit * scale


def _is_within(limit: float, norms_S: Tensor) -> bool:
    """Return whether norms show that no element exceeds a limit: none is larger than a norm."""
    return all(norm * _ROUNDED <= limit for norm in norms_S.tolist())
