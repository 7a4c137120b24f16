"""Runs the blocks of a page of the documentation, as a reader who pastes them would."""

import contextlib
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest
from accelerate.state import AcceleratorState, GradientState

from gradclip.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
_BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_EXECUTED = re.compile(r"<!-- executed -->\n```python\n(.*?)```", re.DOTALL)


def marked(page: Path) -> list[str]:
    """Return the blocks of a page that say they are whole programs."""
    return _EXECUTED.findall(page.read_text(encoding="utf-8"))


def run_program(code: str, folder: Path) -> None:
    with _reset(folder):
        exec(compile(code, "a block of the documentation", "exec"), {"__name__": "__main__"})


def run_page(page: Path, folder: Path) -> None:
    """Run all blocks of a page, one after another: Python in one program, and our commands."""
    names = {"__name__": "__main__"}
    with _reset(folder):
        for language, block in _BLOCK.findall(page.read_text(encoding="utf-8")):
            if language == "python":
                exec(compile(block, page.name, "exec"), names)
                continue
            for line in block.splitlines():
                _command(line.removeprefix("$ "))


def _command(line: str) -> None:
    """Run one of our commands in this process; its exit code is 0."""
    with mock.patch.object(sys, "argv", shlex.split(line)), pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code, line


@contextlib.contextmanager
def _reset(folder: Path):
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
