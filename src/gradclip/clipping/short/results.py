"""The results of the short ways: numbers that are known already, as tensors when they are read."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import isnan, nan
from typing import Any

import torch
from torch import Tensor

from gradclip.clipping.apply.coefficients import OneCoefficient
from gradclip.clipping.flags import Flag
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
    FusedClip,
    Report,
)
from gradclip.clipping.result import ClipResult
from gradclip.clipping.short.lean import LeanStep


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


class _SmallResult(ClipResult):
    """The result of a small model, of which the host knows all: a tensor is made when asked for."""

    coefficients: OneCoefficient
    withheld, tensor_sums_T, dtype = False, None, torch.float32
    left: float | None

    @cached_property
    def measured_S(self) -> Tensor:
        """Norm of the one scope before clipping, float64 (1,)."""
        return torch.full((1,), self.coefficients.norm, dtype=torch.float64, device="cpu")

    @cached_property
    def left_S(self) -> Tensor | None:
        """Where elements were clamped, the norm afterwards, float64 (1,)."""
        if self.left is None:
            return None
        return torch.full((1,), self.left, dtype=torch.float64, device="cpu")


def of_small(small: LeanStep, scopes: Sequence[str]) -> ClipResult:
    """Return the result of a small model that was read as one; no gradient holds a NaN.

    Args:
        small: What its gradients came to.
        scopes: What the norm is called.
    """
    one = OneCoefficient(small.norm, small.number)
    result = _SmallResult.__new__(_SmallResult)
    vars(result).update(
        thresholds=small.threshold,
        coefficients=one,
        scopes=scopes,
        groups={},
        norm_type=small.order,
        one_threshold=small.one_threshold,
        clamped=small.ceiling is not None if isnan(small.one_threshold) else None,
        left=small.left,
    )
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
