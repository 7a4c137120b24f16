"""Clipping by value: when a group is clamped, before the verdict or after it, and what is left."""

from math import inf

import torch
from torch import Tensor

from gradclip.clipping.apply.coefficients import Flag, host_waits_for
from gradclip.clipping.arguments import Nonfinite
from gradclip.clipping.kernels import Backends
from gradclip.clipping.measure.group import Group
from gradclip.clipping.measure.norm import (
    Measured,
    Norm,
    Together,
    clamp_everywhere,
    sums_if_clamped,
)

_EUCLIDEAN = 2.0
_ROUNDED = 1 + 2.0**-20
"""More than what a norm can be too small by."""


class Clamping:
    """Clamps the groups whose policy limits each element.

    Args:
        backends: The choice of backend.
        nonfinite: What to do about a NaN.
        together: There may be several groups: under "propagate" all are clamped then, or none.
    """

    def __init__(self, backends: Backends, nonfinite: Nonfinite, *, together: bool) -> None:
        self._backends = backends
        self._skips = nonfinite == "skip"
        self._raises = nonfinite == "raise"
        self._together = together and nonfinite == "propagate"

    def goes_first(self, home: torch.device) -> bool:
        """Return whether groups are clamped and measured in one pass, before the verdict.

        So it is where the host would have to wait for a verdict; what is skipped is zeroed then.
        """
        return host_waits_for(home) and not self._raises and not self._together

    def clamp(
        self,
        group: Group,
        scale: float | Tensor | None,
        home: torch.device,
        *,
        only_if: Flag | None = None,
        before: bool = False,
    ) -> None:
        """Clamp a group whose policy limits elements, and keep what was found with it.

        Args:
            group: Any group.
            scale: What its gradients are still multiplied by.
            home: Device of the results.
            only_if: A verdict on which it depends, where that is a tensor.
            before: Whether to sum squares of what was there.
        """
        limit: float | Tensor | None = group.policy.element_limit
        if limit is None or not (group.policy.writes and group.gradients.tensors):
            return
        if scale is not None:
            limit = limit * scale
        if isinstance(only_if, Tensor):
            unlimited = torch.full((), inf, dtype=torch.float64, device=home)
            limit = torch.where(only_if, limit, unlimited)
        batch = group.gradients.measured(_EUCLIDEAN)
        group.clamped = clamp_everywhere(self._backends, batch, limit, home, before=before)
        if group.gradients.has_sparse and int(group.clamped.changed):
            group.gradients.adopt_coalesced()

    def foresee(self, group: Group, scale: float | Tensor | None, home: torch.device) -> None:
        """Find out what clamping would leave, for ranks that have to know before they write.

        Sets ``group.left``, and ``group.changed`` of this rank, for a group that is limited.
        """
        limit: float | Tensor | None = group.policy.element_limit
        if limit is None or not group.policy.writes:
            return
        if scale is not None:
            limit = limit * scale
        group.left = Norm(group.norm.order, group.norm.scopes)
        batch = group.gradients.measured(group.norm.order)
        if group.clamped is not None:
            group.changed = group.clamped.changed.to(torch.float64)
            known = group.clamped.after_RA if group.norm.order == _EUCLIDEAN else None
            group.left.read(self._backends, batch, home, known)
        elif not host_waits_for(home) and _is_within(float(limit), self._here(group, home)):
            group.changed = torch.zeros((), dtype=torch.float64, device=home)
            group.left.read(self._backends, batch, home, group.norm.rows_RA)
        else:
            sums_RA, group.changed = sums_if_clamped(
                self._backends, batch, limit, group.norm.order, home
            )
            group.left.read(self._backends, batch, home, sums_RA)

    def finish(
        self, group: Group, norms: Measured, counts: Flag, scale: float | Tensor | None
    ) -> tuple[Flag, Tensor]:
        """Clamp a group unless that was done; return whether anything changed, and what is left."""
        home = norms.norms_S.device
        refused = counts is False and (self._skips or self._together)
        if refused and group.clamped is None:
            return False, norms.norms_S
        if group.clamped is None and not self._leaves_alone(group, norms, home):
            self.clamp(group, scale, home, only_if=counts if self._together else None)
        if group.changed is not None:
            return self._of_all_ranks(group, group.changed > 0, norms, counts, scale)
        if group.clamped is None:
            return False, norms.norms_S
        changed: Flag = group.clamped.changed > 0
        if not host_waits_for(home):
            changed = bool(changed)
        left_S = norms.norms_S
        if changed is not False:
            left_S = group.measured_left(self._backends, scale, home)
        return changed, left_S

    def _of_all_ranks(
        self,
        group: Group,
        changed: Tensor,
        norms: Measured,
        counts: Flag,
        scale: float | Tensor | None,
    ) -> tuple[Flag, Tensor]:
        home = norms.norms_S.device
        left_S = group.measured_left(self._backends, scale, home)
        if not host_waits_for(home):
            return bool(changed), left_S
        if self._together and isinstance(counts, Tensor):
            return changed & counts, torch.where(counts, left_S, norms.norms_S)
        return changed, left_S

    def _here(self, group: Group, home: torch.device) -> Tensor:
        """Return the norm of the gradients that are here, (1,)."""
        norm = Norm(group.norm.order, Together())
        batch = group.gradients.measured(group.norm.order)
        norm.read(self._backends, batch, home, group.norm.rows_RA)
        return norm.norms()

    @staticmethod
    def _leaves_alone(group: Group, norms: Measured, home: torch.device) -> bool:
        limit = group.policy.element_limit
        return limit is not None and not host_waits_for(home) and _is_within(limit, norms.norms_S)


def _is_within(limit: float, norms_S: Tensor) -> bool:
    """Return whether norms show that no element exceeds a limit: none is larger than a norm."""
    return all(norm * _ROUNDED <= limit for norm in norms_S.tolist())
