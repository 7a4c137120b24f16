"""The same script again: it starts, resumes or is refused, and overwrites nothing."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradclip.diagnostics.record import read_record
from gradclip.errors import ArgumentValueError, CheckpointError
from gradclip.pipeline import HookBasedTrainer, ResumeCheckpointConfig, SimpleBatchProcessor
from gradclip.pipeline.hooks import (
    HookContext,
    PipelineHooks,
    RecordHookConfig,
    SaveCheckpointConfig,
)


def trainer(root, hooks=(), accelerator=None, **fields):
    """Four batches an epoch."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    save = SaveCheckpointConfig(save_root=root and str(root), save_step_freq=1, keep_last=2)
    return HookBasedTrainer(
        accelerator=accelerator or Accelerator(cpu=True),
        model=model,
        dataloader=DataLoader(TensorDataset(torch.randn(8, 2)), batch_size=2, shuffle=True),
        batch_processor=SimpleBatchProcessor.from_callable(
            lambda m, batch: (None, m(batch[0]).square().mean())
        ),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        hooks=[*hooks, save],
        **{"max_epoch": 2} | fields,
    )


def content(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_checkpoint_on_another_machine_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="'s3://bucket/run', on another machine: copy"):
        trainer(tmp_path, resume_from="s3://bucket/run")


def test_a_finished_run_is_not_overwritten(tmp_path):
    """The same script without resume_from: neither its checkpoints nor its record."""
    record = RecordHookConfig(path=str(tmp_path / "run.jsonl"))
    trainer(tmp_path / "saved", [record])()
    before = content(tmp_path)
    with pytest.raises(ArgumentValueError, match="8 steps of an earlier run"):
        trainer(tmp_path / "saved", [record])()
    with pytest.raises(CheckpointError, match="got to batch 8") as caught:
        trainer(tmp_path / "saved")()
    for way in ('resume_from="auto"', "another save_root", "move that folder away"):
        assert way in str(caught.value)
    assert content(tmp_path) == before
    # The three ways out.
    done = trainer(tmp_path / "saved", [record], resume_from="auto")
    done()
    assert done.trainer_progress_state.global_step_id == 8
    assert content(tmp_path) == before
    trainer(tmp_path / "other")()
    (tmp_path / "saved").rename(tmp_path / "away")
    trainer(tmp_path / "saved")()


def test_a_run_that_resumes_from_elsewhere_saves_among_no_others(tmp_path):
    trainer(tmp_path / "a", max_step=2)()
    trainer(tmp_path / "b")()
    before = content(tmp_path)
    with pytest.raises(CheckpointError, match="Three ways"):
        trainer(tmp_path / "b", resume_from=tmp_path / "a")()
    assert content(tmp_path) == before
    trainer(tmp_path / "c", resume_from=tmp_path / "a")()
    trainer(tmp_path / "a", resume_from=max((tmp_path / "a").iterdir()))()


@pytest.mark.parametrize(
    "form", [lambda name: name, lambda name: ResumeCheckpointConfig(resume_from=name)]
)
def test_auto_starts_or_resumes(tmp_path, weights, form):
    root = tmp_path / "runs" / "1"
    record = RecordHookConfig(path=str(root / "run.jsonl"))
    auto = form("auto")
    first = trainer(root, [record], resume_from=auto, max_step=3)
    assert first.trainer_progress_state.global_step_id == 0
    first()
    second = trainer(root, [record], resume_from=auto)
    assert second.trainer_progress_state.global_step_id == 3
    second()
    whole = trainer(tmp_path / "whole")
    whole()
    assert weights(second.model) == weights(whole.model)
    assert [each.step for each in read_record(root / "run.jsonl")] == list(range(8))


def test_auto_starts_again_where_a_run_died_before_its_first_checkpoint(tmp_path):
    record = RecordHookConfig(path=str(tmp_path / "run.jsonl"))

    def die(arg):
        raise OSError("no power")

    dying = PipelineHooks()
    dying.register_hook("on_step", HookContext.from_callable(after=die))
    for hooks in ([record, dying], [record]):
        run = trainer(tmp_path, hooks, resume_from="auto", max_step=2)
        if dying in hooks:
            with pytest.raises(OSError, match="power"):
                run()
        else:
            run()
    assert [each.step for each in read_record(tmp_path / "run.jsonl")] == [0, 1]


def test_auto_looks_in_the_project_folder_and_needs_somewhere_to_look(tmp_path):
    project = ProjectConfiguration(str(tmp_path))
    trainer(None, accelerator=Accelerator(cpu=True, project_config=project), max_step=2)()
    again = trainer(
        None, accelerator=Accelerator(cpu=True, project_config=project), resume_from="auto"
    )
    assert again.trainer_progress_state.global_step_id == 2
    model = nn.Linear(1, 1)
    with pytest.raises(ArgumentValueError, match="no SaveCheckpoint among hooks"):
        HookBasedTrainer(
            Accelerator(cpu=True),
            model,
            [torch.ones(1, 1)],
            SimpleBatchProcessor.from_callable(lambda m, b: (None, m(b).sum())),
            torch.optim.SGD(model.parameters()),
            max_step=1,
            resume_from="auto",
        )


def test_auto_takes_the_folder_that_got_farthest(tmp_path):
    trainer(tmp_path / "b", max_step=3)()
    trainer(tmp_path / "a", max_step=1)()
    other = SaveCheckpointConfig(save_root=str(tmp_path / "b"))
    run = trainer(tmp_path / "a", [other], resume_from="auto")
    assert run.trainer_progress_state.global_step_id == 3
    run()


def test_auto_does_not_start_anew_over_what_is_damaged(tmp_path):
    trainer(tmp_path, max_step=2)()
    for folder in tmp_path.iterdir():
        (folder / "model.safetensors").unlink()
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(CheckpointError, match="no complete checkpoint"),
    ):
        trainer(tmp_path, resume_from="auto")


def test_a_hook_of_another_run_is_refused_too(tmp_path):
    save = SaveCheckpointConfig(save_root=str(tmp_path))()
    trainer(tmp_path / "a", [save], max_step=2)()
    with pytest.raises(CheckpointError, match="earlier run"):
        trainer(tmp_path / "b", [save], max_step=2)()


def test_a_trainer_that_goes_on_after_an_error_saves_among_its_own(tmp_path):
    once = iter([True])

    def fail(arg):
        if arg.global_step_id == 3 and next(once, False):
            raise OSError("no power")

    failing = PipelineHooks()
    failing.register_hook("on_batch", HookContext.from_callable(after=fail))
    run = trainer(tmp_path, [failing])
    with pytest.raises(OSError, match="power"):
        run()
    run()
    assert len(list(Path(tmp_path).iterdir())) == 2
