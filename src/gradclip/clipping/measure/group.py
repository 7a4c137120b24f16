"""The gradients of one name pattern at one call, with the policy that bounds them."""

from dataclasses import dataclass, field
from math import inf, isnan
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradclip.clipping.apply.coefficients import Flag, as_known, host_waits_for
from gradclip.clipping.collect.gradients import Gradients
from gradclip.clipping.kernels import Backends, Clamped
from gradclip.clipping.measure.norm import Apart, Measured, Norm, Scopes, Together, per_tensor
from gradclip.clipping.policies import Policy

if TYPE_CHECKING:
    from gradclip.clipping.ranks.share import Share

_EUCLIDEAN = 2.0


@dataclass(eq=False)
class Group:
    """One name pattern at one call.

    Args:
        pattern: What its parameters' names match; "*" where there are no patterns.
        policy: What bounds it.
        gradients: Those that exist.
        total_order: p of the norm of all groups together.
        share: What part of its scopes is here, where other ranks have the rest.
        clamped: What clamping found, once it was done.
        found: How many tensors are not finite on all ranks, where there are others.
        unbounded: How many tensors the policy cannot bound on all ranks, where scopes of others
            are not seen here.
        changed: How many elements clamping changes on all ranks, where there are others.
    """

    pattern: str
    policy: Policy
    gradients: Gradients
    total_order: float
    share: "Share | None" = None
    clamped: Clamped | None = None
    found: Tensor | None = None
    unbounded: Tensor | None = None
    changed: Tensor | None = None
    norm: Norm = field(init=False)
    """The norm that the policy sees."""
    total: Norm = field(init=False)
    """The norm that is reported for all groups together: the same where p is the same."""
    left: Norm | None = None
    """The norm of what clamping leaves, where ranks have to know it before anything is written."""

    def __post_init__(self) -> None:
        scopes: Scopes
        if self.share is not None:
            self.share.expect(self.gradients.present)
            scopes = self.share
        else:
            scopes = Together() if self.policy.scope == "group" else Apart()
        self.norm = Norm(self.policy.order, scopes)
        same = self.total_order == self.policy.order
        self.total = self.norm if same else Norm(self.total_order, scopes)

    def scope_names(self) -> tuple[str, ...]:
        """Return what each scope is the norm of."""
        if self.policy.scope == "group":
            return (self.pattern,)
        if self.share is None:
            names, counts = self.gradients.names, self.gradients.layout.rows
        else:
            names, counts = self.gradients.group.names, list(self.share.rows)
        if self.policy.scope == "tensor":
            return tuple(names)
        pairs = zip(names, counts, strict=True)
        return tuple(f"{name}[{row}]" for name, rows in pairs for row in range(rows))

    @property
    def norms(self) -> list[Norm]:
        """The norms to find: one, or two where p differs."""
        return [self.norm] if self.total is self.norm else [self.norm, self.total]

    def read(self, backends: Backends, home: torch.device) -> None:
        """Read the gradients, where clamping them has not done that already."""
        for norm in self.norms:
            sums_RA = None
            if self.clamped is not None and norm.order == _EUCLIDEAN:
                sums_RA = self.clamped.before_RA
            norm.read(backends, self.gradients.measured(norm.order), home, sums_RA)

    def read_again(self, backends: Backends) -> None:
        """Read them once more for those p that need it."""
        for norm in self.norms:
            if norm.reads_twice:
                norm.read_again(backends, self.gradients.measured(norm.order))

    def measured(self, norm: Norm, scale: float | Tensor | None) -> Measured:
        """Return what was found, as if gradients were not multiplied by ``scale``."""
        norms_S = norm.norms()
        if scale is not None:
            norms_S = norms_S / scale
        return Measured(norms_S, norm.order, self.witness_T)

    def is_bounded(self, norms_S: Tensor) -> Flag:
        """Return whether nothing was found that the policy cannot bound.

        Args:
            norms_S: What was measured; a policy that clamps bounds infinities.
        """
        if self.unbounded is not None:
            return as_known(self.unbounded == 0)
        clamps = self.policy.element_limit is not None
        if host_waits_for(norms_S.device):
            return (~norms_S.isnan() if clamps else norms_S < inf).all()
        return not any(isnan(norm) if clamps else not norm < inf for norm in norms_S.tolist())

    @property
    def witness_T(self) -> Tensor:
        """A number for each tensor: not finite just where the tensor is not, (T,)."""
        return per_tensor(self.norm.witness_R, self.gradients.layout)

    def measured_left(
        self, backends: Backends, scale: float | Tensor | None, home: torch.device
    ) -> Tensor:
        """Return the norms of what clamping left, (S,)."""
        if self.left is None:
            assert self.clamped is not None
            sums_RA = self.clamped.after_RA if self.norm.order == _EUCLIDEAN else None
            self.left = Norm(self.norm.order, self.norm.scopes)
            batch = self.gradients.measured(self.norm.order)
            self.left.read(backends, batch, home, sums_RA)
            self.left.read_again(backends, batch)
        norms_S = self.left.norms()
        return norms_S if scale is None else norms_S / scale
