import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from gradclip import __version__
from gradclip.cli import app, main
from gradclip.errors import ConfigError
from patience import seconds

# Runs the command in a fresh interpreter, with the modules that are named first made missing.
COMMAND = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None
from gradclip.cli import main
main()
"""
LOADED = """
import atexit, sys
from gradclip.cli import main
heavy = {"torch", "accelerate", "matplotlib"}
atexit.register(lambda: print("loaded", sorted(heavy & {*sys.modules})))
main()
"""


def run(*arguments, script=COMMAND, missing=("nothing",), **variables):
    first = [",".join(missing)] if script == COMMAND else []
    return subprocess.run(
        [sys.executable, "-c", script, *first, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds(),
        env={**os.environ, "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "100", **variables},
    )


def test_help_names_the_commands_and_needs_no_torch():
    result = run("--help", script=LOADED)

    assert result.returncode == 0, result.stderr
    assert "demo" in result.stdout
    assert "Train a small recurrent network" in result.stdout
    assert "loaded []" in result.stdout


@pytest.mark.smoke
def test_version_needs_no_torch():
    result = run("--version", script=LOADED)

    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"gradclip {__version__}", "loaded []"]


def test_the_typer_that_dies_with_a_new_click_is_not_allowed():
    """Below 0.16, ``--help`` is a TypeError with click 8.2 and later, which it allows."""
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    (typer,) = (
        Requirement(each)
        for each in project["project"]["optional-dependencies"]["cli"]
        if each.startswith("typer")
    )
    assert "0.15.4" not in typer.specifier
    assert metadata.version("typer") in typer.specifier


def test_the_demo_explains_its_options_without_torch():
    result = run("demo", "--help", script=LOADED)

    assert result.returncode == 0, result.stderr
    for option in ("--seed", "--steps", "--max-norm", "--lr", "--output-dir"):
        assert option in result.stdout
    assert "loaded []" in result.stdout


@pytest.mark.parametrize("name", ["typer", "rich"])
def test_a_missing_command_line_library_is_one_message(name):
    result = run("--help", missing=[name])

    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"The gradclip command needs {name}, which is not installed.")
    assert 'pip install "gradclip[cli]"' in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["accelerate", "matplotlib"])
def test_what_the_demo_needs_is_said_before_it_trains(name, tmp_path):
    result = run("demo", "--output-dir", str(tmp_path), missing=[name])

    assert result.returncode == 2
    assert result.stderr == (
        f"error[GC401]: the demo needs {name}, which is not installed.\n"
        '  pip install "gradclip[all]"\n'
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["-1", "nan"])
def test_an_error_of_ours_has_its_code_and_no_traceback(value, tmp_path):
    result = run("demo", "--max-norm", value, "--output-dir", str(tmp_path))

    assert result.returncode == 2
    assert result.stderr.startswith("error[GC010]: max_norm is ")
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_module_and_its_commands_have_help_with_examples():
    code = "from runpy import run_module; run_module('gradclip', run_name='__main__')"
    result = run("plot", "--help", script=f"import sys; sys.argv[0] = 'gradclip'\n{code}")

    assert result.returncode == 0, result.stderr
    assert "gradclip plot runs/1 runs/2 -o both.png" in result.stdout
    for each in ("demo", "suggest", "plot"):
        assert f"gradclip {each} " in run("--help").stdout


def test_a_shell_completes_the_commands():
    asked = {"_GRADCLIP_COMPLETE": "complete_bash", "COMP_WORDS": "gradclip pl", "COMP_CWORD": "1"}
    script = "import sys; sys.argv[0] = 'gradclip'\nfrom gradclip.cli import main\nmain()"
    assert run(script=script, **asked).stdout.split() == ["plot"]


def test_a_wrong_option_is_a_usage_error():
    result = run("demo", "--max-nrom", "1")

    assert result.returncode == 2
    assert "--max-nrom" in result.stderr


def test_an_error_that_is_not_ours_keeps_its_traceback():
    script = (
        "import gradclip.cli.app as app\n"
        "from gradclip.cli import main\n"
        "def broken(): raise KeyError('a mistake of the program')\n"
        "app.app.command()(broken)\n"
        "main()\n"
    )
    result = run("broken", script=script)

    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "KeyError: 'a mistake of the program'" in result.stderr


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("unknown field `max_nrom`", "error[GC001]: unknown field `max_nrom`\n"),
        (
            "error[GC001]: unknown field\n --> a.yaml:7",
            "error[GC001]: unknown field\n --> a.yaml:7\n",
        ),
    ],
)
def test_the_code_is_written_once(monkeypatch, capsys, message, shown):
    def fail():
        raise ConfigError(message)

    monkeypatch.setattr(app, "app", fail)
    with pytest.raises(SystemExit) as stop:
        main()

    assert stop.value.code == 2
    assert capsys.readouterr().err == shown
