"""The page of one run: its finding, its numbers, its charts, and the data that they draw."""

import base64
import json
import zlib
from dataclasses import dataclass
from html import escape
from typing import Any

from gradclip.diagnostics.advice import Advice, advise, suggest
from gradclip.diagnostics.advice_words import call
from gradclip.diagnostics.arrays import np
from gradclip.diagnostics.runs import Run
from gradclip.report import sections
from gradclip.report.blame import Blame, Outstanding, blame, outstanding
from gradclip.report.faults import Faults, faults_of
from gradclip.report.happenings import happenings
from gradclip.report.heat import heat_of, rows_of
from gradclip.report.known import Known, known
from gradclip.report.layers import layers_of, short_names
from gradclip.report.series import columns_of, per_bucket, window
from gradclip.report.words import counted, finding, more, number, share

__all__ = ["Article", "article"]

_GROUPS = 6
"""Groups that are drawn; a chart of more cannot be read."""
_HOT = 8
_NUMBERS = ("", "", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_POINTS = 400
_ROW_HEIGHT, _LOWEST, _HIGHEST = 18, 90, 500


@dataclass(frozen=True)
class Article:
    """The page of a run.

    Attributes:
        name: Of the run.
        finding: In one sentence.
        html: All of it.
    """

    name: str
    finding: str
    html: str


def article(run: Run, number: int, level: int) -> Article:
    """Return the page of a run.

    Args:
        run: The run.
        number: Which of the file; the ids of its elements end with it.
        level: Of its heading.
    """
    all_known = known(run)
    steps = outstanding(all_known)
    found, faults = blame(all_known, steps), faults_of(all_known)
    said = finding(all_known, run, steps, found)
    others = more(all_known, run, steps, found, faults)
    body = [
        f'<p class="run">{escape(_about(all_known))}</p>',
        f'<h{level} class="finding">{escape(said)}</h{level}>',
        f'<p class="say">{escape(others)}</p>' if others else "",
        sections.tiles(all_known),
        _bar(number),
        *_charts(all_known, level + 1),
    ]
    data: dict[str, Any] = {}
    if all_known.parameters is not None:
        body.append(_heat(all_known, found, faults, level + 1, data))
    body += _tables(all_known, steps, found, faults, level + 1)
    shown = _shown_groups(all_known)
    data["columns"] = _packed(columns_of(all_known, shown))
    data["noun"] = {"step": ["step", "steps"], "entry": ["entry", "entries"]}[all_known.noun]
    data["per"] = per_bucket(len(all_known))
    data["groups"] = {f"group{at}": all_known.groups[at].name for at in shown}
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    body.append(f'<script type="application/json" class="data">{text}</script>')
    html = f'<article id="run{number}">{"".join(body)}</article>'
    return Article(run.name, said, html)


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
    if isinstance(policy := run.about.get("policy"), str):
        said.append(policy)
    return " \N{MIDDLE DOT} ".join(said)


def _bar(number: int) -> str:
    step, reading = f"step{number}", f"reading{number}"
    return (
        f'<div class="bar"><label for="{step}">Step</label>'
        f'<input id="{step}" class="step" type="range" min="0" value="0">'
        f'<output id="{reading}" class="reading" for="{step}">Hover, or use the arrow keys, for the '
        'numbers of a step; drag to zoom.</output><span class="range">all steps</span>'
        '<span class="buttons"><button class="in" aria-label="Zoom in">+</button>'
        '<button class="out" aria-label="Zoom out">\N{MINUS SIGN}</button>'
        '<button class="all">All steps</button></span></div>'
    )


def _charts(run: Known, level: int) -> list[str]:
    norms, losses = run.usable, run.loss[np.isfinite(run.loss)]
    cross = '<span class="bad">\N{MULTIPLICATION SIGN}</span>'
    notes = ["Log scale."]
    if run.noun != "step":
        notes.append(f"The log does not count steps: here are {run.axis}.")
    if run.skipped.any():
        notes.append(f"{cross} marks a skipped step.")
    elif run.nonfinite.any():
        notes.append(f"{cross} marks a norm that is not finite.")
    size = per_bucket(len(run))
    if size > 1:
        notes.append(f"Line: the median of each {size:,} steps; band: from lowest to highest.")
    if (norms == 0).any():
        notes.append(f"{counted(int((norms == 0).sum()), 'norm')} of 0 cannot be drawn.")
    has_groups = len(run.groups) > 1
    told = f"Line chart of the {run.norms_are} by step"
    if len(norms):
        told += f", median {number(float(np.median(norms)))}, largest {number(float(norms.max()))}"
    title = run.norms_are[:1].upper() + run.norms_are[1:]
    made = [
        sections.section(
            title,
            level,
            sections.chart(
                "lines",
                told,
                series="norm" if has_groups else "norm,limit",
                scale="log",
                height=250,
                marks="steps",
                peaks="yes",
            ),
            " ".join(notes),
        )
    ]
    if len(losses):
        note = f"{cross} marks a loss that is not finite." if run.lost.any() else ""
        told = f"Line chart of the loss by step, from {number(float(losses[0]))} to {number(float(losses[-1]))}"
        box = sections.chart("lines", told, series="loss", scale="linear", height=130, marks="loss")
        made.append(sections.section("Loss", level, box, note))
    if run.tells_clipping and len(run) > 1:
        told = f"Line chart of the share of steps clipped, {share(float(run.clipped.mean()))} of all"
        box = sections.chart("lines", told, series="share", scale="share", height=110)
        width = window(len(run))
        made.append(
            sections.section(
                "Share of steps clipped", level, box, f"Moving share over {counted(width)}."
            )
        )
    if has_groups:
        shown = _shown_groups(run)
        keys = [key for at in shown for key in (f"group{at}", f"group{at}_limit")]
        box = sections.chart(
            "lines",
            "Line chart of the norm of each group by step, with its limit",
            series=",".join(keys),
            scale="log",
            height=250,
        )
        few = f"The {len(shown)} of {len(run.groups)} groups with the largest norms. " if len(shown) < len(run.groups) else ""
        made.append(sections.section("Norm by group", level, box, f"{few}Dashed: the limit of each."))
    return made


def _shown_groups(run: Known) -> list[int]:
    if len(run.groups) < 2:  # noqa: PLR2004
        return []
    largest = [float(np.nanmax(np.where(np.isfinite(g.norm), g.norm, 0))) for g in run.groups]
    return sorted(sorted(range(len(largest)), key=lambda at: -largest[at])[:_GROUPS])


def _heat(
    run: Known, found: Blame | None, faults: Faults, level: int, data: dict[str, Any]
) -> str:
    """Return the part of the heat map, and put its data among the others."""
    assert run.parameters is not None
    rows = rows_of(run.parameters.names)
    short = short_names(rows.names)
    heat = heat_of(run.parameters, rows, int(run.step[0]), int(run.step[-1]))
    of_row = np.searchsorted(rows.starts, np.arange(len(run.parameters.names)), side="right") - 1
    layers = layers_of(run.parameters.names)
    firsts = [int(np.argmax(layers.of == at)) for at in range(len(layers.names))]
    high, low = heat.codes >> 8, heat.codes & 255
    data["heat"] = {
        "rows": len(rows.names),
        "columns": heat.codes.shape[1],
        "low": heat.low,
        "unit": heat.unit,
        "perColumn": heat.per_column,
        "codes": _deflated(np.concatenate([high, low]).astype(np.uint8).tobytes()),
        "names": short,
        "ticks": [
            [int(of_row[first]), tick]
            for first, tick in zip(firsts, layers.ticks, strict=True)
            if tick
        ],
        "hot": _hot(found, of_row),
        "bad": sorted({(step, int(of_row[at])) for step, at in faults.points})[:_POINTS],
    }
    height = min(_HIGHEST, max(_LOWEST, _ROW_HEIGHT * len(rows.names) + 26))
    told = "Heat map of the norms by step"
    if found is not None:
        told += f"; {found.layers.names[found.layer]} has the most; the table below has the numbers"
    each = f"the largest of each {heat.per_column:,.0f} steps" if heat.per_column >= 2 else "by step"  # noqa: PLR2004
    note = (
        f"Each row is a {rows.are}, in the model's order; {each}. "
        '<span class="versus">Compared with '
        '<select class="compared" aria-label="Compared with">'
        '<option value="both">its own median, and the others at that step</option>'
        '<option value="own">its own median</option></select></span>'
    )
    key = (
        '<p class="key"><span>0.1 \N{MULTIPLICATION SIGN}</span><canvas class="scale" width="180" '
        'height="1" role="img" aria-label="Colours: blue is a tenth of the usual norm, pale the '
        'usual one, orange ten times and dark a hundred times that"></canvas>'
        "<span>100 \N{MULTIPLICATION SIGN} usual</span>"
    )
    key += '<span class="bad">\N{BLACK CIRCLE} not finite</span></p>' if faults.points else "</p>"
    title = "Which layer explodes" if len(layers.names) > 1 else "The norms of parameters"
    return sections.section(
        title, level, sections.chart("heat", told, height=height) + key, note
    )


def _hot(found: Blame | None, of_row: Any) -> list[int]:
    """Return the rows to name: by share, where that is above the usual."""
    if found is None:
        return []
    order = np.argsort(-found.of_parameters, kind="stable")[:_HOT]
    floor = 3 * float(np.median(found.of_parameters))
    hot = [
        int(of_row[at])
        for at in order
        if found.of_parameters[at] > floor
        and (not found.steps or found.of_parameters[at] > found.usual_of_parameters[at])
    ]
    return sorted(set(hot))


def _tables(
    run: Known, steps: Outstanding, found: Blame | None, faults: Faults, level: int
) -> list[str]:
    parts, pair = [], []
    names = run.parameters.names if run.parameters is not None else []
    short = short_names(names)
    if run.parameters is not None and found is not None:
        stand_out = "Clipped" if steps.are_clipped else "Spikes"
        heads = [stand_out if found.steps else "Share", *["Others"] * bool(found.steps and found.others)]
        note = "Shares of the squared norm: the mean over " + (
            f"{'the clipped steps' if steps.are_clipped else 'the spikes'}"
            f"{', and over the others' if len(heads) > 1 else ''}."
            if found.steps
            else "all steps."
        )
        body = sections.hottest(run, found, heads, short)
        count = min(10, len(names))
        title = f"The hottest {_NUMBERS[count]}" if count > 1 else "The parameter"
        pair.append(sections.section(title, level, body, note))
    if len(run.usable) and (drawn := sections.distribution(run)):
        pair.append(sections.section("Distribution of the norm", level, drawn, "Log scale."))
    if pair:
        parts.append(f'<div class="two">{"".join(pair)}</div>')
    rows, which = happenings(run, faults, dict(zip(names, short, strict=True)))
    if rows:
        note = f"{which[:1].upper()}{which[1:]}. " if which else ""
        note += "A step leads to its place in the charts."
        parts.append(sections.section("Events", level, sections.events(rows), note))
    advice = _advice(run)
    note = "What <code>gradclip suggest</code> says of these norms."
    parts.append(sections.section("A limit for the next run", level, sections.advice(advice), note))
    parts.append(sections.numbers(run))
    return parts


def _advice(run: Known) -> Advice:
    if run.log is not None:
        return advise(run.log)
    limits = run.limit[np.isfinite(run.limit)]
    limit = float(limits[0]) if len(limits) and limits.min() == limits.max() > 0 else None
    return suggest(
        np.where(run.norm >= 0, run.norm, np.nan),
        steps=run.step,
        losses=run.loss,
        rates=run.rate,
        limit=limit if len(run.groups) < 2 else None,  # noqa: PLR2004
    )


def _packed(columns: dict[str, Any]) -> dict[str, Any]:
    """Return columns as text, each with its type."""
    return {
        name: {"type": values.dtype.str[1:], "text": _deflated(_little(values).tobytes())}
        for name, values in columns.items()
    }


def _little(values: Any) -> Any:
    return values.astype(values.dtype.newbyteorder("<"))


def _deflated(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode("ascii")
