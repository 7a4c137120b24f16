"""The command line, in this process."""

import sys

import pytest

from gradclip.cli import main


@pytest.fixture
def gradclip_command(monkeypatch, capsys, tmp_path):
    """Run a command in an empty folder; return its exit code, and what it printed and told."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gradclip", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    return run
