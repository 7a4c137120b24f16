"""Scripts that know nothing of gradclip, with and without ``gradclip run``: the same weights."""

import re
import sys
from math import isfinite

import pytest
import torch

from gradclip.diagnostics import read_events, read_header, read_norms, read_steps
from observed_runs import COMMAND, FINDING, SCRIPTS, WATCHED, both, ended, started

NOISE = [
    (re.compile(r"\[\d{4}-\d\d-\d\d [\d:,]+\] .*\n"), ""),  # DeepSpeed tells the time
    (re.compile(r"\{'train_runtime.*\n"), ""),
    (re.compile(r".*examples/s\].*\n"), ""),
]
SCRIPTS_AND_FINDINGS = {
    "character_model.py": (["--save"], "60", "lm_head.weight", "60 of 60 steps", "1 is in force"),
    "loss_scaler.py": ([], "40", "2.weight", "37 of the 37 steps", "0.5 is in force"),
    "loss_scaler.py --fused": (
        ["--fused"],
        "40",
        "2.weight",
        "no clipping was seen",
        "none was seen",
    ),
    "adversaries.py": ([], "50", "main.2.weight", "elements were clamped", "none was seen"),
    "actor_critic.py": ([], "40", "action_head.weight", "no clipping was seen", "none was seen"),
    "accelerated.py": ([], "30", "2.weight", "10 of 30 steps", "1 is in force"),
    "lightning_fit.py": ([], "24", "head.weight", "24 of 24 steps", "0.5 is in force"),
    "trainer.py": ([], "40", "down.weight", "40 of 40 steps", "1 is in force"),
    "fine_tuning.py": ([], "32", "lm_head.weight", "32 of 32 steps", "0.5 is in force"),
}


def quiet(text):
    for pattern, put in NOISE:
        text = pattern.sub(put, text)
    return text


@pytest.mark.parametrize("name", SCRIPTS_AND_FINDINGS)
def test_a_watched_script_ends_with_the_same_bits(name, tmp_path):
    options, steps, layer, share, limit = SCRIPTS_AND_FINDINGS[name]
    script = str(SCRIPTS / name.split()[0])

    alone, watched = both([script, *options, "state"], tmp_path)

    assert alone.code == watched.code == 0, watched.err
    assert quiet(watched.out) == quiet(alone.out)
    assert quiet(WATCHED.sub("", watched.err)) == quiet(alone.err)
    state, same = (tmp_path / each / "state" for each in ("alone", "watched"))
    assert state.read_bytes() == same.read_bytes()
    found = FINDING.search(watched.err)
    assert found is not None, watched.err
    assert found["steps"] == steps
    assert found["layer"].startswith(layer)
    assert found["share"].startswith(share)
    assert found["limit"].startswith(limit)
    record = tmp_path / "watched" / "gradclip-runs" / "1"
    recorded = read_steps(record)
    assert len(read_norms(record).steps) > 1
    assert all(isfinite(each) for each in recorded.column("loss")) or "scaler" in name
    if "scaler" in name:
        assert [each.step for each in recorded if each.skipped] == [7, 20, 33]
        assert {each.reason for each in recorded if each.skipped} == {"overflow"}
        # The loss is the unscaled one, and so are the norms.
        assert max(each.loss for each in recorded if not each.skipped) < 10
        (first, *_) = [e for e in read_events(record) if e["event"] == "nonfinite"]
        assert first["parameters"][0] == "0.weight"


def test_two_optimizers_are_told_apart(tmp_path):
    watched = ended(
        started(
            ["-c", COMMAND, "run", "--out", "r", str(SCRIPTS / "adversaries.py"), "w"], tmp_path
        )
    )
    assert watched.code == 0, watched.err
    said = [each["optimizer"] for each in FINDING.finditer(watched.err)]
    assert [each.split(",")[0] for each in said] == ["Adam 0 (Discriminator)", "Adam 1 (Generator)"]
    generator = [each for each in read_steps(tmp_path / "r") if each.optimizer == 1]
    assert {each.threshold for each in generator} == {0.2}
    assert len(generator) == 50
    assert len(read_header(tmp_path / "r")["optimizers"]) == 2


def test_ranks_of_torchrun_share_a_record(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    script = str(SCRIPTS / "data_parallel.py")
    alone = ended(started([*torchrun, script, "state"], tmp_path / "alone"))
    under = ["--no-python", sys.executable, "-c", COMMAND, "run"]
    watched = ended(started([*torchrun, *under, script, "state"], tmp_path / "watched"))

    assert alone.code == watched.code == 0, watched.err
    for rank in range(2):
        states = [torch.load(tmp_path / each / f"state.{rank}") for each in ("alone", "watched")]
        for mine, reference in zip(states[1][0].values(), states[0][0].values(), strict=True):
            assert torch.equal(mine, reference)
    found = FINDING.findall(watched.err)
    assert len(found) == 1, watched.err
    record = tmp_path / "watched" / "gradclip-runs" / "1"
    assert {path.name for path in record.glob("run*.json")} == {"run.json", "run.rank1.json"}
    steps, norms = read_steps(record), read_norms(record)
    assert len(steps) == 40
    first = torch.tensor(norms.norms[0]).square().sum().sqrt()
    assert first == pytest.approx(steps[0].norm_pre, rel=5e-3)


def test_deepspeed_tells_limit_and_norm(tmp_path):
    alone, watched = both([str(SCRIPTS / "sharded_states.py"), "state"], tmp_path)
    assert alone.code == watched.code == 0, watched.err
    states = [(tmp_path / each / "state").read_bytes() for each in ("alone", "watched")]
    assert states[0] == states[1]
    (found,) = FINDING.finditer(watched.err)
    assert (found["steps"], found["optimizer"]) == ("30", "DeepSpeedEngine")
    assert found["layer"] == "the norms of layers are not known"
    assert found["share"].startswith("30 of 30 steps")
    assert found["limit"].startswith("0.5 is in force; suggested is")


def test_ranks_of_accelerate_share_a_record(tmp_path):
    # Without a GPU it is still its way to start two processes of one machine: they use gloo.
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    options = "--mixed_precision no --dynamo_backend no --main_process_port 0"
    command = ["-m", *launch.split(), *options.split(), "-m", "gradclip", "run"]
    script = str(SCRIPTS / "accelerated.py")
    watched = ended(started([*command, script, "state"], tmp_path))
    assert watched.code == 0, watched.err
    assert len(FINDING.findall(watched.err)) == 1, watched.err
    runs = tmp_path / "gradclip-runs"
    assert [path.name for path in runs.iterdir()] == ["1"]
    assert {path.name for path in runs.glob("1/run*.json")} == {"run.json", "run.rank1.json"}


def test_ranks_that_a_script_spawns_are_watched(tmp_path):
    script = str(SCRIPTS / "spawned_ranks.py")
    alone, watched = both([script, "."], tmp_path)

    assert alone.code == watched.code == 0, watched.err
    assert watched.out == alone.out == "done\n"
    for rank in range(2):
        states = [(tmp_path / each / f"state.{rank}").read_bytes() for each in ("alone", "watched")]
        assert states[0] == states[1]
    (found,) = FINDING.finditer(watched.err)
    assert found["share"].startswith("18 of 24 steps")
    record = tmp_path / "watched" / "gradclip-runs" / "1"
    parts = torch.tensor(read_norms(record).norms)
    whole = torch.tensor(read_steps(record).column("norm_pre"), dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.vector_norm(parts, dim=1), whole, rtol=5e-3, atol=0)
