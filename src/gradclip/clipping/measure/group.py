"""The gradients of one name pattern at one call, and what was found in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isnan
from typing import Any

import torch
from torch import Tensor

from gradclip.clipping import flags
from gradclip.clipping.collect.gradients import Gradients
from gradclip.clipping.flags import Flag, as_known
from gradclip.clipping.kernels import Backends, Clamped, Write
from gradclip.clipping.measure.norm import Sums, TensorSums, by_scope, per_tensor, spread_over
from gradclip.clipping.measure.norm import read as read_sums
from gradclip.clipping.measure.norm import read_again as read_sums_again
from gradclip.clipping.measure.pattern import Pattern
from gradclip.clipping.measure.scopes import RowMap
from gradclip.clipping.policies import Policy

_EUCLIDEAN = 2.0


@dataclass(frozen=True, eq=False)
class Group:
    """One pattern at one call.

    Args:
        of: The pattern.
        policy: What bounds it.
        gradients: Those that exist.
        rows: Which scope each of their rows has.
        total_order: p of the norm of all patterns together.
        together: The same rows as one scope, where ranks have to add up the norm of the pattern.
        weights: The parameters themselves, for a policy that asks for their norms.
        weight_rows: Which scope each of their rows has.
    """

    of: Pattern
    policy: Policy
    gradients: Gradients
    rows: RowMap
    total_order: float
    together: RowMap | None = None
    weights: Gradients | None = None
    weight_rows: RowMap | None = None

    @classmethod
    def collect(cls, pattern: Pattern, total_order: float) -> "Group":
        """Collect the gradients that exist now, and the weights if the policy asks for norms.

        Args:
            pattern: Whose gradients.
            total_order: p of the norm of all patterns together.

        Raises:
            UnsupportedGradientError: GC020, for a gradient that cannot be clipped.
        """
        gradients = pattern.gradients()
        present = gradients.present
        rows = pattern.scopes.row_map(present)
        together = None if pattern.as_one is None else pattern.as_one.row_map(present)
        if not (pattern.policy.needs_weight_norms and pattern.limit is None):
            return cls(pattern, pattern.policy, gradients, rows, total_order, together)
        weights = pattern.weights()
        weight_rows = pattern.scopes.row_map(weights.present)
        return cls(
            pattern, pattern.policy, gradients, rows, total_order, together, weights, weight_rows
        )


@dataclass(frozen=True, eq=False)
class Found:
    """What was found in the gradients of one pattern: here, or after an exchange on all ranks.

    Args:
        norm: The norm that the policy sees.
        total: The norm that is reported for all patterns together: the same where p is the same.
        tensor_sums_T: A number for each tensor that exists here: not finite just where the tensor
            is not, and NaN just where it holds a NaN. None where all are finite, and nobody asked.
        pattern_norm: The norm of the whole pattern, where ranks add it up.
        weights: The norm of the weights, where the policy asks for it.
        left: The norm of what clamping leaves, where ranks have to know before they write.
        clamped: What clamping finds, where that was read on the way.
        changed: Above 0 if clamping changes an element, where ranks have to know: 0-d float64.
        writes: What clamps, where ``left`` was found with it.
        nonfinite: How many tensors are not finite on all ranks: 0-d float64; None on one process.
        unbounded: How many tensors the policy cannot bound on all ranks, where this one does not
            see all scopes: 0-d float64.
    """

    norm: Sums
    total: Sums
    tensor_sums_T: Tensor | None
    pattern_norm: Sums | None = None
    weights: Sums | None = None
    left: Sums | None = None
    clamped: Clamped | None = None
    changed: Tensor | None = None
    writes: Sequence[Write] = ()
    nonfinite: Tensor | None = None
    unbounded: Tensor | None = None

    @property
    def sums(self) -> dict[str, Sums]:
        """Everything that ranks add up, each once, by name and in order."""
        found = {
            "norm": self.norm,
            "total": None if self.total is self.norm else self.total,
            "pattern_norm": self.pattern_norm,
            "weights": self.weights,
            "left": self.left,
        }
        return {name: sums for name, sums in found.items() if sums is not None}

    def with_sums(self, sums: Mapping[str, Sums]) -> "Found":
        """Return the same with other sums, as ``sums`` names them."""
        every: dict[str, Any] = {"total": sums["norm"], **sums}
        return replace(self, **every)

    def is_bounded(self, pattern: Pattern, norms_S: Tensor) -> Flag:
        """Return whether nothing was found that the policy cannot bound.

        Args:
            pattern: Its policy: one that clamps bounds infinities.
            norms_S: Norms of its scopes.
        """
        if self.unbounded is not None:
            return as_known(self.unbounded == 0)
        clamps = pattern.element_limit is not None
        if not flags.host_waits_for(norms_S.device) and len(norms_S) == 1:
            norm = float(norms_S)
            return not isnan(norm) if clamps else norm < inf
        return as_known((~norms_S.isnan() if clamps else norms_S < inf).all())


def read(
    group: Group,
    backends: Backends,
    device: torch.device,
    clamped: Clamped | None = None,
    each: bool = False,
) -> Found:
    """Read the gradients of a pattern, and the weights if its policy asks for them.

    Args:
        group: The pattern.
        backends: The choice of backend.
        device: That of the results.
        clamped: What clamping finds, which spares the read for p = 2.
        each: Whether somebody asks for what is found of each gradient.
    """
    order, gradients, rows = group.of.order, group.gradients, group.rows
    # On the CPU the sum over all gradients shows that all are finite, and then nobody asks for
    # those of each. Where it is not finite they are taken at once, before anything is written.
    waits = any(map(flags.host_waits_for, (device, *gradients.devices)))
    together = rows.is_one and not (waits or each)
    norm, total = _norms(group, backends, device, clamped, together=together)
    if together and not all(sums.are_finite for sums in {norm, total}):
        together = False
        norm, total = _norms(group, backends, device, clamped, together=False)
    weights = None
    if group.weights is not None and group.weight_rows is not None:
        batch = group.weights.measured(order)
        weights = read_sums(backends, batch, device, order, group.weight_rows)
    return Found(
        norm,
        total,
        None if together else per_tensor(norm.row_sums_R, gradients.specs),
        pattern_norm=(
            None if group.together is None else by_scope(order, norm.rows_RA, group.together)
        ),
        weights=weights,
        clamped=clamped,
    )


def tensor_sums(group: Group, found: Found) -> TensorSums:
    """Return what was found of each tensor of a pattern, where that was asked for."""
    specs = group.gradients.specs
    rows = None if specs.one_row_each else specs.rows
    count = len(group.of.parameters.parameters)
    return TensorSums(found.norm.order, found.norm.rows_RA, rows, group.gradients.present, count)


def _norms(
    group: Group,
    backends: Backends,
    device: torch.device,
    clamped: Clamped | None,
    *,
    together: bool,
) -> tuple[Sums, Sums]:
    """Read the gradients for the norm that the policy sees, and for that of all patterns.

    Args:
        group: The pattern.
        backends: The choice of backend.
        device: That of the results.
        clamped: What clamping finds, which spares the read for p = 2.
        together: Whether nobody asks for what is found of each gradient.
    """
    found = []
    for order in dict.fromkeys((group.of.order, group.total_order)):
        known = None if clamped is None or order != _EUCLIDEAN else clamped.before_RA
        batch = group.gradients.measured(order)
        found.append(
            read_sums(backends, batch, device, order, group.rows, known, together=together)
        )
    return found[0], found[-1]


def read_again(group: Group, found: Found, backends: Backends) -> Found:
    """Read the gradients once more for those p that need it, with the maxima of all ranks."""
    batch = group.gradients.measured(found.norm.order)
    norm, powers_RA = read_sums_again(backends, batch, found.norm, group.rows)
    sums = {"norm": norm}
    if found.total is not found.norm:
        batch = group.gradients.measured(group.total_order)
        sums["total"], _ = read_sums_again(backends, batch, found.total, group.rows)
    if found.pattern_norm is not None and group.together is not None and powers_RA is not None:
        # Rows were divided by the maximum of their scope; together they have one maximum.
        scale_R = spread_over(norm.scale_S, group.rows, len(powers_RA))
        ratio_R = (scale_R / found.pattern_norm.scale_S).pow(norm.order)
        powers = group.together.sums(powers_RA * ratio_R[:, None])
        sums["pattern_norm"] = replace(found.pattern_norm, sums_SA=powers)
    if found.weights is not None and group.weights is not None and group.weight_rows is not None:
        batch = group.weights.measured(found.norm.order)
        sums["weights"], _ = read_sums_again(backends, batch, found.weights, group.weight_rows)
    return found.with_sums({**found.sums, **sums})
