"""Runs the examples, as their docstrings say."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState

import gradclip
from patience import seconds

EXAMPLES = Path(__file__).parents[1] / "examples"
SOURCE = Path(gradclip.__file__).parents[1]


def run(name, folder):
    """Run an example in this process, where every warning is an error; return what it wrote."""
    written = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [name]),
        contextlib.chdir(folder),
        contextlib.redirect_stdout(written),
        warnings.catch_warnings(action="error"),
        torch.random.fork_rng(),
    ):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return written.getvalue()


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
