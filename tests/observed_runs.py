"""Runs scripts twice, with ``python`` and with ``gradclip run``, to compare what comes of it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from patience import seconds

SCRIPTS = Path(__file__).parent / "scripts_to_observe"
COMMAND = "import sys; from gradclip.cli import main; sys.exit(main())"
FINDING = re.compile(
    r"gradclip run: (?P<steps>\d+) steps of (?P<optimizer>.+)\n"
    r"  layer   (?P<layer>.+)\n"
    r"  share   (?P<share>.+)\n"
    r"  limit   (?P<limit>.+)\n"
    r"  events  (?P<events>.+)\n"
)
WATCHED = re.compile(
    r"gradclip run: .*\n(?:  (?:steps|layer|share|limit|events|record|more) .*\n)*"
)


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def started(command, folder, **env):
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **env},
    )


def ended(process):
    out, err = process.communicate(timeout=seconds())
    return Ended(process.returncode, out, err)


def both(arguments, folder):
    """Run a script both ways, in two folders; return how each ended."""
    alone = started(arguments, folder / "alone")
    watched = started(["-c", COMMAND, "run", *arguments], folder / "watched")
    return ended(alone), ended(watched)
