"""The numbers and the tables of the page."""

from collections.abc import Sequence
from html import escape

from gradclip.diagnostics.advice import Advice
from gradclip.diagnostics.advice_words import call
from gradclip.diagnostics.arrays import np
from gradclip.diagnostics.blame import Blame
from gradclip.diagnostics.known import Known
from gradclip.report.happenings import Happening
from gradclip.report.html import section, table
from gradclip.report.words import begun, counted, number, share

__all__ = ["advice", "events", "hottest", "numbers", "tiles"]

_HOTTEST = 10
_COUNTS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_ROWS = 50
_MANY = 1000
"""Norms from which on a 99th percentile says something."""
_POLICY_NOTE = (
    "Clips: the share of steps. By thirds: of the first, second and last third of the run. Mean "
    "step: what would have been left of the length of a step, on average."
)
_DASH = "\N{EN DASH}"


def tiles(run: Known) -> str:
    """Return the five numbers."""
    skipped, clipped, count = int(run.skipped.sum()), int(run.clipped.sum()), len(run)
    norms, is_log = run.usable, run.log is not None
    shown = [
        ("Steps made", f"{count - skipped:,}", f"of {count:,} recorded", False),
        ("Clipped", share(clipped / count), counted(clipped), False),
        ("Skipped", f"{skipped:,}", _why(run), skipped > 0),
        ("Median norm", _DASH, "", False),
        ("Largest norm", _DASH, "", False),
    ]
    if is_log:
        bad = int(run.nonfinite.sum())
        first, last = run.step[0], run.step[-1]
        where = f"{first:,} to {last:,}" if run.noun == "step" else "in the log"
        shown[0] = "Logged steps", f"{count:,}", where, False
        shown[2] = "Not finite", f"{bad:,}", "NaN or infinite", bad > 0
    if not run.tells_clipping:
        shown[1] = "Clipped", _DASH, run.unclipped, False
    if len(norms):
        p50, p90, p99, most = (number(float(q)) for q in np.quantile(norms, (0.5, 0.9, 0.99, 1)))
        place = int(np.nanargmax(np.where(np.isfinite(run.norm), run.norm, -1)))
        where = f"at {run.noun} {run.step[place]:,}"
        shown[3] = "Median norm", p50, f"p90 {p90}", False
        shown[4] = "Largest norm", most, f"p99 {p99}" if count >= _MANY else where, False
    items = "".join(
        f'<div><dt>{name}</dt><dd class="{"bad" if is_bad else "plain"}">{value}'
        f"<small>{under}</small></dd></div>"
        for name, value, under, is_bad in shown
    )
    return f'<dl class="tiles">{items}</dl>'


def _why(run: Known) -> str:
    is_known = run.skipped.any() and run.nonfinite[run.skipped].all()
    return "not finite" if is_known else "steps"


def hottest(run: Known, found: Blame, are_clipped: bool, level: int) -> str:
    """Return the table of those parameters that have the most of the norm.

    Args:
        run: The run.
        found: What each has.
        are_clipped: Whether the steps that stand out are the clipped ones; else they are spikes.
        level: Of the heading.
    """
    assert run.parameters is not None
    norms = run.parameters.norms
    heads, over = ["Share"], "all steps"
    shares = [found.of_parameters]
    if found.steps:
        heads = ["Clipped" if are_clipped else "Spikes"]
        over = "the clipped steps" if are_clipped else "the spikes"
    if found.steps and found.others:
        heads.append("Others")
        over += ", and over the others"
        shares.append(found.usual_of_parameters)
    rows = []
    for at in np.argsort(-found.of_parameters, kind="stable")[:_HOTTEST].tolist():
        of = norms[:, at][np.isfinite(norms[:, at])]
        middle, largest = (float(np.median(of)), float(of.max())) if len(of) else (np.nan, np.nan)
        rows.append(
            (
                f"<code>{escape(run.parameters.names[at])}</code>",
                *(share(float(each[at])) for each in shares),
                number(middle),
                number(largest),
            )
        )
    names = ("Parameter", *heads, "Median", "Largest")
    title = f"The hottest {_COUNTS[len(rows) - 2]}" if len(rows) > 1 else "The parameter"
    body = table("The hottest parameters", names, rows, range(1, len(names)))
    return section(title, level, body, f"Shares of the squared norm: the mean over {over}.")


def events(rows: Sequence[Happening]) -> str:
    """Return the table of events; each step is a button that leads there."""
    are_named = any(each.parameters for each in rows)
    cells = []
    for each in rows:
        steps = f"{each.step:,}" + (f" to {each.last:,}" if each.last > each.step else "")
        label = f"Show step {steps}"
        step = f'<button data-go="{each.step}" aria-label="{label}">{steps}</button>'
        names = [f"<code>{escape(each.parameters)}</code>"] if are_named else []
        cells.append((step, escape(each.what), *names, each.norm))
    heads = ("Step", "What", *(["Parameters"] if are_named else []), "Norm")
    return table("Events", heads, cells, (len(heads) - 1,))


def advice(found: Advice) -> str:
    """Return what ``gradclip suggest`` says of these norms."""
    notes = {each: f'<p class="note">{escape(each.text)}</p>' for each in found.warnings}
    parts = [note for each, note in notes.items() if each.overturns]
    if found.line is not None:
        parts.append(f"<pre><code>{escape(found.line)}</code></pre>")
    parts.append(f"<p>{escape(found.finding)} {escape(found.reason)}</p>")
    if found.policies:
        rows = [
            (
                f"<code>{escape(call(each.policy))}</code>",
                ("about " if each.is_rough else "") + share(each.clip_fraction),
                ", ".join(share(part).removesuffix(" %") for part in each.by_third) + " %",
                f"\N{MULTIPLICATION SIGN} {each.lr_factor:.3g}",
            )
            for each in found.policies
        ]
        heads = ("Policy", "Clips", "By thirds", "Mean step")
        parts.append(table("What each policy would have done", heads, rows, (1, 2, 3)))
        parts.append(f'<p class="note">{_POLICY_NOTE}</p>')
    parts += [note for each, note in notes.items() if not each.overturns]
    return "".join(parts)


def numbers(run: Known) -> str:
    """Return some of the steps as a table."""
    places = np.unique(np.linspace(0, len(run) - 1, min(_ROWS, len(run))).astype(np.int64))
    named = {"Norm": run.norm, "Limit": run.limit, "Loss": run.loss, "Rate": run.rate}
    columns = {name: each for name, each in named.items() if np.isfinite(each).any()}
    rows = [
        (f"{run.step[at]:,}", *(number(float(each[at])) for each in columns.values()))
        for at in places.tolist()
    ]
    heads = (begun(run.noun), *columns)
    which = f"{len(rows):,} of {len(run):,}" if len(rows) < len(run) else f"all {len(run):,}"
    title = f"The numbers behind the charts ({which} {run.counted})"
    body = table("The numbers", heads, rows, range(len(heads)))
    return f"<details><summary>{title}</summary>{body}</details>"
