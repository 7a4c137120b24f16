"""Scripts of RoboOrchardLab, run by it and by gradclip: nothing but the prefix is changed.

They make the calls of its three tutorials, of its ImageNet example, and of the training mains of
four of its projects; models and data are made up.
"""

import logging
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPTS = Path(__file__).with_name("scripts")
PROJECTS = sorted(each.stem for each in SCRIPTS.glob("project_*.py"))
# Times and paths; and a line for each loss that is no scalar, which is one in each step there.
NOT_COMPARED = ("Speed", "TRAINING", "Start ", "checkpoint", "EVAL", "eval:", "is not a scalar")
ALL = sorted(each.stem for each in SCRIPTS.glob("*.py") if each.stem != "made_up")


@dataclass
class Seen:
    """What a run left."""

    trainer: object
    scalars: dict = field(default_factory=dict)
    messages: list = field(default_factory=list)

    @property
    def weights(self):
        return [p.detach().clone() for p in self.trainer.model.parameters()]

    @property
    def rates(self):
        return [group["lr"] for group in self.trainer.optimizer.param_groups]


class Lines(logging.Handler):
    """Keeps messages that tell no time."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def emit(self, record):
        message = record.getMessage()
        mine = record.name.startswith(("script", "gradclip.pipeline.hooks", "robo_orchard_lab."))
        if mine and not any(word in message for word in NOT_COMPARED):
            self.kept.append(message)


def run(name, package, folder, **changes):
    """Run a script with the pipeline of one of the two packages."""
    source = (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")
    assert "robo_orchard_lab.pipeline" in source
    source = source.replace("robo_orchard_lab.pipeline", f"{package}.pipeline")
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002 - the generator that Accelerate saves
    torch.manual_seed(5)
    handler = Lines()
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        script = {"__name__": name}
        exec(compile(source, name, "exec"), script)
        seen = Seen(script["main"](folder, **changes))
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    seen.messages = handler.kept
    seen.trainer.accelerator.end_training()
    events = EventAccumulator(str(folder / "logs" / "tensorboard"))
    events.Reload()
    seen.scalars = {
        tag: [(each.step, each.value) for each in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    return seen


@pytest.fixture(autouse=True)
def _made_up(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    sys.modules.pop("made_up", None)


def compare(theirs, ours):
    assert all(
        torch.allclose(a, b, rtol=0, atol=1e-6)
        for a, b in zip(theirs.weights, ours.weights, strict=True)
    )
    assert ours.messages == theirs.messages
    assert ours.scalars.keys() == theirs.scalars.keys()
    for tag, values in theirs.scalars.items():
        assert [step for step, _ in ours.scalars[tag]] == [step for step, _ in values]
        assert np.allclose(
            [value for _, value in ours.scalars[tag]],
            [value for _, value in values],
            rtol=1e-6,
            atol=1e-6,
        )
    if theirs.trainer.optimizer is not None:
        assert ours.rates == pytest.approx(theirs.rates, rel=1e-9)
    metric = getattr(theirs.trainer, "metric", None)
    if metric is not None:
        assert ours.trainer.metric.computed == pytest.approx(metric.computed)


@pytest.mark.parametrize("name", ALL)
def test_a_script_runs_the_same(tmp_path, name):
    theirs = run(name, "robo_orchard_lab", tmp_path / "theirs")
    ours = run(name, "gradclip", tmp_path / "ours")
    compare(theirs, ours)
    assert theirs.messages or name == "tutorial_basic_run"
    assert theirs.scalars or name == "tutorial_custom_hook"


@pytest.mark.parametrize("with_optimizer", [True, False])
@pytest.mark.parametrize("name", PROJECTS)
def test_a_project_runs_the_same_with_accumulation(tmp_path, name, with_optimizer):
    changes = {"accumulate": 3, "step_scheduler_with_optimizer": with_optimizer}
    theirs = run(name, "robo_orchard_lab", tmp_path / "theirs", **changes)
    compare(theirs, run(name, "gradclip", tmp_path / "ours", **changes))


@pytest.mark.parametrize("name", ["project_grounding", "project_grasping", "project_manipulation"])
def test_evaluation_alone(tmp_path, name):
    theirs = run(name, "robo_orchard_lab", tmp_path / "theirs", eval_only=True)
    ours = run(name, "gradclip", tmp_path / "ours", eval_only=True)
    assert len(theirs.trainer.metric.computed) == 1
    compare(theirs, ours)


def test_their_checkpoints_are_limited_and_the_function_before_saving_wrote_its_file(tmp_path):
    run("project_manipulation", "gradclip", tmp_path)
    left = sorted(each.name for each in (tmp_path / "checkpoints").iterdir())
    assert left == [
        "epoch-0001-step-00000008",
        "epoch-0002-step-00000012",
        "epoch-0002-step-00000013",
    ]
    for each in left:
        assert (
            tmp_path / "checkpoints" / each / "model.config.json"
        ).read_text() == '{"classes": 7}'


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_checkpoint_that_it_wrote_goes_on_bit_for_bit(tmp_path, epoch):
    name = "tutorial_built_in_hooks"
    theirs = run(name, "robo_orchard_lab", tmp_path / "theirs")
    at = tmp_path / "theirs" / "checkpoints" / f"checkpoint_{epoch}"
    ours = run(name, "gradclip", tmp_path / "ours", resume_from=str(at))
    assert ours.trainer.trainer_progress_state.global_step_id == 3 * 7
    assert all(map(torch.equal, theirs.weights, ours.weights))
    assert all(
        torch.equal(theirs.trainer.optimizer.state[a]["momentum_buffer"], state["momentum_buffer"])
        for a, state in zip(
            theirs.trainer.model.parameters(), ours.trainer.optimizer.state.values(), strict=True
        )
    )
    assert ours.rates == theirs.rates
    assert ours.messages == theirs.messages[-len(ours.messages) :]
