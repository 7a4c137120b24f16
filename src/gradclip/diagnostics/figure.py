"""The picture of a run: what the gradients did above, what the loss did below."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradclip.diagnostics.record import StepRecord
from gradclip.diagnostics.summary import (
    FINAL_STEPS,
    compact,
    decimal,
    finding,
    summarise,
)
from gradclip.errors import ArgumentValueError, MissingDependencyError
from gradclip.record.columns import Steps
from gradclip.whole_file import replacing

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

    from gradclip.diagnostics.runs import Run

__all__ = ["clipping_figure", "figure_of_runs", "save_figure"]

# Okabe and Ito's colours: told apart with every kind of colour vision.
_CLIPPED = "#0072B2"
_UNCLIPPED = "#D55E00"
_GROUPS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#333333")
_INK = "#333333"
_FAINT = "#8a8a8a"
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same picture everywhere
    "font.size": 9,
    "text.color": _INK,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "text.usetex": False,  # with it, and without the next, `_literal` would not hold
    "text.parse_math": True,
    "svg.hashsalt": "gradclip",  # element ids that do not change from one call to the next
}
_DASHED: dict[str, Any] = {"linewidth": 0.9, "linestyle": (0, (5, 3))}
_RASTER_FROM = 5000
"""From this many steps on, curves are an image inside the SVG, which keeps it small."""
_COLUMNS = 2000
"""No panel is wider, in dots that an eye tells apart."""
_SPIKE = 3.0
"""Losses this many times further up than 98 % of them leave the panel by its top."""
_LARGEST = 1e200
"""What is larger, or closer to zero than its inverse, is drawn there: an axis needs some room."""
_WIDTH = 8.0
"""Of the figure, in inches."""
_LINE_HEIGHT = 0.09
"""The height of a label, in heights of a panel."""


def clipping_figure(
    clipped: Sequence[StepRecord],
    unclipped: Sequence[StepRecord] | None = None,
    title: str | None = None,
) -> "Figure":
    """Draw a run over its steps: the gradient norm and its threshold, and the loss.

    Args:
        clipped: The run.
        unclipped: The same run without clipping, to compare with.
        title: What the picture shows; the finding, by default.

    Returns:
        A figure that belongs to no window and no global state; `save_figure` writes it.

    Raises:
        ArgumentValueError: There is no step, or no step has a norm.
        MissingDependencyError: matplotlib is not installed.
    """
    new_figure, styled = _matplotlib()
    text = title or finding(clipped, unclipped)
    runs = _as_steps(clipped), None if unclipped is None else _as_steps(unclipped)
    _check(runs[0])
    with styled:
        figure = new_figure(figsize=(_WIDTH, _height(*runs)), layout="constrained")
        _draw(figure, *runs, _begun(text), "optimizer step", "gradient norm before clipping")
    return figure


def figure_of_runs(runs: "Sequence[Run]") -> "Figure":
    """Draw several runs, one below the other, each in the form of ``clipping_figure``.

    Raises:
        ArgumentValueError: A run has no step, or none with a norm.
        MissingDependencyError: matplotlib is not installed.
    """
    new_figure, styled = _matplotlib()
    for run in runs:
        _check(run.steps)
    heights = [_height(run.steps) for run in runs]
    with styled:
        figure = new_figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
        parts: Iterable[FigureBase] = [figure]
        if len(runs) > 1:
            parts = figure.subfigures(len(runs), squeeze=False, height_ratios=heights)[:, 0]
        for part, run in zip(parts, runs, strict=True):
            title = f"{run.name}: {run.finding}" if len(runs) > 1 else _begun(run.finding)
            _draw(part, run.steps, None, title, run.axis, run.norms)
    return figure


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure as SVG or PNG, by the suffix; the same figure gives the same bytes.

    Args:
        figure: What `clipping_figure` made.
        path: The file to write. One that is there is kept as it is until the new one is whole.
    """
    _, styled = _matplotlib()
    kind = Path(path).suffix[1:].lower()
    undated = {"Date": None} if kind == "svg" else None
    with styled, replacing(Path(path)) as file:
        figure.savefig(file, format=kind or None, metadata=undated, dpi=160)


def _as_steps(records: Sequence[StepRecord]) -> Steps:
    return records if isinstance(records, Steps) else Steps.of(records)


def _check(run: Steps) -> None:
    """Refuse a run of which there is nothing to draw."""
    if not any(map(math.isfinite, run.column("norm_pre"))):
        raise ArgumentValueError("no step of the run has a finite gradient norm to draw.")


def _height(*runs: Steps | None) -> float:
    return 5.2 if any(run is not None and run.measured("loss") for run in runs) else 3.2


def _draw(
    figure: "FigureBase",
    clipped: Steps,
    unclipped: Steps | None,
    title: str,
    axis: str,
    norms: str,
) -> None:
    """Draw the norms, and below them the losses, where there are any."""
    if any(run is not None and run.measured("loss") for run in (clipped, unclipped)):
        above, below = figure.subplots(2, sharex=True, height_ratios=(1.2, 1))
        _draw_losses(below, clipped, unclipped)
    else:
        above = below = figure.subplots()
    _draw_norms(above, clipped, unclipped, norms)
    figure.suptitle(_literal(title), x=0.012, ha="left", wrap=True)
    first, last = clipped.step[0], clipped.step[-1]
    below.set_xlim(first, max(last, first + 1))
    below.set_xlabel(axis)


def _draw_norms(axes: "Axes", clipped: Steps, unclipped: Steps | None, title: str) -> None:
    summary = summarise(clipped)
    axes.set_yscale("log", nonpositive="mask")
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: compact(value))
    axes.set_title(title if unclipped is None else f"{title} (pale: of the unclipped run)")
    if unclipped is not None:
        _curve(axes, *_of(unclipped, "norm_pre"), color=_UNCLIPPED, linewidth=0.8, alpha=0.5)
    if summary.thresholds:
        _draw_groups(axes, clipped, summary.thresholds)
    else:
        _curve(axes, *_of(clipped, "norm_pre"), color=_CLIPPED, linewidth=0.9)
        if 0 < summary.threshold < math.inf:
            _curve(axes, *_of(clipped, "threshold"), color=_INK, **_DASHED)
            label = f"threshold {decimal(summary.threshold)}"
            _label(axes, _drawable(summary.threshold), label, _INK, in_data=True)

    # The marks have a strip of their own, below every curve; crosses are at the very top.
    if math.isinf(axes.dataLim.minposy):  # nothing but zeros, which a log scale cannot place
        axes.update_datalim([(0, 1)], updatex=False)
    low, high = axes.get_ylim()
    axes.set_yticks(_log_ticks(low, high))
    axes.set_ylim(low / (math.sqrt(high) / math.sqrt(low)) ** 0.24, high)
    in_panel_heights: dict[str, Any] = {
        "transform": axes.get_xaxis_transform(),
        "rasterized": len(clipped) >= _RASTER_FROM,
    }
    if summary.clipped is not None:
        ticks = _one_a_column(list(compress(clipped.step, clipped.column("clipped"))))
        axes.vlines(ticks, 0, 0.05, color=_CLIPPED, linewidth=0.8, **in_panel_heights)
        _label(axes, 0.025, f"clipped {summary.clipped} of {summary.steps}", _CLIPPED)
    if summary.nonfinite:
        crosses = _one_a_column(list(compress(clipped.step, clipped.column("nonfinite"))))
        heights = [0.96] * len(crosses)
        axes.plot(crosses, heights, "x", color=_INK, markersize=5, **in_panel_heights)
        _label(axes, 0.96, f"non-finite {summary.nonfinite} of {summary.steps}", _INK)


def _draw_groups(axes: "Axes", run: Steps, thresholds: Mapping[str, float]) -> None:
    """Draw the norm of each name pattern, and its threshold in the same colour."""
    for (pattern, threshold), color in zip(thresholds.items(), _GROUPS, strict=False):
        limit = f"threshold {decimal(threshold)}" if math.isfinite(threshold) else "no threshold"
        label = _literal(f"{limit} of {pattern}")
        _curve(axes, *run.of_group(pattern, "norm_pre"), color=color, linewidth=0.9, label=label)
        _curve(axes, *run.of_group(pattern, "threshold"), color=color, **_DASHED)
    drawn, known = len(_GROUPS), len(thresholds)
    title = f"{drawn} of {known} patterns" if known > drawn else None
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, title=title)


def _draw_losses(axes: "Axes", clipped: Steps, unclipped: Steps | None) -> None:
    runs = [("loss" if unclipped is None else "clipped", clipped, _CLIPPED)]
    if unclipped is not None:
        runs.insert(0, ("unclipped", unclipped, _UNCLIPPED))
    for _, run, color in runs:
        _curve(axes, *_of(run, "loss"), color=color, linewidth=1.1)
    axes.set_title(f"loss (labelled with the median of the last {FINAL_STEPS})")
    points = [
        point for _, run, _ in runs for point in zip(run.column("loss"), run.step, strict=True)
    ]
    low, high = _limit_losses(axes, [point for point in points if math.isfinite(point[0])])

    labels, heights = [], []
    for name, run, color in runs:
        end = summarise(run)
        if end.final_loss is None:
            continue
        labels.append((f"{name} {end.ending}", color))
        if end.diverged_at is None:
            heights.append((_drawable(end.final_loss) - low) / (high - low))
        else:
            heights.append(1 - _LINE_HEIGHT)
            known = [
                point for point in zip(*_of(run, "loss"), strict=True) if math.isfinite(point[1])
            ]
            last: Any = zip(*known[-1:], strict=True) if known else ((), ())
            _curve(axes, *last, color=color, marker="x", markersize=6, clip_on=False)
    for (text, color), height in zip(labels, _apart(heights), strict=True):
        _label(axes, height, text, color)


def _limit_losses(axes: "Axes", points: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Keep a few huge losses from flattening the rest, and say how high they went."""
    if points:
        losses = sorted(_drawable(loss) for loss, _ in points)
        low, usual = losses[0], losses[math.ceil(0.98 * len(losses)) - 1]
        peak, step = max(points)
        if peak - low > _SPIKE * (usual - low) > 0:
            axes.set_ylim(low - 0.08 * (usual - low), usual + 0.12 * (usual - low))
            axes.annotate(
                f"up to {compact(peak)} at step {step}",
                xy=(step, 1),
                xytext=(6, 0),
                xycoords=axes.get_xaxis_transform(),
                textcoords="offset points",
                va="top",
                color=_FAINT,
            )
    return axes.get_ylim()


def _log_ticks(low: float, high: float) -> list[float]:
    """Choose powers of ten, or finer steps where the axis has too few of them."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    for steps in ((1,), (1, 2, 5), range(1, 10)):
        values = (step * 10.0**exponent for exponent in exponents for step in steps)
        ticks = [value for value in values if low <= value <= high]
        if len(ticks) > 1:
            return ticks[:: len(ticks) // 8 + 1]
    return [low, high]


def _apart(heights: list[float]) -> list[float]:
    """Move two labels that would overlap just far enough apart."""
    if len(heights) < 2 or abs(heights[0] - heights[1]) >= _LINE_HEIGHT:  # noqa: PLR2004
        return heights
    middle = (heights[0] + heights[1]) / 2
    half = math.copysign(_LINE_HEIGHT / 2, heights[0] - heights[1])
    return [middle + half, middle - half]


def _of(run: Steps, name: str) -> tuple[Sequence[int], Sequence[float]]:
    return run.step, run.column(name)


def _curve(axes: "Axes", steps: Sequence[int], values: Sequence[float], **style: Any) -> None:
    shown = _seen(values)
    drawn = [values[at] for at in shown]
    if len(drawn) == 1:  # no line goes through it
        style = {"marker": ".", **style}
    axes.plot(
        [steps[at] for at in shown],
        [_drawable(value) if math.isfinite(value) else math.nan for value in drawn],
        rasterized=len(steps) >= _RASTER_FROM,
        **style,
    )


def _seen(values: Sequence[float]) -> Sequence[int]:
    """Return which points of a curve can be seen: of many beside each other the outer ones."""
    count = len(values)
    size = count // _COLUMNS
    if size <= 4:  # noqa: PLR2004 - as many as are kept
        return range(count)
    seen: list[int] = []
    for start in range(0, count, size):
        column = range(start, min(start + size, count))
        known = [at for at in column if math.isfinite(values[at])] or [start]
        outer = min(known, key=values.__getitem__), max(known, key=values.__getitem__)
        seen += sorted({column[0], *outer, column[-1]})
    return seen


def _one_a_column(steps: list[int]) -> list[int]:
    """Leave out marks that would hide each other."""
    if len(steps) <= 2 * _COLUMNS:
        return steps
    first, width = min(steps), (max(steps) - min(steps)) / _COLUMNS
    return list({(step - first) // (width or 1): step for step in steps}.values())


def _label(axes: "Axes", height: float, text: str, color: str, *, in_data: bool = False) -> None:
    """Write a label to the right of a panel, at a height of the panel or of its data."""
    axes.annotate(
        text,
        xy=(1, height),
        xytext=(6, 0),
        xycoords=axes.get_yaxis_transform() if in_data else axes.transAxes,
        textcoords="offset points",
        va="center",
        color=color,
        annotation_clip=False,
    )


def _begun(text: str) -> str:
    """Begin a title with a capital letter."""
    return text[:1].upper() + text[1:]


def _literal(text: str) -> str:
    """Write a text so that matplotlib shows it as it is, and takes no part of it for mathematics.

    Without mathematics at all (``parse_math=False``), it would still measure what it wraps as such.
    """
    return text.replace("$", r"\$")


def _drawable(value: float) -> float:
    if value == 0:
        return value
    return math.copysign(min(max(abs(value), 1 / _LARGEST), _LARGEST), value)


def _matplotlib() -> "tuple[type[Figure], AbstractContextManager[None]]":
    try:
        from matplotlib import rc_context  # noqa: PLC0415 - only a figure needs it
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise MissingDependencyError(
            'a figure needs matplotlib, which is not installed.\n  pip install "gradclip[report]"'
        ) from error
    return Figure, rc_context(_STYLE)
