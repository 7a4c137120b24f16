"""The commands by name; each has a file of its own, which imports torch only when it runs."""

from typing import Annotated

import typer

from gradclip import __version__
from gradclip.cli.demo import demo
from gradclip.cli.run import listed_run
from gradclip.cli.suggest import EXAMPLES, suggest

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command("run")(listed_run)
app.command(epilog=EXAMPLES)(suggest)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gradclip {__version__}")
        raise typer.Exit


@app.callback()
def _gradclip(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Gradient clipping for PyTorch that is right, fast, and shows what it did."""
