"""Resuming from what RoboOrchardLab 0.4.0 writes: Accelerate's files, and its progress."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from gradclip.errors import CheckpointError
from gradclip.pipeline import HookBasedTrainer, SimpleBatchProcessor
from gradclip.pipeline.hooks import HookContext, PipelineHooks, SaveCheckpointConfig

EPOCH = 4


class Tied(nn.Module):
    """Two names for one weight, of which Accelerate saves one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


def run(*, seedable=False, hooks=(), accumulate=1, **fields):
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulate,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=seedable),
    )
    batches = []

    def forward(model, batch):
        batches.append(batch.tolist())
        return None, model(batch + 0.1 * torch.randn(2)).pow(2).mean()

    trainer = HookBasedTrainer(
        accelerator,
        model,
        DataLoader(torch.arange(16.0).reshape(8, 2), batch_size=2, shuffle=True),
        SimpleBatchProcessor.from_callable(forward),
        optimizer,
        torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5),
        hooks=list(hooks),
        **{"max_epoch": 3} | fields,
    )
    return trainer, batches


def saving(folder, trainer_of, *, after, at, epoch, step, total, counted=0):
    """Save as its trainer does, whose counts, and Accelerate's, at that moment are those given."""
    hooks = PipelineHooks()

    def save(arg):
        if (arg.epoch_id, arg.step_id) == at:
            accelerator = arg.accelerator
            told = SimpleNamespace(
                state_dict=lambda: {"epoch_id": epoch, "step_id": step, "global_step_id": total},
                load_state_dict=None,
            )
            accelerator.register_for_checkpointing(told)
            accelerator.step = counted
            accelerator.save_state(str(folder))
            accelerator._custom_objects.clear()

    hooks.register_hook(after, HookContext.from_callable(after=save))
    return trainer_of(hooks=[hooks])


CASES = {
    "after an epoch": ({"after": "on_epoch", "at": (0, 4), "epoch": 0, "step": 4, "total": 4}, 4),
    "after the loop": ({"after": "on_epoch", "at": (0, 4), "epoch": 1, "step": 0, "total": 4}, 4),
    "in the first batch": (
        {"after": "on_step", "at": (1, 0), "epoch": 1, "step": 0, "total": 4} | {"counted": 1},
        5,
    ),
    "inside": (
        {"after": "on_step", "at": (1, 1), "epoch": 1, "step": 1, "total": 5, "counted": 2},
        6,
    ),
    "in the last batch": ({"after": "on_step", "at": (0, 3), "epoch": 0, "step": 3, "total": 3}, 4),
}


@pytest.mark.parametrize(("place", "done"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("seedable", [False, True])
@pytest.mark.filterwarnings("ignore:the checkpoint of RoboOrchardLab was taken inside an epoch")
def test_the_run_goes_on_with_the_next_batch(tmp_path, weights, place, done, seedable):
    def make(**fields):
        return run(seedable=seedable, **fields)

    whole, batches = saving(tmp_path / "checkpoint_3", make, **place)
    whole()
    resumed, rest = make(resume_from=str(tmp_path))
    progress = resumed.trainer_progress_state
    assert (progress.epoch_id, progress.step_id) == divmod(done, EPOCH)
    assert progress.global_step_id == progress.optimizer_step_id == done
    resumed()
    assert len(batches) == 3 * EPOCH
    assert len(rest) == 3 * EPOCH - done
    # Accelerate's loader is a batch ahead, so its state within an epoch is no batch's own.
    if done == EPOCH:
        assert rest == batches[done:]
        assert weights(resumed.model) == weights(whole.model)
        for key, state in whole.optimizer.state_dict()["state"].items():
            again = resumed.optimizer.state_dict()["state"][key]
            assert all(torch.equal(again[name], state[name]) for name in state)
    elif seedable:
        assert rest == batches[done:]


@pytest.mark.parametrize(
    ("told", "counted", "accumulate", "there", "warned"),
    [
        ((1, 5, 9), 0, 1, (2, 0, 9), None),  # an epoch's end in a run that had resumed
        ((3, 0, 13), 1, 1, (3, 0, 13), None),  # after a loop that max_step ended
        ((3, 0, 14), 2, 1, (3, 0, 14), None),
        ((1, 3, 7), 3, 1, (1, 3, 7), "in which order"),  # after an epoch that it ended
        ((0, 2, 2), 5, 1, (0, 0, 3), "the epoch begins anew"),
        ((0, 2, 2), 3, 2, (0, 2, 2), "the batches of the window, 1, are trained on again"),
        ((1, 0, 4), 1, 2, (1, 0, 4), "the batches of the window, 1, are trained on again"),
        ((0, 1, 1), 2, 2, (0, 2, 2), "in which order"),
    ],
)
def test_where_its_run_was_follows_from_what_was_counted(
    tmp_path, told, counted, accumulate, there, warned, recwarn
):
    saving(tmp_path, run, **CASES["after an epoch"][0])[0]()
    names = ("epoch_id", "step_id", "global_step_id")
    torch.save(dict(zip(names, told, strict=True)), tmp_path / "custom_checkpoint_0.pkl")
    random = torch.load(tmp_path / "random_states_0.pkl", weights_only=False)
    torch.save(random | {"step": counted}, tmp_path / "random_states_0.pkl")
    progress = run(resume_from=str(tmp_path), accumulate=accumulate)[0].trainer_progress_state
    assert (progress.epoch_id, progress.step_id, progress.global_step_id) == there
    assert progress.micro_step_id == 0
    said = "".join(str(each.message) for each in recwarn if each.category is UserWarning)
    assert warned in said if warned else not said


@pytest.mark.parametrize("place", ["after an epoch", "inside"])
def test_more_processes_wrote_it_than_there_are_now(tmp_path, place):
    saving(tmp_path, run, **CASES[place][0])[0]()
    shutil.copy(tmp_path / "random_states_0.pkl", tmp_path / "random_states_1.pkl")
    if place == "inside":
        with pytest.raises(CheckpointError, match="inside an epoch by 2 processes, and 1 cannot"):
            run(resume_from=str(tmp_path))
    else:
        assert run(resume_from=str(tmp_path))[0].trainer_progress_state.epoch_id == 1


def test_its_progress_is_found_among_other_objects(tmp_path):
    saving(tmp_path, run, **CASES["after an epoch"][0])[0]()
    shutil.move(tmp_path / "custom_checkpoint_0.pkl", tmp_path / "custom_checkpoint_1.pkl")
    torch.save({"mine": object}, tmp_path / "custom_checkpoint_0.pkl")
    with pytest.warns(UserWarning, match=r"other objects, in custom_checkpoint_0.pkl, which"):
        again, _ = run(resume_from=str(tmp_path))
    assert again.trainer_progress_state.global_step_id == EPOCH


def test_its_folder_may_be_that_of_the_run_and_auto_finds_it(tmp_path):
    theirs = tmp_path / "checkpoint_3"
    saving(theirs, run, **CASES["after an epoch"][0])[0]()
    config = SaveCheckpointConfig(save_root=str(tmp_path), keep_last=1)
    again, rest = run(hooks=[config], resume_from="auto", max_epoch=2)
    again()
    assert len(rest) == EPOCH
    assert theirs.is_dir()
    # From here on the run's own are taken.
    more, rest = run(hooks=[config], resume_from="auto")
    assert more.trainer_progress_state.epoch_id == 2


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "optimizer.bin").unlink(), "optimizer.bin"),
        (lambda folder: (folder / "random_states_0.pkl").unlink(), "random_states_0.pkl"),
        (
            lambda folder: (folder / "custom_checkpoint_0.pkl").write_bytes(b"?"),
            "cannot be resumed",
        ),
        (
            lambda folder: torch.save({"epoch_id": object}, folder / "custom_checkpoint_0.pkl"),
            "cannot be resumed",
        ),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, spoil, said):
    saving(tmp_path, run, **CASES["after an epoch"][0])[0]()
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=said):
        run(resume_from=str(tmp_path))


def test_weights_of_another_model_are_refused(tmp_path):
    saving(tmp_path, run, **CASES["after an epoch"][0])[0]()

    save_file({"other": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="weights of another model"):
        run(resume_from=str(tmp_path))
