"""The charts of lines: the norm with its limit, the loss, the share clipped, the groups."""

from gradclip.diagnostics.arrays import np
from gradclip.diagnostics.known import Group, Known
from gradclip.report.html import chart, section
from gradclip.report.series import per_bucket, window
from gradclip.report.words import begun, counted, number, share

__all__ = ["line_charts", "shown_groups"]

_GROUPS = 6
"""Groups that are drawn; a chart of more cannot be read."""
_CROSS = '<span class="bad">\N{MULTIPLICATION SIGN}</span>'


def line_charts(run: Known, level: int) -> list[str]:
    """Return the parts of the charts, of what is known.

    Args:
        run: The run.
        level: Of their headings.
    """
    parts = [section(begun(run.norms_are), level, _norms(run), " ".join(_notes(run)))]
    losses = run.loss[np.isfinite(run.loss)]
    if len(losses):
        first, last = (number(float(losses[at])) for at in (0, -1))
        told = f"Line chart of the loss by step, from {first} to {last}"
        box = chart("lines", told, series="loss", scale="linear", height=130, marks="loss")
        note = f"{_CROSS} marks a loss that is not finite." if run.lost.any() else ""
        parts.append(section("Loss", level, box, note))
    if run.tells_clipping and len(run) > 1:
        of_all = share(float(run.clipped.mean()))
        told = f"Line chart of the share of steps clipped, {of_all} of all"
        box = chart("lines", told, series="share", scale="share", height=110)
        note = f"Moving share over {counted(window(len(run)))}."
        parts.append(section("Share of steps clipped", level, box, note))
    if shown := shown_groups(run):
        keys = ",".join(f"{key},{key}_limit" for key in shown)
        told = "Line chart of the norm of each group by step, with its limit"
        box = chart("lines", told, series=keys, scale="log", height=250)
        some = f"The {len(shown)} of {len(run.groups)} groups with the largest norms. "
        note = (some if len(shown) < len(run.groups) else "") + "Dashed: the limit of each."
        parts.append(section("Norm by group", level, box, note))
    return parts


def shown_groups(run: Known) -> dict[str, Group]:
    """Return the groups that are drawn, those with the largest norms; none of a single one."""
    if len(run.groups) == 1:
        return {}
    largest = [float(np.where(np.isfinite(g.norm), g.norm, 0).max()) for g in run.groups]
    shown = sorted(sorted(range(len(largest)), key=lambda at: -largest[at])[:_GROUPS])
    return {f"group{place}": run.groups[at] for place, at in enumerate(shown)}


def _norms(run: Known) -> str:
    told = f"Line chart of the {run.norms_are} by step"
    if len(run.usable):
        middle, largest = float(np.median(run.usable)), float(run.usable.max())
        told += f", median {number(middle)}, largest {number(largest)}"
    drawn = "norm" if len(run.groups) > 1 else "norm,limit"
    return chart("lines", told, series=drawn, scale="log", height=250, marks="steps", peaks="yes")


def _notes(run: Known) -> list[str]:
    notes, size = ["Log scale."], per_bucket(len(run))
    if run.noun != "step":
        notes.append(f"The log does not count steps: here are {run.axis}.")
    if run.skipped.any():
        notes.append(f"{_CROSS} marks a skipped step.")
    elif run.nonfinite.any():
        notes.append(f"{_CROSS} marks a norm that is not finite.")
    if size > 1:
        notes.append(f"Line: the median of each {size:,} steps; band: from lowest to highest.")
    return notes
