"""One small log of each format, as its framework writes it, and the keys that are looked for."""

import json
import math

import numpy as np
import pytest

from gradclip.diagnostics import RunRecorder, StepRecord, read_log
from gradclip.errors import LogError

NORMS = [3.5, 1.25, 0.75]
ROWS = [
    {"step": 10 * (n + 1), "loss": 2.0 - n / 2, "grad_norm": norm, "learning_rate": 1e-3}
    for n, norm in enumerate(NORMS)
]
EVALUATION = {"step": 20, "eval_loss": 1.7, "eval_runtime": 3.0}
HISTORY = [{**row, "epoch": 0.1} for row in (ROWS[0], ROWS[1], EVALUATION, ROWS[2])]
STATE = {"epoch": 1.0, "log_history": HISTORY}
MEGATRON = (
    " iteration {0:8}/    1000 | consumed samples:   1,024 | elapsed time per iteration (ms): 14.6 "
    "| learning rate: 1.000E-03 | lm loss: {1:E} | loss scale: 12.0 | grad norm: {2} | params norm:"
    " 9.0 | number of skipped iterations:   0 | number of nan iterations:   0 |\n"
)
SB3 = (
    "------------------------\n| time/       |          |\n|    total_timesteps | {0} |\n"
    "| train/      |          |\n|    grad_norm | {2} |\n|    loss | {1} |\n---------------------\n"
)
LINES = {
    "megatron": "  clip_grad ....................................... 1.0\n" + MEGATRON,
    "nanogpt": "step {0:5} | loss: {1:f} | lr 1.0000e-03 | norm: {2:.4f} | dt: 12.50ms\n",
    "fairseq": '[2024-01-02 03:04:05,678][train_inner][INFO] - {{"epoch": 1, "loss": "{1}", '
    '"num_updates": "{0}", "lr": "0.001", "gnorm": "{2}", "loss_scale": "128"}}\n',
    "torchtitan": "[rank0]:[titan] 2024-01-02 03:04:05 - root - INFO - step: {0:2}  loss:  {1}  "
    "grad_norm: {2}  memory: 1.25GiB(3.50%)  tps: 10,050  mfu: 1.50%\n",
    "lerobot": "INFO 2024-01-02 03:04:05 train.py:35 step:{0} smpl:6K ep:9 epch:0.03 loss:{1} "
    "grdn:{2} lr:1e-03 updt_s:0.125\n",
    "verl": "step:{0} - actor/pg_loss:np.float64({1}) - actor/grad_norm:np.float64({2}) - "
    "actor/lr:np.float64(0.001) - response_length/clip_ratio:0.0\n",
    "key=value": "\x1b[32m[STEP {0:4}]\x1b[0m  loss={1}  grad_norm={2}  lr=0.001  epoch=0.125\n",
    "transformers' output": "\r 10%|#    | 1/10 [00:01<00:09]\r{{'loss': {1}, 'grad_norm': {2}, "
    "'learning_rate': 0.001, 'epoch': 0.1, 'global_step': {0}}}\n",
    "stable-baselines": SB3,
    "dictionaries of tensors": "{{'step': {0}, 'loss': tensor({1}, device='cuda:0'), 'lr': 0.001, "
    "'grad_norm': tensor({2}, device='cuda:0')}}\n",
    "OLMo's headings": "INFO\t[step={0}/900,epoch=0]\n    optim/total_grad_norm={2}\n"
    "    train/CrossEntropyLoss={1}\n    optim/learning_rate=0.001\n",
    "Composer's headings": "[batch_idx={0}/900]:\n\t Train l2_norm/grad/global: {2}\n"
    "\t Train loss: {1}\n\t lr: 0.001\n",
}

LIKE_CSV = {
    "transformers' output of strings": "{{'loss': '{1}', 'grad_norm': '{2}', 'learning_rate': "
    "'0.001', 'epoch': '0.1', 'global_step': '{0}'}}\n",
    "fairseq's lines": '2024-01-02 | INFO | train_inner | {{"epoch": 1, "loss": "{1}", "lr": '
    '"0.001", "num_updates": "{0}", "gnorm": "{2}"}}\n',
    "Swin's tabs": "INFO Train: [0/300]\tstep {0}\tlr 0.001\t wd 0.05\tloss {1} ({1})\tgrad_norm "
    "{2} (9.0)\tloss_scale 65536.0 (65536.0)\n",
    "tensors": "step {0} | loss:{1} lr:0.001 grad_norm:tensor({2}, device='cuda:0')\n",
}
"""Lines that look like a header and rows of CSV, where nothing else stands above them."""


def rows_of(template):
    parts = [template.format(row["step"], row["loss"], row["grad_norm"]) for row in ROWS]
    return "Loading the model ...\n" + "evaluated 400 examples\n".join(parts)


def as_csv(columns):
    lines = [",".join(columns)]
    lines += [",".join(str(row.get(name, "")) for name in columns.values()) for row in ROWS]
    return "\n".join(lines) + "\n"


PLAIN = {"step": "step", "loss": "loss", "grad_norm": "grad_norm", "lr": "learning_rate"}
WANDB = {
    '"Step"': "step",
    '"run-1 - train/grad_norm"': "grad_norm",
    '"run-1 - train/grad_norm__MAX"': "grad_norm",
    '"run-1 - train/loss"': "loss",
    '"run-1 - train/lr"': "learning_rate",
}
LIGHTNING = "epoch,grad_2.0_norm_total,lr-AdamW,step,train_loss_step,val_loss\n" + "".join(
    f"0,,{row['learning_rate']},{row['step']},,\n"
    f"0,{row['grad_norm']},,{row['step']},{row['loss']},\n"
    f"0,,,{row['step']},,1.5\n"
    for row in ROWS
)
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
GLUED = [*ROWS, EVALUATION]
FILES = {
    "trainer_state.json": json.dumps(STATE, indent=1),
    "trainer_state.json in one line": json.dumps(STATE),
    "a list": json.dumps(ROWS, indent=1),
    "lists by name": json.dumps(COLUMNS, indent=1),
    "JavaScript": "export const log =\n" + json.dumps(ROWS, indent=1) + ";\n",
    "JSONL": "".join(json.dumps(row) + "   \n" for row in GLUED),
    "JSONL with a state": "".join(json.dumps(row) + "\n" for row in [*ROWS, STATE]),
    "glued objects": "".join(json.dumps(row) for row in GLUED),
    "strings": "".join(json.dumps({k: str(v) for k, v in row.items()}) + "\n" for row in ROWS),
    "nested": "".join(json.dumps({"step": r["step"], "train": r}) + "\n" for r in ROWS),
    "MLflow's table": "key,value,step,timestamp\n"
    + "".join(
        f"{name},{row[name]},{row['step']},1717171717171\n"
        for row in ROWS
        for name in ("grad_norm", "loss", "learning_rate")
    ),
    "CSV": as_csv(PLAIN),
    "W&B": as_csv(WANDB),
    "two tables in one file": as_csv(PLAIN).partition("30,")[0]
    + as_csv({name: PLAIN[name] for name in ("loss", "step", "lr", "grad_norm")}),
    "decimal commas": as_csv(PLAIN).replace(",", ";").replace(".", ","),
    "a table with bars": "| "
    + as_csv(PLAIN).strip().replace(",", " | ").replace("\n", " |\n| ")
    + " |\n",
    "a table with blanks": "  " + as_csv(PLAIN).replace(",", "   ").replace("\n", "\n  "),
    "LLaMA-Factory": "".join(
        json.dumps({"current_steps": r["step"], "total_steps": 90, **r}).replace('"step"', '"_"')
        + "\n"
        for r in ROWS
    ),
    "stable-baselines' CSV": as_csv(
        {f"train/{k}".replace("train/step", "step"): v for k, v in PLAIN.items()}
    ),
    "Lightning": LIGHTNING,
    "a configuration first": '{\n "lr": 0.001\n}\n' + rows_of(LINES["key=value"]),
    **{name: rows_of(template) for name, template in LINES.items()},
    **{
        name: "".join(template.format(*list(row.values())[:3]) for row in ROWS)
        for name, template in LIKE_CSV.items()
    },
}


def read(tmp_path, text, **keys):
    path = tmp_path / "log"  # no suffix: the name tells nothing
    path.write_text(text, encoding="utf-8", newline="\n")
    return read_log(path, **keys)


@pytest.mark.smoke
@pytest.mark.parametrize("name", FILES)
def test_a_format_is_told_by_its_content(name, tmp_path):
    (run,) = read(tmp_path, FILES[name])

    assert run.norms.tolist() == NORMS
    assert run.steps.tolist() == [10, 20, 30]
    assert run.losses.tolist() == [2.0, 1.5, 1.0]
    if "learning" in FILES[name] or "lr" in FILES[name]:
        assert run.rates.tolist() == [1e-3] * 3
    assert run.spacing == 10


def test_tensorboard_events_are_read_by_their_own_reader(tmp_path):
    pytest.importorskip("tensorboard", reason="in the extra `logs`")
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

    with SummaryWriter(tmp_path) as writer:
        for row in ROWS:
            for name in ("grad_norm", "loss", "learning_rate"):
                writer.add_scalar(f"train/{name}", row[name], row["step"])
    (file,) = tmp_path.iterdir()
    file = file.rename(tmp_path / "log")
    (run,) = read_log(file)

    assert (run.norms.tolist(), run.steps.tolist()) == (NORMS, [10, 20, 30])
    assert run.losses.tolist() == [2.0, 1.5, 1.0]
    assert run.rates == pytest.approx([1e-3] * 3)


def test_an_mlflow_metric_has_the_name_of_its_file_and_may_be_torn(tmp_path):
    folder = tmp_path / "metrics" / "train"
    folder.mkdir(parents=True)
    (folder / "grad_norm").write_text("1717171717171 3.5 10\n1717171717172 1.25 20\n1717")
    (run,) = read_log(folder / "grad_norm")

    assert (run.norm_key, run.norms.tolist(), run.spacing) == ("train/grad_norm", [3.5, 1.25], 10)


def test_a_record_of_ours_says_its_limit(tmp_path):
    path = tmp_path / "record.jsonl"
    with RunRecorder(path) as recorder:
        for n, norm in enumerate([*NORMS, math.inf]):
            recorder.write(StepRecord(step=n, norm_pre=norm, norm_post=1.0, threshold=1.0, lr=0.1))
    (run,) = read_log(path)

    assert run.norms.tolist() == [*NORMS, math.inf]
    assert (run.limit, run.nonfinite, run.format) == (1.0, 1, "gradclip record")


def test_the_framework_and_the_limit_are_told_where_they_are_known(tmp_path):
    known = {name: read(tmp_path, FILES[name])[0].framework for name in FILES}
    told = {name: framework for name, framework in known.items() if framework}
    assert told == {
        "trainer_state.json": "transformers",
        "trainer_state.json in one line": "transformers",
        "transformers' output": "transformers",
        "transformers' output of strings": "transformers",
        "fairseq's lines": "fairseq",
        "Lightning": "lightning",
        "megatron": "megatron",
        "fairseq": "fairseq",
        "lerobot": "lerobot",
    }
    assert read(tmp_path, FILES["megatron"])[0].limit == 1.0


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        ("step,param_norm,grad_norm", "grad_norm"),
        ("step,params norm,Grad Norm,norm_type", "Grad Norm"),
        ("step,grad_norm_conv,max_grad_norm,gnorm", "gnorm"),
        ("step,train/agent/grad_norm,clip_ratio/high", "train/agent/grad_norm"),
        ("step,grad_norm/layer1,grad_norm/layer2,grad_2.0_norm_total", "grad_2.0_norm_total"),
        ("step,eval/grad_norm,critic/grad_norm", "critic/grad_norm"),
        ("step,activations_norm_mean,grad_clip_ratio,total_norm", "total_norm"),
        ("step,grad_norm_clipped,grad_norm_unclipped", "grad_norm_unclipped"),
        ("step,grad_norm/post_clip,grad_norm/pre_clip", "grad_norm/pre_clip"),
        ("step,params/norm/total,grad/norm/total", "grad/norm/total"),
    ],
)
def test_look_alikes_are_not_taken(columns, chosen, tmp_path):
    cells = "".join(f"{n}{',1.5' * columns.count(',')}\n" for n in range(3))
    (run,) = read(tmp_path, f"{columns}\n{cells}")
    assert run.norm_key == chosen


def test_norms_of_parts_are_asked_about_and_others_listed(tmp_path):
    parts = "Update 1/4 PolicyLoss=0.5 GradNorm(P=1.50, V=2.25) KL=0.1\n" * 3
    with pytest.raises(LogError, match=r"2 parts.*--norm-key") as asked:
        read(tmp_path, parts)
    assert "GradNorm(P), GradNorm(V)" in str(asked.value)
    (run,) = read(tmp_path, parts, norm_key="GradNorm(V)")
    assert (run.norms.tolist(), run.loss_key, run.step_key) == ([2.25] * 3, "PolicyLoss", None)

    with pytest.raises(LogError, match="2 parts"):
        read(tmp_path, "step,defend_grad_norm,attack_grad_norm\n1,2,3\n2,3,4\n")
    with pytest.raises(
        LogError, match=r"(?s)the columns are:\n  step, grad_nrm, loss\n  nearest: "
    ):
        read(tmp_path, "step,grad_nrm,loss\n1,2,3\n2,3,4\n")
    with pytest.raises(LogError, match=r"(?s)no column 'los' \(loss_key\).*nearest: loss"):
        read(tmp_path, FILES["CSV"], loss_key="los")


def test_a_column_of_nan_gives_way_to_one_with_norms(tmp_path):
    (run,) = read(tmp_path, "epoch,grad_norm_avg,grad_norm_val\n0,nan,2.5\n1,nan,1.5\n")
    assert (run.norm_key, run.norms.tolist(), run.spacing) == ("grad_norm_val", [2.5, 1.5], None)


def test_a_step_that_goes_back_starts_a_run_and_one_that_repeats_does_not(tmp_path):
    steps = [1, 2, 3, 1, 2]
    runs = read(tmp_path, "step,grad_norm\n" + "".join(f"{s},1.{n}\n" for n, s in enumerate(steps)))
    assert [run.steps.tolist() for run in runs] == [[1, 2, 3], [1, 2]]

    rounded = "epoch,grad_norm\n0.01,8.5\n0.01,8.5\n0.02,8.25\n"
    assert [len(run.norms) for run in read(tmp_path, rounded)] == [3]

    # Each rank prints the same line, and one is late.
    ranks = "".join(f"step: {s}  loss: 1.{s}  grad_norm: 2.{s}\n" for s in (1, 1, 2, 1, 2, 3))
    assert [run.steps.tolist() for run in read(tmp_path, ranks)] == [[1, 2, 3]]

    both = "step,global_step,grad_norm\n1,1,1.5\n2,2,1.6\n1,3,1.7\n2,4,1.8\n"
    assert [run.step_key for run in read(tmp_path, both)] == ["global_step"]

    lines = "".join(
        f"epoch {e} step {s} grad_norm 1.{s} ms/step 3\n" for e in (0, 1) for s in (10, 20)
    )
    assert [run.steps.tolist() for run in read(tmp_path, lines)] == [[10, 20, 30, 40]]


def test_every_spelling_of_a_number(tmp_path):
    finite = ["1.5", "1.01e+04", "10K", "10,050", "-1"]
    infinite = ["nan", "NaN", "NAN", "-nan", "inf", "-inf", "Infinity", "1.#QNAN", "-nan(ind)"]
    missing = ["", "None", "null", "?", "N/A"]
    cells = [*finite, *infinite, *missing, "0.0"]
    (run,) = read(
        tmp_path, "step\tgrad_norm\n" + "".join(f"{n}\t{cell}\n" for n, cell in enumerate(cells))
    )
    assert run.norms[np.isfinite(run.norms)].tolist() == [1.5, 10100, 10000, 10050, 0]
    assert (run.nonfinite, run.zeros) == (len(infinite), 1)


def test_limits_by_group_are_no_limit_of_all_gradients(tmp_path):
    groups = {"a.*": {"norm_pre": 1.0, "threshold": 0.3}, "*": {"norm_pre": 1.0, "threshold": 9.0}}
    line = {"step": 0, "norm_pre": 1.4, "threshold": 0.3, "groups": groups}
    path = tmp_path / "run.jsonl"
    header = {"gradclip": "0.1.0", "schema": 1}
    lines = [header, *({**line, "step": step} for step in range(3))]
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert read_log(path)[0].limit is None
