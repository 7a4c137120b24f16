import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from error_page import PAGE, filled

import gradclip
from gradclip.cli.explain import EXPLANATIONS, explain
from gradclip.diagnostics.advice_kinds import KINDS
from gradclip.errors import NonFiniteGradientError, RecordError
from patience import seconds

SOURCE = Path(gradclip.__file__).parent
WITHOUT_EXTRAS = """
import atexit, sys
sys.modules.update(dict.fromkeys(("torch", "typer", "rich", "numpy")))
from gradclip.cli import main
main()
"""


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, "explain", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds(),
        env={**os.environ, "COLUMNS": "100"},
    )


def test_a_code_is_explained_without_torch_and_without_an_extra():
    result = run("gc201")

    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(
        "GC201  NonFiniteGradientError, a RuntimeError\n\nThe gradients"
    )
    parts = [result.stdout.index(each) for each in ("\n\nWhy: ", "\n\nWhat to do: ", "\n    >>> ")]
    assert parts == sorted(parts)
    assert "``" not in result.stdout


def test_an_unknown_code_is_an_error_that_has_the_nearest():
    result = run("GC2O1")

    assert result.returncode == 2
    assert result.stderr.startswith(
        "error[GC010]: there is no error and no advice with the code 'GC2O1'. Did"
    )


def test_without_a_code_all_are_listed(capsys):
    explain([])
    listed = capsys.readouterr().out.splitlines()
    explain(["--json"])
    data = json.loads(capsys.readouterr().out)
    explain(["GC303", "--json"])
    of_one = json.loads(capsys.readouterr().out)

    assert [line.split()[0] for line in listed] == [each["code"] for each in data]
    assert of_one in data
    assert of_one["example"] == "gradclip suggest metrics.csv --norm-key total_grad_norm"


def test_each_word_of_an_advice_is_explained_with_what_the_advice_says():
    result = run("collapsed")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("COLLAPSED  a refusal of gradclip suggest\n\nThe norm fell")
    falling = [0.99**n for n in range(1000)]
    assert result.stdout.partition("What to do: ")[2].strip() in gradclip.suggest(falling).reason

    files = (SOURCE / "diagnostics").glob("advice*.py")
    said = "".join(each.read_text() for each in files if each.name != "advice_kinds.py")
    assert set(KINDS) <= set(re.findall(r'"([A-Z_]{3,})"', said))
    assert all(all(each[:4]) for each in KINDS.values())


def test_every_error_is_explained_and_each_explained_one_is_raised():
    """That the errors are these, and no file gives another code, makes the list whole."""
    made, elsewhere = set(), []
    for file in SOURCE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if file.name != "errors.py":
            elsewhere += re.findall(r"^ +code\b.* = \"GC.*$", text, re.MULTILINE)
            calls = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
            made |= {ast.unparse(call.func).split(".")[-1] for call in calls}
    assert elsewhere == []
    assert {each.error for each in EXPLANATIONS.values()} - made == set()
    for each in EXPLANATIONS.values():
        assert all(each[:-1]), each.code


def test_the_page_is_what_the_errors_say():
    page = PAGE.read_text(encoding="utf-8")
    assert page == filled(page), "make error-page writes it anew"


@pytest.mark.parametrize("kind", [NonFiniteGradientError, RecordError])
def test_the_command_is_below_a_traceback_and_not_in_the_message(kind):
    error = kind("the words")
    assert str(error) == "the words"
    assert error.__notes__ == [f"To read more: gradclip explain {kind.code}"]
