"""``gradclip report``: what a run did, as one HTML file."""

from pathlib import Path
from typing import Annotated

import typer

from gradclip.cli.columns import MOST_RUNS, Files, LossKey, NormKey, StepKey
from gradclip.errors import ArgumentValueError

__all__ = ["EXAMPLES", "report"]

EXAMPLES = """Examples:

gradclip report runs/1

gradclip report runs/1 runs/2 -o both.html

gradclip report runs/checkpoint-500/trainer_state.json -o norms.html
"""


def report(
    files: Files,
    output: Annotated[
        Path, typer.Option("--output", "-o", dir_okay=False, help="The HTML file.")
    ] = Path("report.html"),
    norm_key: NormKey = None,
    step_key: StepKey = None,
    loss_key: LossKey = None,
) -> None:
    """Show which layer explodes, what was clipped, and which limit would do, as one HTML file.

    It takes records of gradclip, and logs of others as `gradclip suggest` does. The file opens from
    the disk in a browser, and asks the network for nothing. The exit code is 0 where there is a
    report, and 2 where a file cannot be read, or the report not written.
    """
    from gradclip.diagnostics.runs import read_runs  # noqa: PLC0415 - numpy
    from gradclip.report import write_report  # noqa: PLC0415

    runs = [
        run
        for file in files
        for run in read_runs(file, norm_key=norm_key, step_key=step_key, loss_key=loss_key)
    ]
    if len(runs) > MOST_RUNS:
        typer.echo(f"{MOST_RUNS} of {len(runs)} runs are shown: the last", err=True)
        runs = runs[-MOST_RUNS:]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        findings = write_report(runs, output)
    except OSError as error:
        raise ArgumentValueError(
            f"{output} cannot be written: {error.strerror or error}. Name another file with -o."
        ) from None
    for run, finding in zip(runs, findings, strict=True):
        typer.echo(f"{run.name}: {finding}")
    typer.echo(f"report  {output}")
