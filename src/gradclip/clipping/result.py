"""What one call did: tensors that stay on the device, and their copy on the host."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import nan
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from gradclip.clipping.apply.coefficients import Coefficients, OneCoefficient
from gradclip.clipping.flags import Flag, as_flag
from gradclip.clipping.kernels.fused import HostReport
from gradclip.clipping.measure.norm import combine

SkipReason: TypeAlias = Literal["nonfinite", "policy", "rank"]


@dataclass(frozen=True)
class ClipStats:
    """A ``ClipResult`` as Python numbers: ready for a log line or for JSON."""

    norm_pre: float
    norm_post: float
    threshold: float
    coefficient: float
    clipped: bool
    skipped: bool
    nonfinite: int
    norms_S: tuple[float, ...] = ()
    scope_names: tuple[str, ...] = ()
    groups: Mapping[str, "ClipStats"] = field(default_factory=dict)
    skip_reason: SkipReason | None = None
    """Why the step was skipped: a NaN or an infinity, a policy that asked for it, or another rank
    that failed; None where it was not skipped."""
    new_policy: str | None = None
    """The policy in words, at the first step after another one was assigned; else None."""


@dataclass(frozen=True, eq=False, repr=False)
class ClipResult:
    """What one call to ``GradientClipper.clip`` measured and did.

    Its tensors are on the device of the gradients and fresh at each call (inside a captured CUDA
    graph, at each replay); reading one on the host (``float``, ``bool``, ``repr``) waits for the
    device, ``to_host`` does it once for all.

    Args:
        measured_S: Norm of each scope before clipping, float64 (S,).
        thresholds: Norm above which each scope is clipped: float64 (S,), or one number for all.
        coefficients: What each scope was multiplied by: 0 where it was zeroed.
        withheld: Whether the update should not happen.
        tensor_sums_T: A number for each tensor, not finite just where the tensor was not: (T,).
            None where all were finite.
        norm_type: p of the norms.
        dtype: float32, or float64 when a gradient is.
        scopes: What each entry of ``norms_S`` is the norm of.
        groups: The result of each name pattern, where policies were given by pattern.
        clamped: For clipping by value, whether any element was clamped.
        left_S: Where it does not follow from coefficients, the norms afterwards, float64 (S,).
        nonfinite_on_ranks: How many tensors were not finite on all ranks, where there are others.
        deferred: Whether the gradients were left as they are, for the optimizer to scale.
        by_policy: Whether the step was skipped because a policy asked for it.
    """

    measured_S: Tensor
    thresholds: float | Tensor
    coefficients: Coefficients | OneCoefficient | Tensor
    withheld: Flag
    tensor_sums_T: Tensor | None
    norm_type: float
    dtype: torch.dtype
    scopes: Sequence[str]
    groups: Mapping[str, "ClipResult"] = field(default_factory=dict)
    clamped: Flag | None = None
    left_S: Tensor | None = None
    nonfinite_on_ranks: Tensor | None = None
    deferred: bool = False
    by_policy: Flag = False
    new_policy: ClassVar[str | None] = None
    """The policy in words, at the first step after another one was assigned; else None."""
    on_host: ClassVar[HostReport | None] = None
    """The numbers on their way to the host, where they are since the clip."""

    @cached_property
    def one_threshold(self) -> float | Tensor:
        """The norm that all gradients may have; NaN where there is not one for all."""
        one_norm = self.clamped is None and self.measured_S.numel() == 1
        return self.thresholds if one_norm else nan

    @cached_property
    def scope_names(self) -> tuple[str, ...]:
        """What each entry of ``norms_S`` is the norm of."""
        if self.groups:
            return tuple(name for each in self.groups.values() for name in each.scope_names)
        return tuple(self.scopes)

    @cached_property
    def skipped(self) -> Tensor:
        """Whether the update should not happen, and the gradients were zeroed: 0-d bool."""
        return self._flag(self.withheld)

    @cached_property
    def coefficients_S(self) -> Tensor:
        """What each scope was multiplied by, float64 (S,); 0 where it was zeroed."""
        known = self.coefficients
        return known if isinstance(known, Tensor) else known.values_S

    @cached_property
    def thresholds_S(self) -> Tensor:
        """Norm above which each scope is clipped, float64 (S,)."""
        if isinstance(self.thresholds, Tensor):
            return self.thresholds.expand_as(self.measured_S)
        return torch.full_like(self.measured_S, self.thresholds)

    @cached_property
    def remaining_S(self) -> Tensor:
        """Norm of each scope after clipping, float64 (S,): from the coefficients."""
        left_S = self.measured_S * self.coefficients_S if self.left_S is None else self.left_S
        return torch.where(self.coefficients_S == 0, 0.0, left_S)

    @cached_property
    def clipped(self) -> Tensor:
        """Whether any gradient was made smaller, and the update may happen: 0-d bool."""
        if self.clamped is None:
            return (self.coefficients_S < 1).any() & ~self.skipped
        return self._flag(self.clamped) & ~self.skipped

    @cached_property
    def nonfinite(self) -> Tensor:
        """How many tensors held a NaN or an infinity, each shard for itself: 0-d int."""
        if self.nonfinite_on_ranks is not None:
            return self.nonfinite_on_ranks.round().to(torch.int64)
        if self.tensor_sums_T is None:
            return torch.zeros((), dtype=torch.int64, device=self.measured_S.device)
        return (~self.tensor_sums_T.isfinite()).sum()

    @cached_property
    def norm_pre(self) -> Tensor:
        """Norm of all that is counted, before clipping: 0-d."""
        return self._report(combine(self.measured_S, self.norm_type))

    @cached_property
    def norm_post(self) -> Tensor:
        """Norm of all that is counted, after clipping: 0-d."""
        return self._report(combine(self.remaining_S, self.norm_type))

    @cached_property
    def coefficient(self) -> Tensor:
        """The smallest coefficient: 0-d; 1 where nothing was scaled."""
        return self._report(self._smallest(self.coefficients_S))

    @cached_property
    def threshold(self) -> Tensor:
        """The threshold of the scope with the smallest coefficient: 0-d."""
        if len(self.thresholds_S) <= 1:
            return self._report(self._smallest(self.thresholds_S))
        smallest = self.coefficients_S.argmin(0, keepdim=True)
        return self._report(self.thresholds_S.gather(0, smallest)[0])

    @cached_property
    def norms_S(self) -> Tensor:
        """Norm of each scope before clipping: (S,)."""
        return self._report(self.measured_S)

    def to_host(self) -> ClipStats:
        """Copy everything to the host, in one transfer."""
        results = [self, *self.groups.values()]
        by_policy = as_flag(self.by_policy, self.measured_S.device).reshape(1)
        packed, reason = [result._packed() for result in results], None  # noqa: SLF001 - its own class
        by_policy, *values = torch.cat([by_policy, *packed]).tolist()
        stats = []
        for result in results:
            size = len(_SCALARS) + len(result.measured_S)
            # One reason for all patterns: that of the step.
            reason = reason or result._reason(values, by_policy=bool(by_policy))  # noqa: SLF001
            stats.append(result._unpacked(values[:size], reason))  # noqa: SLF001
            values = values[size:]
        groups = dict(zip(self.groups, stats[1:], strict=True))
        return replace(stats[0], groups=groups, new_policy=self.new_policy)

    def compute(self) -> None:
        """Compute every tensor now: inside a captured CUDA graph, so that replays refresh them."""
        for result in (self, *self.groups.values()):
            for name in (*_SCALARS, "norms_S"):
                getattr(result, name)

    def __repr__(self) -> str:
        stats = self.to_host()
        return (
            f"ClipResult(norm_pre={stats.norm_pre:.6g}, norm_post={stats.norm_post:.6g}, "
            f"threshold={stats.threshold:.6g}, coefficient={stats.coefficient:.6g}, "
            f"clipped={stats.clipped}, skipped={stats.skipped}, nonfinite={stats.nonfinite})"
        )

    def _flag(self, flag: Flag) -> Tensor:
        return as_flag(flag, self.measured_S.device).clone() if isinstance(flag, bool) else flag

    def _report(self, value: Tensor) -> Tensor:
        return reported(value, self.dtype)

    @staticmethod
    def _smallest(values_S: Tensor) -> Tensor:
        return values_S.amin() if len(values_S) else values_S.new_ones(())

    def _packed(self) -> Tensor:
        scalars = [getattr(self, name).to(torch.float64) for name in _SCALARS]
        return torch.cat([torch.stack(scalars), self.norms_S.to(torch.float64)])

    def _unpacked(self, values: list[float], reason: SkipReason | None) -> ClipStats:
        norm_pre, norm_post, threshold, coefficient, clipped, skipped, nonfinite = values[
            : len(_SCALARS)
        ]
        return ClipStats(
            norm_pre=norm_pre,
            norm_post=norm_post,
            threshold=threshold,
            coefficient=coefficient,
            clipped=bool(clipped),
            skipped=bool(skipped),
            nonfinite=int(nonfinite),
            norms_S=tuple(values[len(_SCALARS) :]),
            scope_names=self.scope_names,
            skip_reason=reason if skipped else None,
        )

    def _reason(self, values: list[float], *, by_policy: bool) -> SkipReason | None:
        """Return why the step was skipped, from the numbers of the result over all patterns."""
        skipped, nonfinite = values[_SCALARS.index("skipped")], values[_SCALARS.index("nonfinite")]
        if not skipped:
            return None
        if by_policy:
            return "policy"
        return "rank" if self.nonfinite_on_ranks is not None and not nonfinite else "nonfinite"


_SCALARS = (
    "norm_pre",
    "norm_post",
    "threshold",
    "coefficient",
    "clipped",
    "skipped",
    "nonfinite",
)


def reported(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a float64 number to the dtype that callers get; what is finite stays finite."""
    if dtype is torch.float64:
        return value
    limited = value.clamp(max=torch.finfo(dtype).max)
    return torch.where(value.isinf(), value, limited).to(dtype)


def over_all(
    groups: Mapping[str, ClipResult],
    totals_S: Sequence[Tensor],
    order: float,
    nonfinite_on_ranks: Tensor | None,
) -> ClipResult:
    """Return one result over those of all name patterns, which has each of them.

    Args:
        groups: The result of each.
        totals_S: For each, its norms with the p that all are added up with.
        order: That p.
        nonfinite_on_ranks: How many tensors were not finite on all ranks, where there are others.
    """
    results = list(groups.values())
    sums = [each.tensor_sums_T for each in results if each.tensor_sums_T is not None]
    left = [
        result.remaining_S
        if order == result.norm_type
        else torch.where(result.skipped, 0.0, norms_S * result.coefficients_S)
        for norms_S, result in zip(totals_S, results, strict=True)
    ]
    return ClipResult(
        measured_S=torch.cat(list(totals_S)),
        thresholds=torch.cat([r.thresholds_S for r in results]),
        coefficients=torch.cat([r.coefficients_S for r in results]),
        withheld=torch.stack([r.skipped for r in results]).any(),
        tensor_sums_T=torch.cat(sums) if sums else None,
        norm_type=order,
        dtype=max((r.dtype for r in results), key=lambda dtype: dtype.itemsize),
        scopes=(),
        groups=groups,
        clamped=torch.stack([r.clipped for r in results]).any(),
        left_S=torch.cat(left),
        nonfinite_on_ranks=nonfinite_on_ranks,
        by_policy=results[0].by_policy,
    )
