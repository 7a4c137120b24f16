import json
from functools import partial

import pytest

from gradclip.diagnostics import GroupRecord, RunRecorder, StepRecord
from gradclip.diagnostics.figure import figure_of_runs
from gradclip.diagnostics.runs import read_runs


@pytest.fixture
def gradclip_plot(gradclip_command):
    return partial(gradclip_command, "plot")


@pytest.fixture
def record(tmp_path):
    """A run with a limit for each of two patterns, and steps of two optimizers."""
    path = tmp_path / "run.jsonl"
    with RunRecorder(path) as recorder:
        for step in range(560):
            norm = 2.0 if step < 5 else 0.5
            groups = {
                "head.*": GroupRecord(norm_pre=norm, threshold=1.0, clipped=norm > 1),
                "*": GroupRecord(norm_pre=0.1, threshold=3.0),
            }
            recorder.write(
                StepRecord(
                    step=step,
                    norm_pre=norm,
                    threshold=1.0,
                    clipped=norm > 1,
                    loss=1 / 3,
                    groups=groups,
                )
            )
    return path


@pytest.fixture
def log(tmp_path):
    """Two runs of others, the second without a norm that is a number."""
    path = tmp_path / "metrics.csv"
    rows = [f"{step},{1 + step % 3},{2 - step / 100}" for step in range(0, 90, 10)]
    path.write_text("\n".join(["step,grad_norm,loss", *rows, "0,nan,1", "10,inf,1", ""]))
    return path


@pytest.mark.smoke
def test_a_record_is_drawn_with_a_line_for_each_group(gradclip_plot, record, tmp_path):
    code, out, err = gradclip_plot(record)

    said = "clipped 5 of 560 steps (1 %) at max_norm 1.0 (head.*), 3.0 (*): loss 0.333"
    assert (code, out, err) == (
        0,
        f"run.jsonl: {said} (median of the last 50 steps)\nfigure  gradclip.svg\n",
        "",
    )
    assert (tmp_path / "gradclip.svg").read_text().startswith("<?xml")
    figure = figure_of_runs(read_runs(record))
    assert figure.get_suptitle() == said[:1].upper() + said[1:]
    above, _ = figure.axes
    assert [text.get_text() for text in above.get_legend().get_texts()] == [
        "threshold 1.0 of head.*",
        "threshold 3.0 of *",
    ]


def test_logs_of_others_are_drawn_below_it_and_say_nothing_of_clipping(
    gradclip_plot, record, log, tmp_path
):
    code, out, err = gradclip_plot(record, log, "-o", "new/both.png", "--json")

    assert (code, err) == (0, "2 of 3 runs are drawn: the last 16 with a finite norm\n")
    told = json.loads(out)
    assert told["figure"] == "new/both.png"
    ours, theirs = told["runs"]
    assert (ours["clipped"], ours["steps"], ours["thresholds"]) == (5, 560, {"head.*": 1, "*": 3})
    assert (theirs["clipped"], theirs["steps"], theirs["threshold"]) == (None, 9, None)
    assert theirs["name"] == "metrics.csv, run 1"
    assert theirs["finding"] == "9 logged steps, p99 norm 3: loss 1.60"
    assert (tmp_path / "new" / "both.png").read_bytes().startswith(b"\x89PNG")
    both = figure_of_runs([*read_runs(record), *read_runs(log)[:1]])
    assert [part.get_suptitle().partition(":")[0] for part in both.subfigs] == [
        "run.jsonl",
        "metrics.csv, run 1",
    ]
    above, below = both.axes[2:]
    assert list(above.lines[0].get_xdata()) == list(range(0, 90, 10))
    assert above.get_title(loc="left").startswith("gradient norm, as it was logged")
    assert [text.get_text() for text in above.texts] == []
    assert [text.get_text() for text in below.texts] == ["loss 1.60"]


def test_each_optimizer_of_a_record_is_a_run(tmp_path):
    with RunRecorder(tmp_path / "gan.jsonl") as recorder:
        for step in range(3):
            recorder.write(StepRecord(step=step, norm_pre=1.0))
            recorder.write(StepRecord(step=step, norm_pre=2.0, optimizer=1))
    runs = read_runs(tmp_path / "gan.jsonl")
    assert [run.name for run in runs] == ["gan.jsonl, optimizer 0", "gan.jsonl, optimizer 1"]
    assert [list(run.steps.column("norm_pre")) for run in runs] == [[1.0] * 3, [2.0] * 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.csv"], "error[GC303]: missing.csv cannot be read: No such file"),
        (["{log}", "-o", "x.pdf"], "error[GC010]: x.pdf is neither SVG nor PNG"),
        (["{log}", "-o", "{log}/x.png"], "/metrics.csv/x.png cannot be written: "),
        (["{log}", "--norm-key", "grad_nrm"], "nearest: grad_norm"),
        (["{empty}"], "error[GC303]: "),
        (["{nan}"], "error[GC010]: no step of the run has a finite gradient norm"),
        ([], "DIR_OR_FILE"),
    ],
)
def test_a_mistake_is_a_message_and_exits_with_2(gradclip_plot, log, tmp_path, arguments, message):
    places = {name: tmp_path / f"{name}.csv" for name in ("empty", "nan")}
    places["empty"].write_text("")
    places["nan"].write_text("step,grad_norm\n0,nan\n1,nan\n")
    code, out, err = gradclip_plot(*(each.format(log=log, **places) for each in arguments))
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("*.svg"))
