"""A run in a few numbers, and what two runs say about clipping in one line."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median_high, median_low

from gradclip.diagnostics.record import GroupRecord, StepRecord
from gradclip.errors import ArgumentValueError
from gradclip.record.columns import Steps

__all__ = ["FINAL_STEPS", "RunSummary", "compact", "decimal", "finding", "percent", "summarise"]

_NAMED_LIMITS = 3
FINAL_STEPS = 50
"""The final loss is the mean of this many last losses (of all, in a shorter run)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """A run in a few numbers.

    Attributes:
        steps: How many optimizer steps were recorded.
        clipped: How many of them were clipped; None where no step says what was allowed.
        nonfinite: How many of them met a NaN or an infinity in the gradients.
        threshold: The last threshold; infinite where nothing was bounded. Where there are several
            limits, the one of what was scaled down most in the last step.
        thresholds: The last threshold of each name pattern, where limits were given by pattern.
        final_loss: The median of the last `FINAL_STEPS` losses that are finite; if the run
            diverged, its last loss, which is not; None if no loss was recorded.
        diverged_at: The first step of the non-finite losses that the run ended in, or None.
        norm_p99: The gradient norm, before clipping, that one step in a hundred exceeds.
        norm_max: The largest gradient norm before clipping.
    """

    steps: int
    clipped: int | None
    nonfinite: int
    threshold: float
    final_loss: float | None
    diverged_at: int | None
    norm_p99: float
    norm_max: float
    thresholds: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def ending(self) -> str:
        """The final loss in words: ``1.67``, ``3.20e9``, or ``NaN from step 3``."""
        if self.final_loss is None:
            return "not recorded"
        if self.diverged_at is None:
            return _short(f"{self.final_loss:#.3g}").rstrip(".")
        value = "NaN" if math.isnan(self.final_loss) else self.final_loss
        return f"{value} from step {self.diverged_at}"


def summarise(records: Sequence[StepRecord]) -> RunSummary:
    """Summarise a run.

    Args:
        records: Its steps; those of ``read_steps`` take the least time and memory.

    Raises:
        ArgumentValueError: There is no step.
    """
    if not records:
        raise ArgumentValueError("a run without a step has no summary: the record is empty.")
    steps = records if isinstance(records, Steps) else Steps.of(records)
    losses = steps.column("loss")
    measured = steps.measured("loss")
    last = [losses[at] for at in measured[-FINAL_STEPS:] if math.isfinite(losses[at])]
    diverged_at = _diverged_at(steps, measured)
    if diverged_at is not None:
        last = [losses[measured[-1]]]
    # NaN does not sort: a norm that is not finite counts as the largest there is.
    pre = steps.column("norm_pre")
    norms = sorted(
        pre[at] if math.isfinite(pre[at]) else math.inf for at in steps.measured("norm_pre")
    )
    end, clipped = steps[-1], sum(map(bool, steps.column("clipped")))
    return RunSummary(
        steps=len(steps),
        clipped=clipped if clipped or end.groups or steps.measured("threshold") else None,
        nonfinite=sum(count > 0 for count in steps.column("nonfinite")),
        threshold=_limit(end),
        thresholds={pattern: _limit(group) for pattern, group in end.groups.items()},
        # Its mean is exact: a sum might overflow.
        final_loss=float(mean((median_low(last), median_high(last)))) if last else None,
        diverged_at=diverged_at,
        norm_p99=norms[math.ceil(0.99 * len(norms)) - 1] if norms else math.nan,
        norm_max=norms[-1] if norms else math.nan,
    )


def finding(
    clipped: Sequence[StepRecord],
    unclipped: Sequence[StepRecord] | None = None,
    *,
    counted: str = "steps",
) -> str:
    """Say in one line what clipping did, and what happened without it.

    Args:
        clipped: The run that was clipped.
        unclipped: The same run without clipping.
        counted: What its steps are: a log may have one of every ten.
    """
    run = summarise(clipped)
    if run.clipped is None:
        line = f"{run.steps} {counted}, p99 norm {compact(run.norm_p99)}"
    else:
        share = run.clipped / run.steps
        share = round(share, 2) or share
        line = f"clipped {run.clipped} of {run.steps} {counted} ({percent(share)}){_limits(run)}"
    if unclipped is not None:
        return f"{line}: loss {run.ending}; without: {summarise(unclipped).ending}"
    return line if run.final_loss is None else f"{line}: loss {run.ending}"


def compact(value: float) -> str:
    """Write a number in three digits: ``0.57``, ``12.1``, ``5.8e3``."""
    return _short(f"{value:.3g}")


def decimal(value: float) -> str:
    """Write 1 as ``1.0``, and a float32 0.1 as ``0.1``."""
    return str(float(f"{value:.4g}"))


def percent(share: float) -> str:
    """Write a share: ``0.5 %``, ``12 %``.

    >>> percent(0.0), percent(0.0004), percent(0.123)
    ('0 %', '0.04 %', '12 %')
    """
    number = 100 * share
    return f"{number:.0f} %" if number >= 9.5 or number == 0 else f"{number:.1g} %"  # noqa: PLR2004


def _short(number: str) -> str:
    return number.replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")


def _limit(record: GroupRecord) -> float:
    return math.inf if record.threshold is None else record.threshold


def _limits(run: RunSummary) -> str:
    """Say what was allowed, of a few limits each: `` at max_norm 0.5 (head.*), 1.0 (*)``."""
    bounded = [(name, limit) for name, limit in run.thresholds.items() if math.isfinite(limit)]
    if not run.thresholds and math.isfinite(run.threshold):
        return f" at max_norm {decimal(run.threshold)}"
    if len(bounded) > _NAMED_LIMITS:
        return f" at {len(bounded)} limits"
    named = ", ".join(f"{decimal(limit)} ({name})" for name, limit in bounded)
    return f" at max_norm {named}" if named else ""


def _diverged_at(steps: Steps, measured: Sequence[int]) -> int | None:
    first, losses = None, steps.column("loss")
    for at in reversed(measured):
        if math.isfinite(losses[at]):
            break
        first = steps.step[at]
    return first
