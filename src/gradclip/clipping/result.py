"""What one call did: tensors that stay on the device, and their copy on the host."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import nan
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from gradclip.clipping.apply.coefficients import Coefficients, OneCoefficient
from gradclip.clipping.apply.fused import FusedClip
from gradclip.clipping.apply.lean import LeanStep
from gradclip.clipping.flags import Flag, as_flag
from gradclip.clipping.kernels.fused import (
    BY_POLICY,
    CLIPPED,
    COEFFICIENT,
    NONFINITE,
    NORM,
    NORM_POST,
    NORM_PRE,
    REMAINING,
    SKIPPED,
    SMALLEST,
    THRESHOLD,
    HostReport,
    Report,
)
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


class FusedResult(ClipResult):
    """What a clip in few launches measured and did: every tensor is a view of its report.

    Args:
        clip: What it came to.
        at: Which pattern; the number of patterns for all of them together.
        scopes: What each norm is of.
        groups: The result of each name pattern, where policies were given by pattern.
    """

    _clip: FusedClip
    _numbers: Report
    _at: int
    _span: tuple[int, int]

    def __init__(
        self,
        clip: FusedClip,
        at: int,
        scopes: Sequence[str],
        groups: Mapping[str, ClipResult] | None = None,
    ) -> None:
        layout = clip.layout
        span = (0, at) if at == layout.patterns else (at, at + 1)
        limits = layout.limits[slice(*span)]
        of_several = groups or len(limits) > 1
        vars(self).update(
            _numbers=clip.report,
            _at=at,
            _span=span,
            _clip=clip,
            norm_type=layout.power,
            dtype=torch.float32,
            scopes=scopes,
            groups=groups or {},
            on_host=clip.on_host,
            one_threshold=nan
            if of_several or limits[0].element_limit is not None
            else limits[0].threshold,
            left_S=None,
            nonfinite_on_ranks=None,
            deferred=clip.deferred,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the report alone: views of it are made again."""
        return FusedResult, (self._clip, self._at, self.scopes, self.groups)

    @cached_property
    def thresholds(self) -> float | Tensor:
        """Norm above which each scope is clipped: float64 (S,), or one number for all."""
        layout = self._clip.layout
        limits = layout.limits[slice(*self._span)]
        return limits[0].shown if len(limits) == 1 else layout.shown_thresholds.clone()

    @cached_property
    def measured_S(self) -> Tensor:
        """Norm of each scope before clipping, float64 (S,)."""
        return self._numbers.wide(NORM, *self._span)

    @cached_property
    def coefficients(self) -> Tensor:
        """What each scope was multiplied by, float64 (S,)."""
        return self._numbers.wide(COEFFICIENT, *self._span)

    @cached_property
    def remaining_S(self) -> Tensor:
        """Norm of each scope after clipping, float64 (S,)."""
        return self._numbers.wide(REMAINING, *self._span)

    @cached_property
    def withheld(self) -> Flag:
        """Whether the update should not happen: 0-d bool, or False where that cannot be."""
        layout = self._clip.layout
        writes = any(limit.writes for limit in layout.limits[slice(*self._span)])
        return self.skipped if writes and (layout.skips or layout.may_skip) else False

    @cached_property
    def skipped(self) -> Tensor:
        """Whether the update should not happen, and the gradients were zeroed: 0-d bool."""
        return self._numbers.flag(SKIPPED, self._at)

    @cached_property
    def by_policy(self) -> Flag:
        """Whether the step was skipped because a policy asked for it."""
        return self._numbers.flag(BY_POLICY, self._at) if self._clip.layout.may_skip else False

    @cached_property
    def clipped(self) -> Tensor:
        """Whether any gradient was made smaller, and the update may happen: 0-d bool."""
        return self._numbers.flag(CLIPPED, self._at)

    @cached_property
    def nonfinite(self) -> Tensor:
        """How many tensors held a NaN or an infinity: 0-d int."""
        return self._numbers.count(NONFINITE, self._at)

    @cached_property
    def norm_pre(self) -> Tensor:
        """Norm of all that is counted, before clipping: 0-d."""
        return self._single(NORM_PRE)

    @cached_property
    def norm_post(self) -> Tensor:
        """Norm of all that is counted, after clipping: 0-d."""
        return self._single(NORM_POST)

    @cached_property
    def coefficient(self) -> Tensor:
        """The smallest coefficient: 0-d; 1 where nothing was scaled."""
        return self._single(SMALLEST)

    @cached_property
    def threshold(self) -> Tensor:
        """The threshold of the scope with the smallest coefficient: 0-d."""
        return self._single(THRESHOLD)

    @cached_property
    def norms_S(self) -> Tensor:
        """Norm of each scope before clipping: (S,)."""
        return self._numbers.single(NORM_PRE, *self._span)

    @property
    def clamped(self) -> Flag | None:
        """For clipping by value, whether any element was clamped."""
        limits = self._clip.layout.limits[slice(*self._span)]
        return self.clipped if limits[0].element_limit is not None or self.groups else None

    @property
    def tensor_sums_T(self) -> Tensor:
        """A number for each tensor, not finite just where the tensor was not: (T,)."""
        starts = self._clip.layout.starts
        return self._numbers.sums_T[starts[self._span[0]] : starts[self._span[1]]]

    def _single(self, column: int) -> Tensor:
        return self._numbers.single(column, self._at, self._at + 1)[0]


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


class _SmallResult(ClipResult):
    """The result of a small model, of which the host knows all: a tensor is made when asked for."""

    coefficients: OneCoefficient
    withheld, tensor_sums_T = False, None
    norm_type, dtype = 2.0, torch.float32

    @cached_property
    def measured_S(self) -> Tensor:
        """Norm of the one scope before clipping, float64 (1,)."""
        return torch.full((1,), self.coefficients.norm, dtype=torch.float64, device="cpu")


def of_small(small: LeanStep, scopes: Sequence[str]) -> ClipResult:
    """Return the result of a small model that was read as one; no gradient holds a NaN.

    Args:
        small: What its gradients came to.
        scopes: What the norm is called.
    """
    one = OneCoefficient(small.norm, small.number)
    result = _SmallResult.__new__(_SmallResult)
    vars(result).update(thresholds=small.threshold, coefficients=one, scopes=scopes, groups={})
    return result


def of_fused(
    clip: FusedClip, names: Sequence[str], scopes: Sequence[Sequence[str]], *, by_pattern: bool
) -> ClipResult:
    """Return the result of a clip in few launches.

    Args:
        clip: What it came to.
        names: Of the patterns.
        scopes: What the norm of each is called.
        by_pattern: Whether patterns were given; otherwise there is one result for all.
    """
    if not by_pattern:  # as of all patterns, whose numbers share no memory with those of scopes
        return FusedResult(clip, 1, scopes[0])
    results = [FusedResult(clip, at, each) for at, each in enumerate(scopes)]
    return FusedResult(clip, len(results), (), dict(zip(names, results, strict=True)))


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
