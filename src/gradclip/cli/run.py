"""``gradclip run SCRIPT``: watch a training script that was not written for it.

It reads its arguments by itself, and needs nothing but gradclip: what is imported before a script
is not imported by the script, and may be another thing of the same name.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from gradclip.errors import ArgumentValueError

__all__ = ["HELP", "listed_run", "prepare"]

HELP = """\
Usage: gradclip run [OPTIONS] SCRIPT [ARGUMENTS]...
       gradclip run [OPTIONS] -m MODULE [ARGUMENTS]...

  Run a training script as python would, and see what its gradients do.

  Not a line of the script is changed, and it ends with the same weights, bit for bit. Its steps
  are recorded in a folder. At the end, also of a script that fails, five lines on stderr say which
  layer has most of the gradient norm, how many steps were clipped, which limit is in force and
  which is suggested, what happened, and where the record is.

Options (before the script; what comes after it is the script's):
  --out DIR    The folder of the record.  [default: gradclip-runs/1, or the next free number]
  --every N    Measure every N-th step.  [default: all in short runs, fewer in long ones]
  -m MODULE    Run a module, as python -m does.
  -h, --help   Show this message and exit.

Examples:
  gradclip run train.py --lr 3e-4
  gradclip run --out runs/a -m package.train
  torchrun --no-python --nproc-per-node 2 gradclip run train.py
  accelerate launch --no_python gradclip run train.py
"""


class _Wanted(NamedTuple):
    """What the command line asks for.

    Attributes:
        arguments: The script or the module, and what it gets.
        is_module: Whether it is a module.
        out: The folder, if it was given.
        every: Which steps to measure, if that was given.
    """

    arguments: list[str]
    is_module: bool
    out: Path | None
    every: int | None


def prepare(arguments: Sequence[str]) -> Callable[[], None]:
    """Make ready, and return what runs the script, and raises what the script raises.

    Args:
        arguments: Those of the command.

    Raises:
        ArgumentValueError: GC010, an option is wrong, or there is no script.
        RecordError: GC302, the folder cannot be written, or has a record already.
    """
    wanted = _read(arguments)
    if wanted is None:
        return _show_help
    from gradclip.observe.folder import make_folder  # noqa: PLC0415 - not for --help
    from gradclip.observe.script import run_script  # noqa: PLC0415
    from gradclip.observe.session import begin  # noqa: PLC0415

    about = {"script": wanted.arguments[0], "arguments": wanted.arguments[1:]}
    begin(make_folder(wanted.out), {**about, "every": wanted.every}, wanted.every)
    return partial(run_script, wanted.arguments, is_module=wanted.is_module)


def listed_run() -> None:
    """Run a training script as python would, and see what its gradients do."""
    # It is here for the list of commands: ``main`` calls ``prepare`` before that list is imported.


def _show_help() -> None:
    sys.stdout.write(HELP)


def _read(arguments: Sequence[str]) -> _Wanted | None:
    """Return what is asked for; None for help."""
    left, out, every = list(arguments), None, None
    while left and left[0].startswith("-"):
        option, equals, value = left.pop(0).partition("=")
        if option in ("-h", "--help"):
            return None
        if option not in ("--out", "--every", "-m"):
            raise _wrong(f"there is no option {option}")
        if not equals:
            if not left:
                raise _wrong(f"{option} needs a value")
            value = left.pop(0)
        if option == "-m":
            return _Wanted([value, *left], is_module=True, out=out, every=every)
        if option == "--out":
            out = Path(value)
        elif value.isdecimal() and int(value) > 0:
            every = int(value)
        else:
            raise _wrong(f"--every is {value!r}: expected a whole number from 1 on")
    if not left:
        raise _wrong("there is no script")
    return _Wanted(left, is_module=False, out=out, every=every)


def _wrong(what: str) -> ArgumentValueError:
    return ArgumentValueError(
        f"gradclip run: {what}. It is gradclip run [--out DIR] [--every N] SCRIPT [ARGUMENTS]..., "
        "and gradclip run --help has examples. Nothing was run."
    )
