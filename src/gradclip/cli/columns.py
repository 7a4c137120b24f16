"""What commands that read logs are given: files, and which column is which, where not found."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["MOST_RUNS", "Files", "LossKey", "NormKey", "StepKey"]

MOST_RUNS = 16
"""Runs of one figure or one report, which grows with each."""
Files = Annotated[
    list[Path],
    typer.Argument(
        help="Records, and logs: JSON, JSONL, CSV, TensorBoard events, text.",
        metavar="DIR_OR_FILE",
    ),
]

NormKey = Annotated[
    str | None, typer.Option(help="The column of the gradient norms, if it is not found.")
]
StepKey = Annotated[str | None, typer.Option(help="The column of the steps.")]
LossKey = Annotated[str | None, typer.Option(help="The column of the losses.")]
