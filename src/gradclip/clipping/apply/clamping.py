"""Clipping by value: whether elements are clamped before the verdict or after it, and the rest."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf

import torch
from torch import Tensor

from gradclip.clipping import flags
from gradclip.clipping.arguments import Nonfinite
from gradclip.clipping.flags import Flag, as_known
from gradclip.clipping.kernels import Backends, Batch, Clamped
from gradclip.clipping.kernels.blocks import representable, rows_of
from gradclip.clipping.measure.group import Found, Group
from gradclip.clipping.measure.norm import Sums, by_scope, in_order, read, read_again
from gradclip.clipping.measure.scopes import OneScope

_EUCLIDEAN = 2.0
_ROUNDED = 1 + 2.0**-20
"""More than what a norm can be too small by."""


class Clamping:
    """Clamps the patterns whose policy limits each element.

    Args:
        backends: The choice of backend.
        nonfinite: What to do about a NaN.
        together: There may be several patterns: under "propagate" all are clamped then, or none.
    """

    def __init__(self, backends: Backends, nonfinite: Nonfinite, *, together: bool) -> None:
        self._backends = backends
        self._skips = nonfinite == "skip"
        self._raises = nonfinite == "raise"
        self._together = together and nonfinite == "propagate"

    def goes_first(self, device: torch.device) -> bool:
        """Return whether patterns are clamped and measured in one pass, before the verdict.

        So it is where the host would have to wait for a verdict; what is skipped is zeroed then.
        """
        return flags.host_waits_for(device) and not self._raises and not self._together

    def clamp(
        self,
        group: Group,
        scale: float | Tensor | None,
        device: torch.device,
        *,
        only_if: Flag | None = None,
        before: bool = False,
    ) -> Clamped | None:
        """Clamp a pattern whose policy limits elements; None for any other.

        Args:
            group: The pattern.
            scale: What its gradients are still multiplied by.
            device: That of the results.
            only_if: A verdict on which it depends, where that is a tensor.
            before: Whether to sum squares of what was there.
        """
        limit = _limit(group, scale)
        if limit is None or not group.gradients.tensors:
            return None
        if isinstance(only_if, Tensor):
            unlimited = torch.full((), inf, dtype=torch.float64, device=device)
            limit = torch.where(only_if, limit, unlimited)
        batch = group.gradients.measured(_EUCLIDEAN)
        clamped = _clamp_everywhere(self._backends, batch, limit, device, before=before)
        if group.gradients.has_sparse and int(clamped.changed):
            group.gradients.adopt_coalesced()
        return clamped

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
        order = found.norm.order
        batch = group.gradients.measured(order)
        known: Tensor | None
        if found.clamped is not None:
            known = found.clamped.after_RA if order == _EUCLIDEAN else None
            changed = found.clamped.changed.to(torch.float64)
        elif not flags.host_waits_for(device) and _is_within(
            float(limit), self._norm_here(group, found)
        ):
            known, changed = found.norm.rows_RA, torch.zeros((), dtype=torch.float64, device=device)
        else:
            known, changed = _sums_if_clamped(self._backends, batch, limit, order, device)
        left = read(self._backends, batch, device, order, group.rows, known)
        return replace(found, left=left, changed=changed)

    def finish(
        self,
        group: Group,
        found: Found,
        norms_S: Tensor,
        scale: float | Tensor | None,
        *,
        bounded: Flag,
        unwanted: Flag,
    ) -> tuple[Flag, Tensor]:
        """Clamp a pattern unless that was done.

        Args:
            group: The pattern.
            found: What was found in it.
            norms_S: The norms before.
            scale: What its gradients are still multiplied by.
            bounded: Whether nothing forbids the step.
            unwanted: Whether a policy asks to skip it.

        Returns:
            Whether anything changed, and the norms of what is left, (S,).
        """
        device = norms_S.device
        clamped = found.clamped
        refused = bounded is False and (self._skips or self._together)
        if (refused or unwanted is True) and clamped is None:
            return False, norms_S
        if clamped is None and not self._leaves_alone(group, norms_S, device):
            only_if = bounded if self._together else None
            clamped = self.clamp(group, scale, device, only_if=only_if)
        if found.changed is not None and found.left is not None:
            changed, left_S = as_known(found.changed > 0), _norms(found.left, scale)
            if self._together and isinstance(bounded, Tensor):
                return changed & bounded, torch.where(bounded, left_S, norms_S)
            return changed, left_S
        if clamped is None:
            return False, norms_S
        changed = as_known(clamped.changed > 0)
        if changed is False:
            return changed, norms_S
        return changed, self._left(group, found, clamped, scale, device)

    def _left(
        self,
        group: Group,
        found: Found,
        clamped: Clamped,
        scale: float | Tensor | None,
        device: torch.device,
    ) -> Tensor:
        """Return the norms of what clamping left, (S,)."""
        order = found.norm.order
        batch = group.gradients.measured(order)
        sums_RA = clamped.after_RA if order == _EUCLIDEAN else None
        left = read(self._backends, batch, device, order, group.rows, sums_RA)
        left, _ = read_again(self._backends, batch, left, group.rows)
        return _norms(left, scale)

    @staticmethod
    def _norm_here(group: Group, found: Found) -> Tensor:
        """Return the norm of the gradients that are on this rank, (1,): p is 1 or 2 on ranks."""
        return by_scope(group.of.order, found.norm.rows_RA, OneScope()).norms()

    @staticmethod
    def _leaves_alone(group: Group, norms_S: Tensor, device: torch.device) -> bool:
        limit = group.of.element_limit
        return limit is not None and not flags.host_waits_for(device) and _is_within(limit, norms_S)


def _limit(group: Group, scale: float | Tensor | None) -> float | Tensor | None:
    """Return the limit of each element as it is now, still multiplied by the scale."""
    limit = group.of.element_limit
    if limit is None or not group.of.writes:
        return None
    return limit if scale is None else limit * scale


def _norms(sums: Sums, scale: float | Tensor | None) -> Tensor:
    norms_S = sums.norms()
    return norms_S if scale is None else norms_S / scale


def _is_within(limit: float, norms_S: Tensor) -> bool:
    """Return whether norms show that no element exceeds a limit: none is larger than a norm."""
    return all(norm * _ROUNDED <= limit for norm in norms_S.tolist())


def _clamp_everywhere(
    backends: Backends, batch: Batch, limit: float | Tensor, device: torch.device, *, before: bool
) -> Clamped:
    """Clamp every element to [-limit, limit], wherever it is.

    Args:
        backends: The choice of backend.
        batch: Real tensors, of any devices, dtypes and shapes.
        limit: A number, or 0-d float64.
        device: That of the results.
        before: Whether the squares of what was there are summed on the way.
    """
    found: list[Clamped] = []
    for part, _ in batch.parts:
        there = limit.to(part.device) if isinstance(limit, Tensor) else limit
        found.append(backends.on(part.device).clamp_(part, there, before))
    changed = [clamped.changed.to(device) for clamped in found]
    return Clamped(
        in_order([clamped.before_RA for clamped in found], batch, device),
        in_order([clamped.after_RA for clamped in found], batch, device),
        changed[0] if len(changed) == 1 else torch.stack(changed).sum(),
    )


def _sums_if_clamped(
    backends: Backends, batch: Batch, limit: float | Tensor, p: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return what clamping would leave, and how many elements it would change; writes nothing.

    Args:
        backends: The choice of backend.
        batch: Real tensors, of any devices, dtypes and shapes.
        limit: A number, or 0-d float64.
        p: 1 or 2.
        device: That of the results.

    Returns:
        The sums of powers of each row, (R, A), and a count: 0-d float64. Copies are made of at most
        2^21 elements at a time, or of one row.
    """
    found: list[Tensor] = []
    changed = torch.zeros((), dtype=torch.float64, device=device)
    for part, _ in batch.parts:
        top = representable(limit, part.dtype)
        if isinstance(top, Tensor):
            top = top.to(part.device)
        rows = [
            row
            for tensor, n in zip(part.tensors, part.specs.rows, strict=True)
            for row in rows_of(tensor, n)
        ]
        sums: list[Tensor] = []
        for some in _in_turns(rows):
            clamped = [row.clamp(-top, top) for row in some]  # type: ignore[arg-type]
            differ = [(row.abs() > top).sum() for row in some]
            changed = changed + torch.stack(differ).sum().to(device)
            sums.append(backends.on(part.device).power_sums(Batch.of(clamped), p))
        found.append(torch.cat(sums))
    table = in_order(found, batch, device, p)
    return torch.zeros(
        0, 1, dtype=torch.float64, device=device
    ) if table is None else table, changed


_COPIED = 1 << 21


def _in_turns(rows: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    turn: list[Tensor] = []
    size = 0
    for row in rows:
        if turn and size + row.numel() > _COPIED:
            yield turn
            turn, size = [], 0
        turn.append(row)
        size += row.numel()
    if turn:
        yield turn
