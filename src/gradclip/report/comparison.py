"""The table on top of several runs: did it help?"""

from collections.abc import Sequence
from html import escape

from gradclip.diagnostics.arrays import np
from gradclip.diagnostics.known import Known
from gradclip.diagnostics.runs import Run
from gradclip.diagnostics.summary import FINAL_STEPS, summarise
from gradclip.report.html import table
from gradclip.report.limits import limit_of
from gradclip.report.words import number, share

__all__ = ["comparison", "row_of"]

_POLICIES = 2
"""Policies that are named; of more, how many they are."""
_HEADS = ("Run", "Limit", "Steps", "Clipped", "Skipped", "Loss at the end", "Median", "Largest")


def comparison(rows: Sequence[Sequence[str]]) -> str:
    """Return the table of some runs, each a row of ``row_of``, with a note of what it says."""
    note = (
        f"Loss at the end: the median of the last {FINAL_STEPS} that are known, as "
        "<code>gradclip plot</code> has it. Median, largest: of the gradient norm."
    )
    numbers = range(2, len(_HEADS))
    return f'{table("The runs", _HEADS, rows, numbers)}<p class="note">{note}</p>'


def row_of(run: Run, of: Known, place: int) -> Sequence[str]:
    """Return the cells of a run.

    Args:
        run: The run.
        of: What is known of it.
        place: Which of the file.
    """
    clipped, norms = int(of.clipped.sum()), of.usable
    middle, largest = (float(np.quantile(norms, q)) if len(norms) else np.nan for q in (0.5, 1))
    return (
        f'<a href="#run{place}">{escape(run.name)}</a>',
        _limits(of),
        f"{len(of):,}",
        f"{clipped:,} ({share(clipped / len(of))})" if of.tells_clipping else of.unclipped,
        f"{int(of.skipped.sum()):,}" if of.log is None else "not known",
        escape(summarise(run.steps).ending),
        number(middle),
        number(largest),
    )


def _limits(run: Known) -> str:
    """Return the policies of a record, or else the limits that its steps have, as HTML."""
    policies = run.about.get("policies")
    if not isinstance(policies, dict) or not policies:
        limit, _ = limit_of(run)
        if limit == "clipping":
            return run.unclipped
        return limit.removeprefix("the ").removeprefix("limit of ").removeprefix("limits of ")
    if len(policies) > _POLICIES:
        return f"{len(policies)} limits by group"
    named = [text if name == "*" else f"{name}: {text}" for name, text in policies.items()]
    later = list(run.policies.values())[-1:]
    return f"<code>{escape(', then '.join([', '.join(named), *later]))}</code>"
