"""The page of one run: its finding, its numbers, its charts, and the data that they draw."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from gradclip.diagnostics.advice import Advice, advise, as_run
from gradclip.diagnostics.arrays import np
from gradclip.diagnostics.blame import blame, outstanding
from gradclip.diagnostics.known import Known, known
from gradclip.diagnostics.readers.own_record import way_in
from gradclip.diagnostics.runs import Run
from gradclip.diagnostics.summary import summarise
from gradclip.report import tables
from gradclip.report.comparison import row_of
from gradclip.report.details import details
from gradclip.report.faults import Faults, faults_of
from gradclip.report.finding import Case, findings
from gradclip.report.happenings import happenings
from gradclip.report.heat_chart import deflated, heat_chart
from gradclip.report.histogram import histogram
from gradclip.report.html import section
from gradclip.report.line_charts import line_charts, shown_groups
from gradclip.report.series import columns_of, per_bucket
from gradclip.report.words import begun, counted

__all__ = ["Article", "article"]

_NO_SCRIPT = (
    '<noscript><p class="note">The charts need JavaScript. The finding and the numbers are above, '
    "the tables below.</p></noscript>"
)
_NOUNS = {"step": ("step", "steps"), "entry": ("entry", "entries")}


@dataclass(frozen=True)
class Article:
    """The page of a run.

    Attributes:
        name: Of the run.
        finding: In a sentence, or two where the loss was lost.
        row: Of the table that compares runs.
        html: All of it.
    """

    name: str
    finding: str
    row: Sequence[str]
    html: str


def article(of: Run, place: int, level: int) -> Article:
    """Return the page of a run.

    Args:
        of: The run.
        place: Which of the file; the ids of its elements end with it.
        level: Of its heading.
    """
    run = known(of)
    steps = outstanding(run)
    case = Case(run, steps, blame(run, steps), summarise(of.steps).diverged_at)
    faults, said = faults_of(run), findings(case)
    others = " ".join(filter(None, [*said[1:], details(case, faults)]))
    body = [
        f'<p class="run">{escape(_about(run))}</p>',
        f'<h{level} class="finding">{escape(said[0])}</h{level}>',
        f'<p class="say">{escape(others)}</p>' if others else "",
        tables.tiles(run),
        _NO_SCRIPT,
        _bar(place, run.noun),
        *line_charts(run, level + 1),
    ]
    data: dict[str, Any] = {"noun": _NOUNS[run.noun], "per": per_bucket(len(run))}
    if run.parameters is not None:
        part, data["heat"] = heat_chart(run, case.blame, faults, level + 1)
        body.append(part)
    body += _tables(case, faults, level + 1)
    shown = shown_groups(run)
    data["groups"] = {key: group.name for key, group in shown.items()}
    data["columns"] = {
        name: {"type": values.dtype.str[1:], "text": deflated(_little_endian(values))}
        for name, values in columns_of(run, shown).items()
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    body.append(f'<script type="application/json" class="data">{text}</script>')
    html = f'<article id="run{place}">{"".join(body)}</article>'
    return Article(of.name, " ".join(said), row_of(of, run, place), html)


def _little_endian(values: np.ndarray[Any, Any]) -> bytes:
    return values.astype(values.dtype.newbyteorder("<")).tobytes()


def _about(run: Known) -> str:
    """Return the grey line over the finding."""
    said = [run.name]
    if run.log is not None:
        said += [run.log.format, f"norms from {run.log.norm_key}"]
    if run.parameters is not None:
        said.append(counted(len(run.parameters.names), "parameter"))
    said.append(counted(len(run), run.counted.removesuffix("s")))
    if isinstance(kind := run.about.get("kind"), str):
        said.append(kind)
    if isinstance(policies := run.about.get("policies"), dict):
        said += dict.fromkeys(str(each).partition("(")[0] for each in policies.values())
    return " \N{MIDDLE DOT} ".join(said)


def _bar(place: int, noun: str) -> str:
    """Return the slider, what is said of a step, and the buttons."""
    return (
        f'<div class="bar"><label for="step{place}">{begun(noun)}</label>'
        f'<input id="step{place}" class="step" type="range" min="0" value="0">'
        f'<output class="reading" for="step{place}">Hover, or use the arrow keys, for the numbers '
        f'of a step; drag to zoom.</output><span class="range">all {_NOUNS[noun][1]}</span>'
        '<span class="buttons"><button class="in" aria-label="Zoom in">+</button>'
        '<button class="out" aria-label="Zoom out">\N{MINUS SIGN}</button>'
        '<button class="all">Show all</button></span></div>'
    )


def _tables(case: Case, faults: Faults, level: int) -> list[str]:
    """Return what stands below the charts."""
    run, parts, pair = case.run, list[str](), list[str]()
    if case.blame is not None:
        pair.append(tables.hottest(run, case.blame, case.steps.are_clipped, level))
    if drawn := _distribution(run):
        pair.append(section("Distribution of the norm", level, drawn, "Log scale."))
    if pair:
        parts.append(f'<div class="two">{"".join(pair)}</div>')
    rows, which = happenings(run, faults)
    if rows:
        note = f"{begun(which)}. " if which else ""
        note += f"Each {run.noun} leads to its place in the charts."
        parts.append(section("Events", level, tables.events(rows), note))
    note = "What <code>gradclip suggest</code> says of these norms."
    parts.append(section("A limit for the next run", level, tables.advice(_advice(run)), note))
    parts.append(tables.numbers(run))
    return parts


def _distribution(run: Known) -> str:
    limits = run.limit[np.isfinite(run.limit)]
    limit = float(limits[-1]) if len(limits) and len(run.groups) <= 1 else np.nan
    return histogram(run.usable, limit)


def _advice(run: Known) -> Advice:
    if run.log is not None:
        return advise(run.log)
    limits = run.limit[np.isfinite(run.limit)]
    is_one = len(run.groups) <= 1 and len(limits) and limits.min() == limits.max() > 0
    return advise(
        as_run(
            np.where(run.norm >= 0, run.norm, np.nan),
            steps=run.step,
            losses=run.loss,
            rates=run.rate,
            limit=float(limits[0]) if is_one else None,
            framework=way_in(run.about),
        )
    )
