"""The picture of a run: what the gradients did above, what the loss did below."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from gradclip.diagnostics.record import StepRecord
from gradclip.diagnostics.summary import (
    FINAL_STEPS,
    compact,
    decimal,
    finding,
    summarise,
)
from gradclip.errors import ArgumentValueError, MissingDependencyError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["clipping_figure", "save_figure"]

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
_SPIKE = 3.0
"""Losses this many times further up than 98 % of them leave the panel by its top."""
_LARGEST = 1e200
"""What is larger, or closer to zero than its inverse, is drawn there: an axis needs some room."""
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
    if not any(_finite(record.norm_pre) for record in clipped):
        raise ArgumentValueError("no step of the run has a finite gradient norm to draw.")
    with styled:
        figure = new_figure(figsize=(8, 5.2), layout="constrained")
        above, below = figure.subplots(2, sharex=True, height_ratios=(1.2, 1))
        _draw_norms(above, clipped, unclipped)
        _draw_losses(below, clipped, unclipped)
        title = _literal(text[:1].upper() + text[1:])
        figure.suptitle(title, x=0.012, ha="left", wrap=True)
        below.set_xlim(clipped[0].step, max(clipped[-1].step, clipped[0].step + 1))
        below.set_xlabel("optimizer step")
    return figure


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure as SVG or PNG, by the suffix; the same figure gives the same bytes.

    Args:
        figure: What `clipping_figure` made.
        path: The file to write.
    """
    _, styled = _matplotlib()
    undated = {"Date": None} if Path(path).suffix == ".svg" else None
    with styled:
        figure.savefig(path, metadata=undated, dpi=160)


def _draw_norms(
    axes: "Axes", clipped: Sequence[StepRecord], unclipped: Sequence[StepRecord] | None
) -> None:
    summary = summarise(clipped)
    axes.set_yscale("log", nonpositive="mask")
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: compact(value))
    if unclipped is None:
        axes.set_title("gradient norm before clipping")
    else:
        axes.set_title("gradient norm before clipping (pale: of the unclipped run)")
        _curve(axes, unclipped, "norm_pre", color=_UNCLIPPED, linewidth=0.8, alpha=0.5)
    if summary.thresholds:
        _draw_groups(axes, clipped, summary.thresholds)
    else:
        _curve(axes, clipped, "norm_pre", color=_CLIPPED, linewidth=0.9)
        if 0 < summary.threshold < math.inf:
            _curve(axes, clipped, "threshold", color=_INK, **_DASHED)
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
    ticks = [record.step for record in clipped if record.clipped]
    axes.vlines(ticks, 0, 0.05, color=_CLIPPED, linewidth=0.8, **in_panel_heights)
    _label(axes, 0.025, f"clipped {summary.clipped} of {summary.steps}", _CLIPPED)
    if summary.nonfinite:
        crosses = [record.step for record in clipped if record.nonfinite]
        heights = [0.96] * len(crosses)
        axes.plot(crosses, heights, "x", color=_INK, markersize=5, **in_panel_heights)
        _label(axes, 0.96, f"non-finite {summary.nonfinite} of {summary.steps}", _INK)


def _draw_groups(
    axes: "Axes", records: Sequence[StepRecord], thresholds: Mapping[str, float]
) -> None:
    """Draw the norm of each name pattern, and its threshold in the same colour."""
    for (pattern, threshold), color in zip(thresholds.items(), _GROUPS, strict=False):
        run = [
            StepRecord(step=record.step, norm_pre=group.norm_pre, threshold=group.threshold)
            for record in records
            if (group := record.groups.get(pattern)) is not None
        ]
        limit = f"threshold {decimal(threshold)}" if math.isfinite(threshold) else "no threshold"
        label = _literal(f"{limit} of {pattern}")
        _curve(axes, run, "norm_pre", color=color, linewidth=0.9, label=label)
        _curve(axes, run, "threshold", color=color, **_DASHED)
    drawn, known = len(_GROUPS), len(thresholds)
    title = f"{drawn} of {known} patterns" if known > drawn else None
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, title=title)


def _draw_losses(
    axes: "Axes", clipped: Sequence[StepRecord], unclipped: Sequence[StepRecord] | None
) -> None:
    runs = [("clipped", clipped, _CLIPPED)]
    if unclipped is not None:
        runs.insert(0, ("unclipped", unclipped, _UNCLIPPED))
    for _, run, color in runs:
        _curve(axes, run, "loss", color=color, linewidth=1.1)
    axes.set_title(f"loss (labelled with the mean of the last {FINAL_STEPS})")
    low, high = _limit_losses(axes, [record for _, run, _ in runs for record in run])

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
            last = [record for record in run if _finite(record.loss)][-1:]
            _curve(axes, last, "loss", color=color, marker="x", markersize=6, clip_on=False)
    for (text, color), height in zip(labels, _apart(heights), strict=True):
        _label(axes, height, text, color)


def _limit_losses(axes: "Axes", records: Sequence[StepRecord]) -> tuple[float, float]:
    """Keep a few huge losses from flattening the rest, and say how high they went."""
    points = [(record.loss, record.step) for record in records if _finite(record.loss)]
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


def _curve(axes: "Axes", records: Sequence[StepRecord], name: str, **style: Any) -> None:
    values = [getattr(record, name) for record in records]
    axes.plot(
        [record.step for record in records],
        [_drawable(value) if _finite(value) else math.nan for value in values],
        rasterized=len(records) >= _RASTER_FROM,
        **style,
    )


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


def _literal(text: str) -> str:
    """Write a text so that matplotlib shows it as it is, and takes no part of it for mathematics.

    Without mathematics at all (``parse_math=False``), it would still measure what it wraps as such.
    """
    return text.replace("$", r"\$")


def _drawable(value: float) -> float:
    if value == 0:
        return value
    return math.copysign(min(max(abs(value), 1 / _LARGEST), _LARGEST), value)


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _matplotlib() -> "tuple[type[Figure], AbstractContextManager[None]]":
    try:
        from matplotlib import rc_context  # noqa: PLC0415 - only a figure needs it
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise MissingDependencyError(
            'a figure needs matplotlib, which is not installed.\n  pip install "gradclip[report]"'
        ) from error
    return Figure, rc_context(_STYLE)
