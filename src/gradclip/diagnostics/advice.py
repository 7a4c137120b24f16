"""What the limit should be: a rule from the norms of a run to a policy, or to why there is none.

The rule and its constants were chosen on the logs of 73 runs; ``docs/how-to/choosing-a-limit.md``
says what it can do and what it cannot.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from gradclip.config import as_ceiling
from gradclip.diagnostics import advice_words as words
from gradclip.diagnostics.advice_warnings import (
    AdviceWarning,
    of_the_log,
    of_the_loss,
    warnings_of,
)
from gradclip.diagnostics.arrays import Numbers, np
from gradclip.diagnostics.norm_statistics import (
    Level,
    guard_limit,
    has_collapsed,
    has_plateau,
    level,
    round_up,
)
from gradclip.diagnostics.policy_table import Replayed, replayed, table
from gradclip.diagnostics.readers.logged import LoggedRun
from gradclip.diagnostics.run_course import before_the_loss
from gradclip.errors import ArgumentTypeError, ArgumentValueError

if TYPE_CHECKING:
    from gradclip.clipping.policies import Policy

__all__ = ["Advice", "AdviceWarning", "Intent", "advise", "as_run", "suggest"]

Intent: TypeAlias = Literal["guard", "regularise"]
"""Clip what is far from usual, or about a tenth of the steps."""

_FEWEST = 30
_FEWEST_TO_REGULARISE = 100
_NARROW = 1.15
_BROAD = 2.5
_FAR = 10


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Advice:
    """A policy for a run like the one whose norms were given, or the reason why there is none.

    ``str()`` of it is the advice in words.

    Attributes:
        kind: GUARD, BROAD or FALLEN_AWAY; STEADY, NARROW, RISING or FALLING; or a refusal: FEW,
            EVENTS_ONLY, PLATEAU, COLLAPSED, FEW_FOR_REGULARISE.
        finding: What the norms are like, in one sentence.
        reason: Why this policy, or why none.
        policy: What ``gradclip.attach`` takes; None for a refusal.
        line: A line to paste, in the words of the framework where that is known.
        points: How many norms were given.
        zeros: How many of them are 0.
        nonfinite: How many of them are NaN or infinite.
        spacing: Steps between two norms; None if it is not known.
        p50: The usual norm, without the beginning; None without any norm. Of a run that was lost
            this and all that follows is of the part before.
        p90: The norm that a tenth of the steps exceed; None without any norm.
        p99: Likewise a hundredth; None below 1000 norms, of which it is too uncertain.
        largest: The largest norm; None without any norm.
        drift: The last third's median by the first third's; None where it was not asked for.
        clip_fraction: The share of steps of this run that the policy would have clipped.
        clip_fraction_by_third: The same in each third.
        clip_fraction_settled: The same after the beginning: what to expect of later steps whose
            norms are like these.
        lr_factor: The mean of what steps would have been multiplied by.
        policies: What every policy would have done.
        warnings: What makes the advice doubtful, with the evidence. Those whose ``overturns`` is
            true are to be heeded before the advice.
        better: What would make the advice better.
    """

    kind: str
    finding: str
    reason: str
    policy: "Policy | None" = None
    line: str | None = None
    points: int
    zeros: int
    nonfinite: int
    spacing: float | None
    p50: float | None
    p90: float | None
    p99: float | None = None
    largest: float | None
    drift: float | None = None
    clip_fraction: float | None = None
    clip_fraction_by_third: tuple[float, float, float] | None = None
    clip_fraction_settled: float | None = None
    lr_factor: float | None = None
    policies: tuple[Replayed, ...] = ()
    warnings: tuple[AdviceWarning, ...] = ()
    better: tuple[str, ...] = ()

    def __repr__(self) -> str:
        shown = "no policy" if self.policy is None else words.call(self.policy)
        return f"Advice({self.kind}: {shown})"

    def __str__(self) -> str:
        return words.text(self)


def suggest(
    norms: Any,
    *,
    steps: Any = None,
    losses: Any = None,
    rates: Any = None,
    intent: Intent = "guard",
    limit: float | None = None,
) -> Advice:
    """Suggest a policy from the gradient norms of one run, as they were before clipping.

    ``gradclip.diagnostics.read_log`` reads them from a file.

    Args:
        norms: One number for each step that was logged. Zeros, NaN and infinities are counted and
            left out.
        steps: The step of each; one after the other by default.
        losses: The loss of each, NaN where it is not known. It is looked at for warnings.
        rates: The learning rate of each, NaN where it is not known. It tells where warm-up ends.
        intent: "guard" clips what is far from usual; "regularise" about a tenth of the steps.
        limit: The limit that the run was clipped with.

    Raises:
        ArgumentTypeError: GC011, something is no sequence of numbers.
        ArgumentValueError: GC010, the sequences differ in length, a norm is below 0, a step goes
            back, or the intent is unknown.

    >>> import random
    >>> of = random.Random(0)
    >>> suggest([of.lognormvariate(0, 0.3) for _ in range(500)])
    Advice(GUARD: NormClip(max_norm=3.0))
    """
    if intent not in get_args(Intent):
        raise ArgumentValueError(f'intent is {intent!r}: expected "guard" or "regularise"')
    run = as_run(norms, steps=steps, losses=losses, rates=rates, limit=limit)
    return advise(run, intent)


def as_run(
    norms: Any,
    *,
    steps: Any,
    losses: Any,
    rates: Any,
    limit: float | None,
    framework: str | None = None,
) -> LoggedRun:
    """Return numbers as a run that a log would have; as ``suggest``.

    Args:
        norms: See ``suggest``, and the next four.
        steps: Of each norm.
        losses: Of each norm.
        rates: Of each norm.
        limit: Of the run.
        framework: What has the limit, for the line to paste.
    """
    given = _numbers("norms", norms)
    if (given < 0).any():
        place = int(np.argmax(given < 0))
        raise ArgumentValueError(f"norms has a number below 0 at {place}: no norm is")
    others = {"steps": steps, "losses": losses, "rates": rates}
    read = {
        name: np.full(len(given), math.nan) if each is None else _numbers(name, each, len(given))
        for name, each in others.items()
    }
    if steps is None:
        read["steps"] = np.arange(len(given), dtype=np.float64)
    known = read["steps"][np.isfinite(read["steps"])]
    if (np.diff(known) < 0).any():
        raise ArgumentValueError("steps goes back: give the norms of one run at a time")
    if limit is not None:
        limit = as_ceiling(limit, "limit") or None
    return LoggedRun(
        norms=given,
        **read,
        format="numbers",
        framework=framework,
        norm_key="norms",
        step_key="steps" if len(known) else None,
        loss_key=None,
        rate_key=None,
        limit=limit,
    )


@np.errstate(over="ignore", invalid="ignore")  # logs have numbers near the largest
def advise(run: LoggedRun, intent: Intent = "guard") -> Advice:
    """Suggest a policy for runs like one that was read from a log."""
    said: dict[str, Any] = {
        "points": len(run.norms),
        "zeros": run.zeros,
        "nonfinite": run.nonfinite,
        "spacing": run.spacing,
    }
    run, lost = before_the_loss(run)
    is_norm = run.is_norm
    norms = run.norms[is_norm]
    first = tuple(of_the_loss(lost, run))
    said |= {
        "p50": float(np.median(norms)) if len(norms) else None,
        "p90": float(np.quantile(norms, 0.9)) if len(norms) else None,
        "largest": float(norms.max()) if len(norms) else None,
    }
    kind = _refusal(run, norms)
    if kind is not None:
        reason, finding = words.refusal(kind, run, norms), words.finding(norms, None)
        doubts = (*first, *of_the_log(run))
        return Advice(kind=kind, finding=finding, reason=reason, warnings=doubts, **said)
    found = level(norms, run.rates[is_norm])
    cap = guard_limit(found)
    spacing = max(1.0, run.spacing or 1.0)
    policies = table(
        norms,
        cap=cap,
        tenth=round_up(found.p90, found.grid),
        spacing=spacing,
        limit=run.limit,
    )
    said.update(p50=found.median, p90=found.p90, p99=found.p99, drift=found.drift)
    said.update(finding=words.finding(norms, found), policies=tuple(policies))
    said.update(better=words.better(run, found))
    after = len(norms) - found.cut
    if intent == "regularise" and after < _FEWEST_TO_REGULARISE:
        kind = "FEW_FOR_REGULARISE"
        doubts = (*first, *warnings_of(run, norms, found, None))
        reason = words.few_to_regularise(after, cap)
        return Advice(kind=kind, reason=reason, warnings=doubts, **said)
    kind, policy = _guard(found, cap) if intent == "guard" else _regular(found, cap)
    run_of = replayed(norms, policy, spacing, found.cut)
    highest = getattr(policy, "max_norm", None) or cap
    return Advice(
        kind=kind,
        reason=words.reason(kind, norms, found, cap, run_of),
        policy=policy,
        line=words.line(policy, run.framework),
        clip_fraction=run_of.clip_fraction,
        clip_fraction_by_third=run_of.by_third,
        clip_fraction_settled=run_of.settled,
        lr_factor=run_of.lr_factor,
        warnings=(*first, *warnings_of(run, norms, found, highest)),
        **said,
    )


def _refusal(run: LoggedRun, norms: Numbers) -> str | None:
    if len(norms) < _FEWEST:
        return "FEW"
    if all(np.isnan(each).all() for each in (run.steps, run.losses, run.rates)):
        return "EVENTS_ONLY"
    if has_plateau(norms):
        return "PLATEAU"
    return "COLLAPSED" if has_collapsed(norms) else None


def _guard(found: Level, cap: float) -> "tuple[str, Policy]":
    from gradclip.clipping import EMAClip, NormClip  # noqa: PLC0415 - it imports torch

    if found.breadth > _BROAD:
        return "BROAD", NormClip(max_norm=cap)
    if cap > _FAR * found.lowest:
        return "FALLEN_AWAY", EMAClip(ratio=2.0, scope="group", cap=cap)
    return "GUARD", NormClip(max_norm=cap)


def _regular(found: Level, cap: float) -> "tuple[str, Policy]":
    from gradclip.clipping import NormClip, ZScoreClip  # noqa: PLC0415 - it imports torch

    if found.p90 / found.median < _NARROW:
        return "NARROW", NormClip(max_norm=cap)
    if found.moves:
        kind = "RISING" if found.drift > 1 else "FALLING"
        return kind, ZScoreClip(z=2.5, feedback="bounded", cap=cap)
    return "STEADY", NormClip(max_norm=round_up(found.p90, found.grid))


def _numbers(name: str, given: object, length: int | None = None) -> Numbers:
    try:
        found = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ArgumentTypeError(
            f"{name} is a {type(given).__name__} that cannot be read: expected one number for each "
            f"step. {error}"
        ) from error
    if found.ndim != 1:
        raise ArgumentValueError(f"{name} has the shape {found.shape}: expected (steps,)")
    if length is not None and len(found) != length:
        raise ArgumentValueError(f"{name} has {len(found)} numbers, and norms has {length}")
    return found
