"""Runs the examples, as their docstrings say."""

import os
import subprocess
import sys
from pathlib import Path

import gradclip
from patience import seconds

EXAMPLES = Path(__file__).parents[1] / "examples"
SOURCE = Path(gradclip.__file__).parents[1]


def run(name, folder):
    return execute([sys.executable, "-W", "error", str(EXAMPLES / name)], folder)


def launched(processes, command, folder):
    """Run an example on several processes, as its docstring says."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    name, *options = command.split()
    return execute(
        [*launcher, f"--nproc_per_node={processes}", str(EXAMPLES / name), *options], folder
    )


def execute(command, folder):
    result = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds(),
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
