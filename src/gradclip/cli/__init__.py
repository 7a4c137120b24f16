"""The ``gradclip`` command. Its help and its version need no torch."""

import sys
from typing import NoReturn

from gradclip.errors import GradClipError

__all__ = ["main"]


def main() -> None:
    """Run the command line; errors of ours are printed without a traceback, and exit with 2."""
    if sys.argv[1:2] == ["run"]:
        _run_script()
        return
    if sys.argv[1:2] == ["explain"]:
        _explain()
        return
    try:
        from gradclip.cli.app import app  # noqa: PLC0415 - typer and rich are an extra
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("typer", "rich"):
            raise
        sys.exit(
            f"The gradclip command needs {missing}, which is not installed.\n"
            '  pip install "gradclip[cli]"    # or "gradclip[all]" for the demo as well'
        )
    try:
        app()
    except GradClipError as error:
        _say(error)


def _run_script() -> None:
    """Run a script; its errors are not ours, even where they are of our classes."""
    from gradclip.cli.run import prepare  # noqa: PLC0415

    try:
        run = prepare(sys.argv[2:])
    except GradClipError as error:
        _say(error)
    run()


def _explain() -> None:
    from gradclip.cli.explain import explain  # noqa: PLC0415

    try:
        explain(sys.argv[2:])
    except GradClipError as error:
        _say(error)


def _say(error: GradClipError) -> NoReturn:
    message = str(error)
    # An error in a file comes with its picture of the file, drawn around the headline.
    drawn = message.startswith("error[")
    sys.stderr.write(message + "\n" if drawn else f"error[{error.code}]: {message}\n")
    sys.exit(2)
