"""Options of the commands that read a log: which column is which, where that is not found."""

from typing import Annotated

import typer

__all__ = ["LossKey", "NormKey", "StepKey"]

NormKey = Annotated[
    str | None, typer.Option(help="The column of the gradient norms, if it is not found.")
]
StepKey = Annotated[str | None, typer.Option(help="The column of the steps.")]
LossKey = Annotated[str | None, typer.Option(help="The column of the losses.")]
