"""The gradients of one name pattern at one call, with the policy that bounds them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradclip.clipping.gradients import Gradients
from gradclip.clipping.kernels import Backends, Clamped
from gradclip.clipping.policies import Policy
from gradclip.clipping.reduction import Measured, measure

_EUCLIDEAN = 2.0


@dataclass(eq=False)
class Group:
    """One name pattern at one call.

    Args:
        pattern: What its parameters' names match; "*" where there are no patterns.
        policy: What bounds it.
        gradients: Those that exist.
        clamped: What clamping found, once it was done.
    """

    pattern: str
    policy: Policy
    gradients: Gradients
    clamped: Clamped | None = None

    @property
    def per_row(self) -> bool:
        """Whether each row is a scope of its own."""
        return self.policy.scope != "group"

    def scope_names(self) -> tuple[str, ...]:
        """Return what each scope is the norm of."""
        if self.policy.scope == "group":
            return (self.pattern,)
        if self.policy.scope == "tensor":
            return tuple(self.gradients.names)
        pairs = zip(self.gradients.names, self.gradients.layout.rows, strict=True)
        return tuple(f"{name}[{row}]" for name, rows in pairs for row in range(rows))

    def measure(
        self,
        backends: Backends,
        order: float,
        scale: float | Tensor | None,
        home: torch.device,
        *,
        left: bool = False,
    ) -> Measured:
        """Measure the gradients, where clamping them has not done that already.

        Args:
            backends: The choice of backend.
            order: p.
            scale: What gradients are still multiplied by, and norms are not.
            home: Device of the results.
            left: Measure what clamping left, and not what was there before.
        """
        batch, sums_RA = self.gradients.measured(order), None
        if self.clamped is not None and order == _EUCLIDEAN:
            sums_RA = self.clamped.after_RA if left else self.clamped.before_RA
        measured = measure(
            backends, batch, order, per_row=self.per_row, home=home, sums_RA=sums_RA
        )
        return measured if scale is None else replace(measured, norms_S=measured.norms_S / scale)
