"""The building blocks of the page: parts with a heading, boxes of charts, tables."""

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["chart", "section", "table"]


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
    """Return a table of cells that are HTML, which scrolls by itself where it is too wide.

    Args:
        label: What it is.
        heads: Of the columns.
        rows: The cells.
        numeric: The columns of numbers.
    """
    style = [' class="number"' if at in numeric else "" for at in range(len(heads))]

    def cells(row: Sequence[str]) -> str:
        return "".join(f"<td{of}>{cell}</td>" for cell, of in zip(row, style, strict=True))

    head = "".join(
        f'<th scope="col"{of}>{escape(name)}</th>' for name, of in zip(heads, style, strict=True)
    )
    body = "".join(f"<tr>{cells(row)}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
