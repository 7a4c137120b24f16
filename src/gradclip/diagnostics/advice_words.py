"""The advice in words: sentences, lines to paste, and the whole as text."""

from typing import TYPE_CHECKING

from gradclip.diagnostics.arrays import Numbers, np
from gradclip.diagnostics.norm_statistics import Level
from gradclip.diagnostics.policy_table import Replayed
from gradclip.diagnostics.readers.logged import LoggedRun
from gradclip.diagnostics.summary import compact, percent

if TYPE_CHECKING:
    from gradclip.clipping.policies import Policy
    from gradclip.diagnostics.advice import Advice

__all__ = ["as_in_a_file", "better", "call", "finding", "line", "reason", "refusal", "text"]

_LINES = {
    "transformers": "max_grad_norm={}",
    "lightning": "gradient_clip_val={}",
    "megatron": "--clip-grad {}",
    "fairseq": "--clip-norm {}",
    "lerobot": "--optimizer.grad_clip_norm={}",
}
"""The setting of a framework that clips by norm."""
_SPIKE = 3
"""Norms this many times larger than the 90th percentile are spikes."""
_GUARDS = ("GUARD", "BROAD", "FALLEN_AWAY", "NARROW")
"""Kinds whose limit is that of a guard, of which the share of clipped steps carries over."""
_WITH_CALLBACK = ("transformers", "lightning")
_REFUSALS = {
    "FEW": "There are {points} norms that are finite and above 0; 30 are needed, and 100 to "
    "regularise.",
    "EVENTS_ONLY": "There is no step, no loss and no learning rate beside the norms. Only outliers "
    "seem to be logged. Log the step beside each norm.",
    "PLATEAU": "More than 5 % of the norms are the largest one. These are norms after clipping; "
    "log the norm before.",
    "COLLAPSED": "The norm fell below 1 % of what it was and stayed. No number describes both "
    "parts. Did the model stop learning, or does it know its data by heart?",
    "FEW_FOR_REGULARISE": "There are {points} norms after the beginning; 100 are needed to "
    "regularise. A guard needs 30, and would have the limit {cap:g}.",
}


def finding(norms: Numbers, found: Level | None) -> str:
    """Say in one sentence what the norms are like."""
    if not len(norms):
        return "No norm is finite and above 0."
    largest = compact(float(norms.max()))
    if found is None:
        return f"The median norm is {compact(float(np.median(norms)))}, the largest {largest}."
    hundredth = "" if found.p99 is None else f", one in a hundred {compact(found.p99)}"
    spikes = int((norms[found.cut :] > _SPIKE * found.p90).sum())
    told = f"; spikes above {compact(_SPIKE * found.p90)}: {spikes}" if spikes else ""
    return (
        f"The usual norm is {compact(found.median)}; one step in ten exceeds "
        f"{compact(found.p90)}{hundredth}; the largest is {largest}{told}."
    )


def refusal(kind: str, points: int, cap: float = 0.0) -> str:
    """Say why there is no advice."""
    return _REFUSALS[kind].format(points=points, cap=cap)


def reason(kind: str, norms: Numbers, found: Level, cap: float, run: Replayed) -> str:
    """Say why this policy."""
    shares = ", ".join(percent(each) for each in run.by_third)
    if kind == "GUARD":
        return (
            f"A limit of {cap:g} is about {cap / found.median:.2g} times your usual norm. It would "
            f"have touched {percent(run.clip_fraction)} of the steps (by thirds {shares}). It is "
            "insurance, not tuning."
        )
    if kind == "BROAD":
        low, high = (float(np.quantile(norms[found.cut :], q)) for q in (0.05, 0.95))
        return (
            f"Nine in ten of your norms lie between {compact(low)} and {compact(high)}, a factor "
            f"of {compact(high / low)}. Only a loose limit makes sense, and the spread itself "
            "deserves a look."
        )
    if kind == "FALLEN_AWAY":
        return (
            f"In a part of the run the norms are over ten times below a limit of {cap:g}, so it "
            "would not guard that part. Use a limit that follows the norms: twice their moving "
            "average, and never above that one."
        )
    if kind == "NARROW":
        return (
            f"Your norms hardly vary (one step in ten exceeds {found.p90 / found.median:.2f} times "
            "the usual norm), so a limit near them clips everything or nothing. Take the guard."
        )
    if kind == "STEADY":
        return (
            f"A limit of {run.policy.max_norm:g} clips about one step in ten and makes the mean "  # type: ignore[attr-defined]
            f"step {percent(1 - run.lr_factor)} smaller; expect 5 to 30 % in another run."
        )
    first, _, last = (float((part > found.p90).mean()) for part in np.array_split(norms, 3))
    return (
        f"No single number clips evenly: {percent(first)} early, {percent(last)} late. Use the "
        f"z-score policy, capped at {cap:g}. It clips {percent(run.clip_fraction)} (by thirds "
        f"{shares})."
    )


def better(run: LoggedRun, found: Level) -> tuple[str, ...]:
    """Say what would make the advice better."""
    wanted = []
    if run.spacing is None or run.spacing > 1:
        wanted.append("a norm of every step, with its step")
    if found.p99 is None:
        wanted.append(
            "1000 norms or more after the beginning, which tell what one in a hundred exceeds"
        )
    if np.isnan(run.losses).all():
        wanted.append("the loss beside each norm, which tells whether the run learned")
    if np.isnan(run.rates).all():
        wanted.append("the learning rate beside each norm, which tells where warm-up ends")
    return tuple(wanted)


def call(policy: "Policy") -> str:
    """Return a policy as it is written in Python, without what is so by default.

    >>> from gradclip import ZScoreClip
    >>> call(ZScoreClip(z=2.5, cap=4))
    'ZScoreClip(cap=4.0, z=2.5)'
    """
    fields = ", ".join(f"{name}={getattr(policy, name)!r}" for name in _given(policy))
    return f"{type(policy).__name__}({fields})"


def as_in_a_file(policy: "Policy") -> dict[str, object]:
    """Return a policy as a configuration file has it."""
    return {
        "clip_mode": policy.clip_mode,
        **{name: getattr(policy, name) for name in _given(policy)},
    }


def line(policy: "Policy", framework: str | None) -> str:
    """Return a line to paste."""
    limit = getattr(policy, "max_norm", None)
    if limit is not None and framework in _LINES:
        return _LINES[framework].format(f"{limit:g}")
    shown = f"{limit:g}" if limit is not None else f"gradclip.{call(policy)}"
    if framework in _WITH_CALLBACK:
        return f"callbacks=[GradientClippingCallback({shown})]"
    return f"gradclip.attach(optimizer, {shown})"


def text(advice: "Advice") -> str:
    """Return the advice as lines: finding, policy, what it would have done, the table, doubts."""
    lines = [advice.finding]
    if advice.policy is None:
        lines += [f"No advice ({advice.kind}): {advice.reason}"]
    else:
        assert advice.clip_fraction is not None
        assert advice.lr_factor is not None
        lines += ["", f"  {advice.line}", "", f"{advice.kind}: {advice.reason}"]
        share = percent(advice.clip_fraction)
        assert advice.clip_fraction_settled is not None
        factor, later = f"{advice.lr_factor:.3g}", percent(advice.clip_fraction_settled)
        lines += [
            f"On this run it clips {share} of the steps. The mean step is multiplied by {factor}."
        ]
        if advice.kind in _GUARDS:
            lines += [
                f"Expect {later} of later steps, as long as the norms stay as they were after the",
                "beginning. They do not where clipping makes a run learn that did not.",
            ]
        else:
            lines += [
                "How many later steps it clips cannot be told: a slow change of the norms changes",
                "that a lot.",
            ]
    if advice.policies:
        lines += ["", *_table(advice.policies)]
    if advice.warnings:
        lines += ["", *(f"warning {each.code}: {each.text}" for each in advice.warnings)]
    if advice.better:
        lines += ["", "Better advice needs " + "; ".join(advice.better) + "."]
    return "\n".join(lines)


def _table(policies: "tuple[Replayed, ...]") -> list[str]:
    rows = [("policy", "clips", "by thirds", "mean step")]
    for each in policies:
        by_thirds = ", ".join(percent(part) for part in each.by_third)
        about = "about " if each.is_rough else ""
        share = f"{about}{percent(each.clip_fraction)}"
        rows.append((call(each.policy), share, by_thirds, f"x {each.lr_factor:.3g}"))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _given(policy: "Policy") -> list[str]:
    known = type(policy).model_fields
    return [name for name in known if name in policy.model_fields_set and name != "clip_mode"]
