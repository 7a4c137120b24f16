"""The commands by name; each has a file of its own, which imports torch only when it runs."""

from typing import Annotated

import typer

from gradclip import __version__
from gradclip.cli import demo, explain, plot, report, run, suggest

__all__ = ["app"]

_EXAMPLES = """Examples:

gradclip demo

gradclip run train.py --lr 3e-4

gradclip suggest runs/checkpoint-500/trainer_state.json

gradclip report runs/1

gradclip plot runs/1 -o run.png

gradclip explain GC201

Exit codes: 0 done, 1 no answer, 2 a mistake in what was asked for.
"""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # joins the lines of a docstring
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=demo.EXAMPLES)(demo.demo)
app.command("run")(run.listed_run)
app.command(epilog=suggest.EXAMPLES)(suggest.suggest)
app.command(epilog=report.EXAMPLES)(report.report)
app.command(epilog=plot.EXAMPLES)(plot.plot)
app.command("explain")(explain.listed_explain)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gradclip {__version__}")
        raise typer.Exit


@app.callback(epilog=_EXAMPLES)
def _gradclip(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Gradient clipping for PyTorch that is right, fast, and shows what it did."""
