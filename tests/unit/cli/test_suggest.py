import json
import subprocess
import sys
from random import Random

import pytest

from gradclip.cli import main

HEAVY = (
    "import atexit, sys\nfrom gradclip.cli import main\n"
    "atexit.register(lambda: print('loaded', sorted({'torch', 'numpy'} & {*sys.modules})))\nmain()"
)


@pytest.fixture
def gradclip_suggest(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gradclip", "suggest", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def log(tmp_path):
    """Two runs, the first too short."""
    steps = [*range(5), *range(200)]
    norms = Random(0)
    rows = [f"{s},{norms.uniform(1, 2):.1f},{2 - n / 200}" for n, s in enumerate(steps)]
    path = tmp_path / "metrics.csv"
    path.write_text("step,grad_norm,loss\n" + "\n".join(rows) + "\n")
    return path


def test_numpy_is_named_where_it_is_missing(log):
    code = "import sys\nsys.modules['numpy'] = None\nfrom gradclip.cli import main\nmain()"
    result = subprocess.run(
        [sys.executable, "-c", code, "suggest", str(log)],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path)},
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error[GC401]: logs are read with numpy")


def test_help_has_examples_and_needs_no_torch():
    result = subprocess.run(
        [sys.executable, "-c", HEAVY, "suggest", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "", "NO_COLOR": "1", "TERM": "dumb", "PYTHONPATH": ":".join(sys.path)},
    )
    assert "gradclip suggest runs/checkpoint-500/trainer_state.json" in result.stdout
    assert "--norm-key" in result.stdout
    assert "loaded []" in result.stdout


@pytest.mark.smoke
def test_the_advice_in_words(gradclip_suggest, log):
    code, out, err = gradclip_suggest(log)

    assert (code, err) == (0, "")
    few, _, advice = out.partition("\n\n")
    assert few.startswith(f"{log}, run 1 of 2: 5 norms of each step from 'grad_norm' (CSV)")
    assert "No advice (FEW)" in few
    order = [
        "run 2 of 2",
        "usual norm",
        "attach(optimizer, 3.8)",
        "GUARD: ",
        "On this run",
        "of later steps",
        "EMAClip(",
        "warning COARSE",
        "Better advice needs",
    ]
    assert [advice.index(each) for each in order] == sorted(advice.index(each) for each in order)


def test_the_advice_as_json(gradclip_suggest, log, tmp_path):
    code, out, err = gradclip_suggest(log, "--json", "--intent", "regularise")

    assert (code, err) == (0, "")
    few, told = json.loads(out)
    assert (few["suggestion"], few["kind"], few["norms"]["p99"]) == (None, "FEW", None)
    assert told["read"] == {
        "file": str(log),
        "format": "CSV",
        "norm_key": "grad_norm",
        "step_key": "step",
        "points": 200,
        "spacing": 1.0,
        "zeros": 0,
        "nonfinite": 0,
    }
    assert set(told["norms"]) == {"p50", "p90", "p99", "max", "drift"}
    assert told["suggestion"]["policy"] == {"clip_mode": "norm", "max_norm": 1.9}
    assert set(told["suggestion"]) == {
        "policy",
        "line",
        "clip_fraction",
        "clip_fraction_by_third",
        "clip_fraction_settled",
        "lr_factor",
    }
    assert {each["policy"]["clip_mode"] for each in told["policies"]} == {
        "norm",
        "ema",
        "zscore",
        "quantile",
    }
    assert all(set(each) == {"code", "text"} for each in told["warnings"])

    one = tmp_path / "one.jsonl"
    one.write_text("".join(json.dumps({"step": n, "grad_norm": 1 + n}) + "\n" for n in range(9)))
    code, out, _ = gradclip_suggest(one, "--json")
    assert code == 1  # a refusal
    assert json.loads(out)["reason"].startswith("There are 9 norms")


def test_the_line_is_that_of_the_framework(gradclip_suggest, tmp_path):
    rows = [{"step": n, "grad_norm": 20 + n % 40, "loss": 1.0} for n in range(80)]
    rows = [{**row, "learning_rate": 0.1, "epoch": 1.0} for row in rows]
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": rows}))
    assert "\n  max_grad_norm=120\n" in gradclip_suggest(path)[1]


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ([each for each in range(60) if each != 7], "59 norms of 60 steps from"),
        ([*range(40), *range(40, 440, 10)], "80 norms, one every 5.4 steps, from"),
    ],
)
def test_steps_without_a_norm_are_told(gradclip_suggest, tmp_path, steps, told):
    path = tmp_path / "log.csv"
    path.write_text("step,grad_norm\n" + "".join(f"{step},{1 + step % 3}\n" for step in steps))
    out = gradclip_suggest(path)[1]
    assert told in out
    assert ("warning SPACING" in out) == ("every" in told)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.csv"], "error[GC303]: missing.csv cannot be read: No such file"),
        (["{log}", "--norm-key", "grad_nrm"], "nearest: grad_norm"),
        (["{log}", "--intent", "gaurd"], "gaurd"),
        ([], "files"),
    ],
)
def test_a_mistake_is_a_message_and_exits_with_2(gradclip_suggest, log, arguments, message):
    code, out, err = gradclip_suggest(*(each.format(log=log) for each in arguments))
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
