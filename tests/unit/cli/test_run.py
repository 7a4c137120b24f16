"""``gradclip run``: a script ends as it would without, and its steps are in a record."""

from pathlib import Path

import pytest

from gradclip.cli.run import prepare
from gradclip.errors import ArgumentValueError, RecordError
from gradclip.observe.folder import make_folder
from observed_runs import WATCHED, both

ENDINGS = {
    "raises": (
        "import sys\n"
        "def inner(key):\n"
        "    try:\n"
        "        {}[key]\n"
        "    except KeyError:\n"
        "        raise ValueError('no such key')\n"
        "print(__name__, __spec__, sys.argv[1:], sorted(globals()))\n"
        "inner(3)\n"
    ),
    "exits": "import sys\nsys.exit(3)\n",
    "says": "import sys\nsys.exit('sorry')\n",
    "interrupted": "import os, signal\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # or it may be ignored
    "os.kill(os.getpid(), signal.SIGINT)\n",
    "leaves": "import os\nprint('gone', flush=True)\nos._exit(5)\n",
    "arguments": (
        "import argparse\nparser = argparse.ArgumentParser()\n"
        "parser.add_argument('--lr', type=float)\nprint(parser.parse_args())\n"
    ),
    "syntax": "x = (\ny = 3\n",
    "hooked": "import sys\nsys.excepthook = lambda *a: print(a[0], a[2].tb_next)\n1 / 0\n",
}


@pytest.mark.parametrize("name", [*ENDINGS, "package.module", "missing"])
def test_a_script_ends_as_it_would(name, tmp_path):
    for folder in ("alone", "watched"):
        package = tmp_path / folder / "package"
        package.mkdir(parents=True)
        (package / "module.py").write_text("import sys\nprint(__name__, sys.argv[1:])\n1 / 0\n")
        for each, text in ENDINGS.items():
            (tmp_path / folder / f"{each}.py").write_text(text)
    arguments = ["-m", name] if name.startswith("package") else [f"{name}.py"]

    alone, watched = both([*arguments, "--lr", "x"], tmp_path)

    assert watched.code == alone.code != 0
    assert watched.out == alone.out
    said = WATCHED.sub("", watched.err).replace("/watched/", "/alone/")
    assert said == alone.err
    if name not in ("leaves", "missing"):
        assert "step of a torch optimizer was seen" in watched.err
        leaves_by_itself = name in ("exits", "says", "arguments")
        assert ("no step" in watched.err) == leaves_by_itself  # else an error is the cause
    assert not any((tmp_path / "watched").glob("gradclip-runs/*/run*.json"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "there is no script"),
        (["--evry", "3", "train.py"], "no option --evry"),
        (["--every", "0", "train.py"], "--every is '0'"),
        (["--every=x", "train.py"], "--every is 'x'"),
        (["--out"], "--out needs a value"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_run(arguments, said):
    with pytest.raises(ArgumentValueError, match=said):
        prepare(arguments)


def test_a_folder_that_has_a_record_is_refused(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(RecordError, match="has the record of another run"):
        prepare(["--out", str(tmp_path), "train.py"])


def test_several_machines_must_be_given_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ArgumentValueError, match="several machines"):
        prepare(["train.py"])


def test_processes_of_one_launch_get_one_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [make_folder(None).name for _ in range(2)] == ["1", "2"]
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert [make_folder(None).name for _ in range(2)] == ["3", "3"]
    assert {path.name for path in Path("gradclip-runs").iterdir()} == {"1", "2", "3"}
    monkeypatch.setenv("MASTER_PORT", "29501")
    assert make_folder(None).name == "4"


def test_help_has_examples(capsys):
    prepare(["--help"])()
    said = capsys.readouterr().out
    assert "torchrun --no-python" in said
    assert max(map(len, said.splitlines())) <= 100
