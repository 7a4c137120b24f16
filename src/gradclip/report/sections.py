"""The parts of the page of one run, as HTML."""

from collections.abc import Iterable, Sequence
from html import escape

from gradclip.diagnostics.advice import Advice
from gradclip.diagnostics.advice_words import call
from gradclip.diagnostics.arrays import np
from gradclip.report.blame import Blame
from gradclip.report.happenings import Happening
from gradclip.report.histogram import histogram
from gradclip.report.known import Known
from gradclip.report.words import counted, number, share

__all__ = ["advice", "chart", "distribution", "events", "hottest", "numbers", "section", "table", "tiles"]

_HOTTEST = 10
_ROWS = 50


def section(title: str, level: int, body: str, note: str = "") -> str:
    """Return a part with its heading; the note is HTML."""
    under = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h{level}>{escape(title)}</h{level}>{under}{body}</section>"


def chart(kind: str, told: str, **options: str | int) -> str:
    """Return the box of a chart, which the script draws into.

    Args:
        kind: Which chart.
        told: What is seen, for those who do not see it.
        options: What the script is told.
    """
    data = "".join(f' data-{name}="{escape(str(value))}"' for name, value in options.items())
    return (
        f'<div class="chart" data-chart="{kind}"{data} tabindex="0" role="group" '
        f'aria-label="{escape(told)}"></div>'
    )


def table(
    label: str, heads: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int]
) -> str:
    """Return a table of cells that are HTML, which scrolls by itself where it is too wide."""
    style = [' class="number"' if at in numeric else "" for at in range(len(heads))]
    head = "".join(
        f'<th scope="col"{each}>{escape(name)}</th>' for name, each in zip(heads, style, strict=True)
    )
    body = "".join(
        f"<tr>{''.join(f'<td{each}>{cell}</td>' for cell, each in zip(row, style, strict=True))}</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def tiles(run: Known) -> str:
    """Return the five numbers."""
    skipped, clipped, count = int(run.skipped.sum()), int(run.clipped.sum()), len(run)
    unmade = int((run.nonfinite & ~run.skipped).sum())
    norms = run.usable
    p50, p90, p99, most = (
        (float(np.quantile(norms, q)) for q in (0.5, 0.9, 0.99, 1)) if len(norms) else [np.nan] * 4
    )
    at = f"at step {run.step[np.nanargmax(np.where(np.isfinite(run.norm), run.norm, -1))]:,}" if len(norms) else ""
    made = (
        ("Logged steps", f"{count:,}", _range(run))
        if run.log is not None
        else ("Steps made", f"{count - skipped:,}", f"of {count:,}")
    )
    cut = (
        ("Clipped", share(clipped / count), counted(clipped))
        if run.tells_clipping
        else ("Clipped", "\N{EN DASH}", "not known")
    )
    fourth = (
        ("Not finite", f"{unmade:,}", "NaN or infinite")
        if run.log is not None
        else ("Skipped", f"{skipped:,}", "not finite" if skipped and run.nonfinite[run.skipped].all() else "steps")
    )
    bad = skipped or (run.log is not None and unmade)
    shown = [
        (*made, ""),
        (*cut, ""),
        (*fourth, ' class="bad"' if bad else ""),
        ("Median norm", number(p50), f"p90 {number(p90)}", ""),
        ("Largest norm", number(most), at if count < 1000 else f"p99 {number(p99)}", ""),  # noqa: PLR2004
    ]
    items = "".join(
        f"<div><dt>{name}</dt><dd{style}>{value}<small>{under}</small></dd></div>"
        for name, value, under, style in shown
    )
    return f'<dl class="tiles">{items}</dl>'


def _range(run: Known) -> str:
    return f"{run.step[0]:,} to {run.step[-1]:,}" if run.axis == "optimizer step" else "in the log"


def hottest(run: Known, found: Blame, heads: Sequence[str], short: Sequence[str]) -> str:
    """Return the table of those parameters that have the most of the norm.

    Args:
        run: The run.
        found: What each has.
        heads: What the shares are of: one or two names.
        short: The parameters' names as they are shown.
    """
    assert run.parameters is not None
    norms = np.where(np.isfinite(run.parameters.norms), run.parameters.norms, np.nan)
    rows = []
    for at in np.argsort(-found.of_parameters, kind="stable")[:_HOTTEST].tolist():
        of = norms[:, at][np.isfinite(norms[:, at])]
        shares = [found.of_parameters[at], found.usual_of_parameters[at]][: len(heads)]
        rows.append(
            (
                f'<code title="{escape(run.parameters.names[at])}">{escape(short[at])}</code>',
                *(share(float(each)) for each in shares),
                number(float(np.median(of))) if len(of) else "\N{EN DASH}",
                number(float(of.max())) if len(of) else "\N{EN DASH}",
            )
        )
    names = ("Parameter", *heads, "Median", "Largest")
    return table("The hottest parameters", names, rows, range(1, len(names)))


def distribution(run: Known) -> str:
    """Return the histogram."""
    limits = run.limit[np.isfinite(run.limit)]
    limit = float(limits[-1]) if len(limits) and len(run.groups) < 2 else np.nan  # noqa: PLR2004
    norms = run.usable
    told = f"Histogram of the norms on a log scale, from {number(float(norms.min()))} to {number(float(norms.max()))}"
    return histogram(norms, limit, told)


def events(rows: Sequence[Happening]) -> str:
    """Return the table of events; each step is a button that leads there."""
    names_parameters = any(each.parameters for each in rows)
    cells = [
        (
            f'<button data-go="{each.step}" aria-label="Show step {each.step:,}">'
            f"{each.step:,}</button>",
            escape(each.what),
            *([f"<code>{escape(each.parameters)}</code>"] if names_parameters else []),
            each.norm,
        )
        for each in rows
    ]
    heads = ("Step", "What", *(["Parameters"] if names_parameters else []), "Norm")
    return table("Events", heads, cells, (len(heads) - 1,))


def advice(found: Advice) -> str:
    """Return what ``gradclip suggest`` says of these norms."""
    parts = [f"<p>{escape(found.finding)} {escape(found.reason)}</p>"]
    if found.line is not None:
        parts.insert(0, f"<pre><code>{escape(found.line)}</code></pre>")
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
    parts += [f'<p class="note">{escape(each.text)}</p>' for each in found.warnings]
    return "".join(parts)


def numbers(run: Known) -> str:
    """Return some of the steps as a table."""
    places = np.unique(np.linspace(0, len(run) - 1, min(_ROWS, len(run))).astype(np.int64))
    heads, columns = ["Step"], [run.step]
    for name, values in (("Norm", run.norm), ("Limit", run.limit), ("Loss", run.loss), ("Rate", run.rate)):
        if np.isfinite(values).any():
            heads.append(name)
            columns.append(values)
    rows = [
        (f"{columns[0][at]:,}", *(number(float(column[at])) for column in columns[1:]))
        for at in places.tolist()
    ]
    which = f"{len(rows):,} of {len(run):,}" if len(rows) < len(run) else f"all {len(run):,}"
    title = f"The numbers behind the charts ({which} {run.counted})"
    return (
        f"<details><summary>{title}</summary>"
        f"{table('The numbers', heads, rows, range(len(heads)))}</details>"
    )
