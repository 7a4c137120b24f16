import json
import subprocess
import sys
from random import Random

import pytest

from gradclip.cli import main
from gradclip.record.writer import Batch, Place, Writer

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
        "On this run it would have clipped 0 %",
        "of later steps",
        "ask again of the run that was clipped",
        "What policies would have done",
        "NormClip(max_norm=1.9)",
        "warning COARSE",
        "Better advice needs",
    ]
    assert [advice.index(each) for each in order] == sorted(advice.index(each) for each in order)
    table = advice.partition("mean step\n")[2].partition("cap: ")[0]
    numbers = [line.partition("  ")[2].strip() for line in table.splitlines()]
    assert len(numbers) == len(set(numbers)) > 1

    norms = Random(0)
    rows = [f"{s},{norms.uniform(1, 2):.1f},2" for s in range(200)]
    log.write_text("step,grad_norm,loss\n" + "\n".join(rows) + "\n")
    out = gradclip_suggest(log)[1]  # what overturns the advice is above it
    assert out.index("warning LOSS") < out.index("attach(") < out.index("warning COARSE")


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
    ("called", "line"),
    [
        ("attach", "gradclip.attach(optimizer, {})"),
        ("GradientClippingCallback", "callbacks=[GradientClippingCallback({})]"),
        ("GradientClippingHook", "GradientClippingHookConfig(clip_mode='norm', max_norm={})"),
    ],
)
def test_the_line_is_that_of_the_way_in_that_wrote_the_record(
    gradclip_suggest, tmp_path, called, line
):
    steps = [{"step": n, "norm_pre": 1 + n / 40} for n in range(40)]
    writer = Writer.of(tmp_path / "record")
    writer.begin(writer.join(), 0, Place(), {"called": called}, resumes=False)
    writer.write(0, 0, Batch(steps=steps))
    writer.leave(0)
    assert f"\n  {line.format(3.9)}\n" in gradclip_suggest(tmp_path / "record")[1]
    code, _, said = gradclip_suggest(tmp_path)
    assert (code, f"\n  {tmp_path / 'record'}\n" in said) == (2, True)  # a folder around it


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
