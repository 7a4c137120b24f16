"""``gradclip plot``: the figure of a run."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradclip.cli.columns import MOST_RUNS, Files, LossKey, NormKey, StepKey
from gradclip.errors import ArgumentValueError

if TYPE_CHECKING:
    from gradclip.diagnostics.runs import Run

__all__ = ["EXAMPLES", "plot"]

EXAMPLES = """Examples:

gradclip plot runs/1

gradclip plot runs/1 runs/2 -o both.png

gradclip plot runs/checkpoint-500/trainer_state.json -o norms.svg
"""


def plot(
    files: Files,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The figure: SVG or PNG, by the name.")
    ] = Path("gradclip.svg"),
    norm_key: NormKey = None,
    step_key: StepKey = None,
    loss_key: LossKey = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Say what is in the figure as one JSON object.")
    ] = False,
) -> None:
    """Draw the gradient norms of a run, what was clipped, and its loss.

    It takes records of gradclip, and logs of others as `gradclip suggest` does. Several runs are
    drawn one below the other. The exit code is 0 where there is a figure, and 2 where a file cannot
    be read, or the figure not written.
    """
    if output.suffix.lower() not in (".svg", ".png"):
        raise ArgumentValueError(
            f"{output} is neither SVG nor PNG: give the figure a name that ends in .svg or .png."
        )
    from gradclip.diagnostics.figure import figure_of_runs, save_figure  # noqa: PLC0415 - numpy
    from gradclip.diagnostics.runs import read_runs  # noqa: PLC0415

    runs = [
        run
        for file in files
        for run in read_runs(file, norm_key=norm_key, step_key=step_key, loss_key=loss_key)
    ]
    drawn = [run for run in runs if run.has_norms][-MOST_RUNS:] or runs[:1]  # which is refused
    if len(drawn) < len(runs):
        typer.echo(
            f"{len(drawn)} of {len(runs)} runs are drawn: the last {MOST_RUNS} with a finite norm",
            err=True,
        )
    runs = drawn
    figure = figure_of_runs(runs)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, output)
    except OSError as error:
        raise ArgumentValueError(
            f"{output} cannot be written: {error.strerror or error}. Name another file with -o."
        ) from None
    if as_json:
        said = {"figure": str(output), "runs": [_as_data(run) for run in runs]}
        typer.echo(json.dumps(said, indent=2, allow_nan=False))
        return
    for run in runs:
        typer.echo(f"{run.name}: {run.finding}{_averaged(run)}")
    typer.echo(f"figure  {output}")


def _averaged(run: "Run") -> str:
    """Say of how many losses the one that is told is the mean."""
    from gradclip.diagnostics.summary import FINAL_STEPS, summarise  # noqa: PLC0415

    count = min(FINAL_STEPS, len(run.steps.measured("loss")))
    if count <= 1 or summarise(run.steps).diverged_at is not None:
        return ""
    return f" (median of the last {count} {run.counted})"


def _as_data(run: "Run") -> dict[str, Any]:
    from gradclip.diagnostics import summarise  # noqa: PLC0415

    summary = summarise(run.steps)
    return {
        "name": run.name,
        "finding": run.finding,
        "counted": run.counted,
        "steps": summary.steps,
        "clipped": summary.clipped,
        "nonfinite": summary.nonfinite,
        "threshold": _number(summary.threshold),
        "thresholds": {name: _number(each) for name, each in summary.thresholds.items()},
        "loss": _number(summary.final_loss),
        "diverged_at": summary.diverged_at,
        "p99": _number(summary.norm_p99),
        "max": _number(summary.norm_max),
    }


def _number(value: float | None) -> float | None:
    """Return a number that JSON has, or None."""
    return None if value is None or not math.isfinite(value) else value
