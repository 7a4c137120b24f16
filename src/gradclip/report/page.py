"""The whole file: its style, its script and its runs, which need nothing else."""

import base64
from collections.abc import Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from gradclip import __version__
from gradclip.diagnostics.runs import Run
from gradclip.errors import ArgumentValueError
from gradclip.report.article import Article, article
from gradclip.report.comparison import comparison
from gradclip.whole_file import write_whole

__all__ = ["write_report"]

_SCRIPTS = (
    "format.js",
    "data.js",
    "view.js",
    "frame.js",
    "peaks.js",
    "line_chart.js",
    "palette.js",
    "heat_map.js",
    "reading.js",
    "controls.js",
    "start.js",
)
"""In the order in which they build on each other."""


def write_report(runs: Sequence[Run], path: str | Path) -> list[str]:
    """Write the report of some runs; one that is there is kept until the new one is whole.

    Returns:
        The finding of each run, in a sentence, or two where the loss was lost.

    Raises:
        ArgumentValueError: GC010, there is no run.
        OSError: It cannot be written.
    """
    if not runs:
        raise ArgumentValueError("a report needs a run.")
    articles = [article(run, at, 1 if len(runs) == 1 else 2) for at, run in enumerate(runs, 1)]
    write_whole(Path(path), _page(articles))
    return [each.finding for each in articles]


def _page(articles: Sequence[Article]) -> str:
    script = '"use strict";\n(() => {\n' + "\n".join(map(_part, _SCRIPTS)) + "})();\n"
    style = _part("page.css")
    title = articles[0].name if len(articles) == 1 else f"{len(articles)} runs"
    return Template(_part("page.html")).substitute(
        title=escape(title),
        version=escape(__version__),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        contents=_contents(articles) if len(articles) > 1 else "",
        articles="".join(each.html for each in articles),
    )


def _part(name: str) -> str:
    return (files("gradclip.report") / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return what the browser is told of a text, so that it runs no other one."""
    return "sha256-" + base64.b64encode(sha256(text.encode()).digest()).decode("ascii")


def _contents(articles: Sequence[Article]) -> str:
    items = "".join(
        f'<li><a href="#run{at}">{escape(each.name)}</a> {escape(each.finding)}</li>'
        for at, each in enumerate(articles, 1)
    )
    compared = comparison([each.row for each in articles])
    return f'<h1>{len(articles)} runs</h1>{compared}<nav aria-label="Runs"><ol>{items}</ol></nav>'
