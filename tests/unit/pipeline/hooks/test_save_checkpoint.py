"""When checkpoints are taken, and that what they hold is the finished step."""

import json
import random
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradclip.errors import ArgumentTypeError, ArgumentValueError
from gradclip.pipeline import HookBasedTrainer, SimpleBatchProcessor
from gradclip.pipeline.hooks import (
    GradientClippingHookConfig,
    HookContext,
    OptimizerHook,
    OptimizerHookConfig,
    PipelineHookArgs,
    PipelineHooks,
    SaveCheckpointConfig,
)


def train(hooks, accelerator=None, dataloader=None, **limits):
    """Seven batches an epoch."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    loader = DataLoader(TensorDataset(torch.randn(14, 2)), batch_size=2)
    run = HookBasedTrainer(
        accelerator or Accelerator(cpu=True),
        model,
        loader if dataloader is None else dataloader,
        SimpleBatchProcessor.from_callable(lambda m, batch: (None, m(batch[0]).pow(2).mean())),
        torch.optim.SGD(model.parameters(), lr=0.1),
        hooks=hooks,
        **limits,
    )
    run()
    return run


def saved(root):
    """(epoch, batches of all epochs) of every checkpoint."""
    return [
        tuple(int(part) for part in p.name.split("-")[1:4:2]) for p in sorted(root.glob("epoch-*"))
    ]


def save(root, **fields):
    return SaveCheckpointConfig(save_root=str(root), keep_last=None, **fields)


@pytest.mark.parametrize(
    ("config", "limits", "expected"),
    [
        ({}, {"max_epoch": 2}, [(1, 7), (2, 14)]),
        ({"save_epoch_freq": 2}, {"max_epoch": 3}, [(2, 14), (3, 21)]),
        ({"save_epoch_freq": 9}, {"max_epoch": 2}, [(2, 14)]),
        ({"save_epoch_freq": 2, "save_when_loop_end": False}, {"max_epoch": 3}, [(2, 14)]),
        ({"save_epoch_freq": None, "save_step_freq": 3}, {"max_step": 7}, [(0, 3), (0, 6), (0, 7)]),
        ({"save_epoch_freq": None, "save_step_freq": 7}, {"max_epoch": 1}, [(0, 7), (1, 7)]),
        ({"save_step_freq": 5}, {"max_step": 10}, [(0, 5), (1, 7), (1, 10)]),
        ({"save_when_loop_end": False}, {"max_step": 10}, [(1, 7)]),
    ],
)
def test_checkpoints_are_taken_when_they_are_due(tmp_path, config, limits, expected):
    train(save(tmp_path, **config), **limits)
    assert saved(tmp_path) == expected


@pytest.mark.smoke
def test_one_that_is_due_within_a_window_waits_for_its_end(tmp_path):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    config = save(tmp_path, save_step_freq=4, save_epoch_freq=None, save_when_loop_end=False)
    # Windows end after batches 3, 6, 7; 10, 13, 14.
    train(config, accelerator, max_epoch=2)
    assert saved(tmp_path) == [(0, 6), (1, 10), (1, 13)]


@pytest.mark.parametrize(
    ("sync", "expected"), [(True, [(1, 3), (2, 6)]), (False, [(1, 4), (2, 6)])]
)
def test_an_epoch_that_ends_within_a_window_is_saved_at_the_windows_end(tmp_path, sync, expected):
    plugin = GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=sync)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    batches = [(torch.ones(2, 2),)] * 3
    train(save(tmp_path, save_when_loop_end=False), accelerator, batches, max_epoch=2)
    assert saved(tmp_path) == expected


def test_none_is_taken_after_an_error(tmp_path):
    def fail(arg):
        if arg.global_step_id == 2:
            raise KeyError

    failing = PipelineHooks()
    failing.register_hook("on_step", HookContext.from_callable(after=fail))
    with pytest.raises(KeyError):
        train([failing, save(tmp_path, save_step_freq=1)], max_step=5)
    assert saved(tmp_path) == [(0, 1), (0, 2)]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("nested", [False, True])
def test_it_holds_the_finished_step_whatever_the_order_of_registration(
    tmp_path, weights, order, nested
):
    config = save(tmp_path, save_epoch_freq=None, save_step_freq=2)
    clip = GradientClippingHookConfig(clip_mode="norm", max_norm=0.1)
    hooks = [config, OptimizerHookConfig(), clip][::order]
    if nested:
        hooks = PipelineHooks.from_hooks([PipelineHooks.from_hooks(hooks)])
    run = train(hooks, max_step=2)
    (checkpoint,) = tmp_path.iterdir()
    stored = load_file(checkpoint / "model.safetensors")
    assert [stored[name].numpy().tobytes().hex() for name in ("weight", "bias")] == weights(
        run.model
    )
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["progress"] == {
        "epoch_id": 0,
        "step_id": 2,
        "global_step_id": 2,
        "micro_step_id": 0,
        "optimizer_step_id": 2,
    }


def test_it_works_in_a_loop_written_by_hand(tmp_path, linear, weights):
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(
        linear([1.0, 2.0]), torch.optim.SGD(linear().parameters(), lr=0.1)
    )
    hooks = PipelineHooks.from_hooks([OptimizerHook(), save(tmp_path, save_step_freq=2)])
    arg = PipelineHookArgs(accelerator, model=model, optimizer=optimizer)
    with hooks.begin("on_loop", arg):
        for number in range(2):
            with hooks.begin(
                "on_step", arg.copy_with_updates(global_step_id=number, step_id=number)
            ):
                pass
        random.seed(3)
        arg.global_step_id = arg.step_id = 2
    assert saved(tmp_path) == [(0, 2), (0, 2)]
    assert load_file(tmp_path / "epoch-0000-step-00000002" / "model.safetensors")[
        "weight"
    ].tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("limit", "config", "kept"),
    [(2, {}, [4, 5]), (None, {}, [1, 2, 3, 4, 5]), (2, {"keep_last": 4}, [2, 3, 4, 5])],
)
def test_where_accelerate_names_checkpoints_its_limit_counts(tmp_path, caplog, limit, config, kept):
    project = ProjectConfiguration(
        str(tmp_path), automatic_checkpoint_naming=True, total_limit=limit
    )
    accelerator = Accelerator(cpu=True, project_config=project)
    theirs = tmp_path / "checkpoints" / "checkpoint_0"
    theirs.mkdir(parents=True)
    with caplog.at_level("INFO", "gradclip"):
        train(SaveCheckpointConfig(save_step_freq=1, **config), accelerator, max_step=5)
    assert [step for _, step in saved(tmp_path / "checkpoints")] == kept
    assert theirs.is_dir()
    said = [record.getMessage() for record in caplog.records]
    assert sum("Save checkpoint at the end of step" in each for each in said) == 5
    assert sum("Remove checkpoint" in each for each in said) == 5 - len(kept)


def test_two_hooks_that_keep_different_numbers_need_two_folders(tmp_path):
    steps = SaveCheckpointConfig(save_root=str(tmp_path), save_step_freq=1, keep_last=1)
    epochs = SaveCheckpointConfig(save_root=f"{tmp_path}/x/..", keep_last=None)
    with pytest.raises(ArgumentValueError, match="keep_last=1 and one with keep_last=None, so one"):
        train([steps, epochs], max_step=2)
    assert not list(tmp_path.iterdir())
    train([steps, epochs.replace(save_root=f"{tmp_path}/x")], max_step=2)
    assert (tmp_path / "x").is_dir()


def test_a_root_that_is_given_is_taken_in_any_case(tmp_path):
    project = ProjectConfiguration(str(tmp_path / "a"), automatic_checkpoint_naming=True)
    accelerator = Accelerator(cpu=True, project_config=project)
    train(save(tmp_path / "b"), accelerator, max_step=1)
    assert saved(tmp_path / "b") == [(0, 1)]


class Holding(PipelineHooks):
    def __init__(self, state):
        super().__init__()
        self.state = state
        self.children = "a name of one's own"

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_hooks_keep_plain_kinds_and_what_is_none_is_refused_before_the_first_step(tmp_path):
    state = {"queue": deque([1, np.float32(2)], maxlen=3), "at": Path("a"), "ids": np.arange(3)}
    train([Holding(state), save(tmp_path / "a")], max_step=1)
    again = Holding({})
    train([again, save(tmp_path / "a")], max_step=1, resume_from=str(tmp_path / "a"))
    assert again.state["queue"] == state["queue"]
    assert again.state["queue"].maxlen == 3
    assert again.state["at"] == Path("a")
    assert again.state["ids"].tolist() == [0, 1, 2]

    steps = []
    counting = PipelineHooks()
    counting.register_hook("on_step", HookContext.from_callable(before=steps.append))
    wrong = Holding({"seen": {"all": [object()]}})
    with pytest.raises(ArgumentTypeError, match=r"Holding.state_dict\(\)\['seen'\]\['all'\]\[0\]"):
        train([wrong, counting, save(tmp_path / "b")], max_step=1)
    assert not steps


def test_functions_that_run_before_models_are_saved_and_loaded_are_called(tmp_path):
    accelerator, seen = Accelerator(cpu=True), []

    def write(models, weights, folder):
        assert [set(each) for each in weights] == [{"weight", "bias"}]
        (Path(folder) / "model.config.json").write_text("{}")

    accelerator.register_save_state_pre_hook(write)
    train(save(tmp_path / "a"), accelerator, max_step=1)
    (checkpoint,) = (tmp_path / "a").iterdir()
    assert "model.config.json" in json.loads((checkpoint / "manifest.json").read_text())["files"]

    accelerator = Accelerator(cpu=True)
    accelerator.register_load_state_pre_hook(lambda models, folder: seen.append(folder))
    train(save(tmp_path / "a"), accelerator, max_step=1, resume_from=str(tmp_path / "a"))
    assert seen == [str(checkpoint)]

    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.pop())
    with pytest.raises(ArgumentValueError, match="took a model out of its list"):
        train(save(tmp_path / "b"), accelerator, max_step=1)


def test_what_does_nothing_is_accepted_and_workers_that_stay_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"SaveCheckpointConfig\(save_model=...\) does nothing"):
        config = save(tmp_path, save_model=False)
    batches = TensorDataset(torch.ones(4, 2))
    loader = DataLoader(batches, 2, num_workers=1, persistent_workers=True)
    with pytest.warns(UserWarning, match="persistent_workers=True"):
        train(config, dataloader=loader, max_step=1)


def test_what_cannot_be_saved_is_known_before_the_first_step(tmp_path):
    steps = PipelineHooks()
    steps.register_hook("on_step", HookContext.from_callable(before=lambda arg: pytest.fail("ran")))
    with pytest.raises(ArgumentValueError, match="set save_root"):
        train([SaveCheckpointConfig(), steps], max_step=1)

    class State:
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    accelerator = Accelerator(cpu=True)
    accelerator.register_for_checkpointing(State())
    with pytest.raises(ArgumentValueError, match=r"register_for_checkpointing\(State\)"):
        train([save(tmp_path), steps], accelerator, max_step=1)
    with (
        pytest.raises(ArgumentValueError, match=r"arg\.accelerator"),
        save(tmp_path)().begin("on_loop", PipelineHookArgs()),
    ):
        pass
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize(
    "fields",
    [
        {"save_epoch_freq": None},
        {"save_epoch_freq": None, "save_when_loop_end": False},
        {"save_step_freq": 0},
        {"save_epoch_freq": 0},
        {"keep_last": 0},
        {"save_step_freq": 2.5},
    ],
)
def test_a_configuration_that_means_nothing_is_refused(fields):
    with pytest.raises(ValidationError):
        SaveCheckpointConfig(save_root="x", **fields)


def test_no_frequency_is_an_error_as_in_the_original():
    """SaveCheckpointConfig(None, None, None), as RoboOrchardLab 0.4.0 is called."""
    with pytest.raises(ValueError, match="either save_epoch_freq or save_step_freq must be"):
        SaveCheckpointConfig(save_root=None, save_epoch_freq=None, save_step_freq=None)
