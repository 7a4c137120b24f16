"""The advice in words: sentences, lines to paste, and the whole as text."""

from typing import TYPE_CHECKING

from gradclip.diagnostics.advice_kinds import KINDS, to_do
from gradclip.diagnostics.arrays import Numbers, np
from gradclip.diagnostics.norm_statistics import Level, before_the_fall, guard_limit, level
from gradclip.diagnostics.policy_table import Replayed
from gradclip.diagnostics.readers.logged import LoggedRun
from gradclip.diagnostics.run_course import course_of
from gradclip.diagnostics.summary import compact, percent

if TYPE_CHECKING:
    from gradclip.clipping.policies import Policy
    from gradclip.diagnostics.advice import Advice
    from gradclip.diagnostics.advice_warnings import AdviceWarning

__all__ = [
    "as_in_a_file",
    "better",
    "call",
    "few_to_regularise",
    "finding",
    "line",
    "reason",
    "refusal",
    "text",
]

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
_WITH_CALLBACK = ("transformers", "lightning", "callback")
_FEWEST = 30
_AGAIN = (
    "A limit changes the norms of the steps after it: ask again of the run that was clipped, until "
    "the answer stays about the same."
)
_LEGEND = {
    "cap=": "cap: the limit is never above this.",
    "scope='group'": "scope='group': all parameters of a group have one norm.",
    "feedback='bounded'": "feedback='bounded': a spike counts as no more than the limit.",
}
"""What the arguments in the table mean."""


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


def refusal(kind: str, run: LoggedRun, norms: Numbers) -> str:
    """Say why there is no advice, and what to do."""
    if kind == "FEW":
        seen = f"There are {len(norms)} norms that are finite and above 0."
    elif kind == "COLLAPSED":
        return _of_a_collapse(run, norms)
    else:
        seen = KINDS[kind].summary
    return f"{seen} {to_do(kind)}"


def few_to_regularise(points: int, cap: float) -> str:
    """Say that a guard is possible, and no more."""
    kind = "FEW_FOR_REGULARISE"
    return (
        f"There are {points} norms after the beginning. {to_do(kind)} It would have the limit "
        f"{cap:g}."
    )


def _of_a_collapse(run: LoggedRun, norms: Numbers) -> str:
    seen = "The norm fell below 1 % of what it was and stayed there."
    course = course_of(run)
    if course is None:
        seen += " If the loss fell with it, the run has learned."
    elif course.fell:
        before = compact(max(course.first, course.highest))
        seen += (
            f" The loss fell with it, from {before} to {compact(course.last)}: the run has learned."
        )
    else:
        seen += f" The loss did not: {course}. Perhaps the model stopped learning there."
    from gradclip.clipping import EMAClip, NormClip  # noqa: PLC0415 - it imports torch

    follows = line(EMAClip(ratio=2.0, scope="group"), run.framework) if run.framework else None
    said = f"{seen} No single number fits both parts. {to_do('COLLAPSED', follows)}"
    early = before_the_fall(norms)
    if len(early) >= _FEWEST:
        limit = guard_limit(level(early, np.full(len(early), np.nan)))
        capped = EMAClip(ratio=2.0, scope="group", cap=limit)
        said += (
            f" Of this run that is {limit:g}: {line(NormClip(max_norm=limit), run.framework)}. "
            "Both together follow the norms, and stop the spikes of the first steps too: "
            f"{line(capped, run.framework)}."
        )
    return said


def reason(kind: str, norms: Numbers, found: Level, cap: float, run: Replayed) -> str:
    """Say why this policy."""
    return f"{_seen(kind, norms, found, cap, run)} {to_do(kind)}"


def _seen(kind: str, norms: Numbers, found: Level, cap: float, run: Replayed) -> str:
    if kind == "GUARD":
        return f"A limit of {cap:g} is about {cap / found.median:.2g} times your usual norm."
    if kind == "BROAD":
        low, high = (float(np.quantile(norms[found.cut :], q)) for q in (0.05, 0.95))
        return (
            f"Nine in ten of your norms lie between {compact(low)} and {compact(high)}, a factor "
            f"of {compact(high / low)}."
        )
    if kind == "FALLEN_AWAY":
        return (
            f"In a part of the run the norms are over ten times below a limit of {cap:g}, so it "
            "would not guard that part."
        )
    if kind == "NARROW":
        return (
            f"Your norms hardly vary (one step in ten exceeds {found.p90 / found.median:.2f} times "
            "the usual norm), so a limit near them clips everything or nothing."
        )
    if kind == "STEADY":
        return f"A limit of {run.policy.max_norm:g} clips about one step in ten."  # type: ignore[attr-defined]
    first, _, last = (float((part > found.p90).mean()) for part in np.array_split(norms, 3))
    return f"No single number clips evenly: {percent(first)} early, {percent(last)} late."


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


def line(policy: "Policy", framework: str | None, *, of_ours: bool = False) -> str:
    """Return a line to paste, with ``of_ours`` one that skips steps with a NaN, too."""
    limit = getattr(policy, "max_norm", None)
    if limit is not None and framework in _LINES and not of_ours:
        return _LINES[framework].format(f"{limit:g}")
    if framework == "hook":
        fields = ", ".join(f"{name}={value!r}" for name, value in as_in_a_file(policy).items())
        return f"GradientClippingHookConfig({fields})"
    shown = f"{limit:g}" if limit is not None else f"gradclip.{call(policy)}"
    if framework in _WITH_CALLBACK:
        return f"callbacks=[GradientClippingCallback({shown})]"
    return f"gradclip.attach(optimizer, {shown})"


def text(advice: "Advice") -> str:
    """Return the advice as lines, the most important ones first."""
    parts = [advice.finding]
    parts += [_doubt(each) for each in advice.warnings if each.overturns]
    if len(parts) > 1 and advice.warnings[0].code == "LOST":
        parts[:2] = parts[1::-1]
    if advice.policy is None:
        parts.append(f"No advice ({advice.kind}): {advice.reason}")
    else:
        said = [f"{advice.kind}: {advice.reason}", _forecast(advice), _AGAIN]
        parts += ["", f"  {advice.line}", "", *said]
    if advice.policies:
        parts += ["", *_table(advice.policies)]
    smaller = [_doubt(each) for each in advice.warnings if not each.overturns]
    if smaller:
        parts += ["", *smaller]
    if advice.better:
        parts += ["", "Better advice needs " + "; ".join(advice.better) + "."]
    return "\n".join(parts)


def _doubt(warning: "AdviceWarning") -> str:
    return f"warning {warning.code}: {warning.text}"


def _forecast(advice: "Advice") -> str:
    assert advice.clip_fraction is not None
    assert advice.clip_fraction_settled is not None
    assert advice.clip_fraction_by_third is not None
    assert advice.lr_factor is not None
    said = (
        f"On this run it would have clipped {percent(advice.clip_fraction)} of the steps (by "
        f"thirds {_shares(advice.clip_fraction_by_third)}), and made steps "
        f"{percent(1 - advice.lr_factor)} shorter on average"
    )
    if advice.kind in _GUARDS:
        later = percent(advice.clip_fraction_settled)
        return f"{said}; expect {later} of later steps, if their norms are as after the beginning."
    return f"{said}; how many later steps it clips cannot be told."


def _table(policies: "tuple[Replayed, ...]") -> list[str]:
    """Return a line for each policy; of those with the same numbers the first alone."""
    rows: dict[tuple[str, ...], str] = {}
    for each in policies:
        about = "about " if each.is_rough else ""
        share = f"{about}{percent(each.clip_fraction)}"
        numbers = (share, _shares(each.by_third), f"x {each.lr_factor:.3g}")
        rows.setdefault(numbers, call(each.policy))
    lines: list[tuple[str, ...]] = [("policy", "clips", "by thirds", "mean step")]
    lines += [(name, *numbers) for numbers, name in rows.items()]
    widths = [max(len(row[place]) for row in lines) for place in range(len(lines[0]))]
    left_out = len(policies) - len(rows)
    same = " A policy with the same numbers as one above it is left out." if left_out else ""
    shown = " ".join(rows.values())
    legend = " ".join(said for part, said in _LEGEND.items() if part in shown)
    head = (
        "What policies would have done on this run; mean step is what the gradients are multiplied "
        f"by on average.{same}"
    )
    return [
        head,
        *(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in lines
        ),
        *([legend] if legend else []),
    ]


def _shares(thirds: tuple[float, float, float]) -> str:
    return ", ".join(percent(part) for part in thirds)


def _given(policy: "Policy") -> list[str]:
    known = type(policy).model_fields
    return [name for name in known if name in policy.model_fields_set and name != "clip_mode"]
