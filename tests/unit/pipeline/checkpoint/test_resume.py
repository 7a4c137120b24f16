"""A run that resumes is the run that was not interrupted, bit for bit."""

import io
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

from gradclip.diagnostics.record import read_record
from gradclip.errors import CheckpointError, DoubleClippingError
from gradclip.pipeline import HookBasedTrainer, ResumeCheckpointConfig, SimpleBatchProcessor
from gradclip.pipeline.checkpoint.training_state import load_training_state
from gradclip.pipeline.hooks import (
    GradientClippingHookConfig,
    HookContext,
    PipelineHooks,
    RecordHookConfig,
    SaveCheckpointConfig,
    ValidationHookConfig,
)
from manifests import replace_file


class Augmented(Dataset):
    """Draws from every generator of the process as it loads."""

    def __len__(self):
        return 20

    def __getitem__(self, item):
        inputs = torch.full((4,), item / 10) + 0.1 * torch.randn(4)
        noise = random.random() + np.random.rand()  # noqa: NPY002
        return inputs, torch.tensor([noise], dtype=torch.float32)


class Remembering:
    """No DataLoader: knows its place in an order of its own, and loads as it goes."""

    def __init__(self, dataset, batch_size, shuffle):
        self.dataset, self.batch_size = dataset, batch_size
        self.place = {"seed": random.randrange(10**6), "epoch": 0, "batches": 0}

    def __iter__(self):
        place = self.place
        generator = torch.Generator().manual_seed(place["seed"] + place["epoch"])
        order = torch.randperm(len(self.dataset), generator=generator).split(self.batch_size)
        for items in order[place["batches"] :]:
            place["batches"] += 1
            yield default_collate([self.dataset[item] for item in items.tolist()])
        place |= {"epoch": place["epoch"] + 1, "batches": 0}

    def state_dict(self):
        return self.place

    def load_state_dict(self, state):
        self.place |= state


def of_torchdata(dataset, batch_size, shuffle):
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    return loaders.StatefulDataLoader(dataset, batch_size, shuffle)


class Run:
    """A run whose every step is noted: number, loss and weights as hex.

    It writes a checkpoint after every step, unless it resumes, for the sake of time.
    """

    def __init__(
        self,
        root,
        *,
        seed=0,
        accumulate=1,
        hooks=(),
        accelerator=None,
        save_step_freq=1,
        loader=DataLoader,
        **fields,
    ):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        self.steps = []
        save = SaveCheckpointConfig(
            save_root=str(root), save_step_freq=save_step_freq, keep_last=None
        )
        note = PipelineHooks()
        note.register_hook("on_step", HookContext.from_callable("note", after=self._note))
        self.model = nn.Sequential(
            nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 1)
        )
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.trainer = HookBasedTrainer(
            accelerator or Accelerator(cpu=True, gradient_accumulation_steps=accumulate),
            self.model,
            loader(Augmented(), batch_size=3, shuffle=True),
            SimpleBatchProcessor.from_callable(self._loss),
            optimizer,
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30),
            hooks=[
                *([] if fields.get("resume_from") else [save]),
                GradientClippingHookConfig(clip_mode="norm", max_norm=0.5),
                *hooks,
                note,
            ],
            **{"max_step": 17} | fields,
        )

    def __call__(self):
        self.trainer()
        return self

    @staticmethod
    def _loss(model, batch):
        inputs, targets = batch
        return None, nn.functional.mse_loss(model(inputs), targets)

    def _note(self, arg):
        state = b"".join(value.numpy().tobytes() for value in arg.model.state_dict().values())
        self.steps.append((arg.global_step_id, float(arg.reduce_loss).hex(), state.hex()))


def checkpoints(root):
    return sorted(p for p in Path(root).iterdir() if p.name.startswith("epoch"))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_goes_on_bit_for_bit_from_every_checkpoint(tmp_path, accumulate):
    """Mid-epoch too, with shuffling, dropout, and a dataset that draws."""
    found = goes_on_from_every_checkpoint(tmp_path, accumulate=accumulate)
    assert found == (17 + 2 if accumulate == 1 else 9)


def test_a_loader_that_keeps_its_state_goes_on_bit_for_bit_from_every_checkpoint(tmp_path):
    assert goes_on_from_every_checkpoint(tmp_path, loader=Remembering) == 17 + 2


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # which torchdata calls
def test_torchdatas_loader_goes_on_bit_for_bit_from_every_checkpoint(tmp_path, accumulate):
    found = goes_on_from_every_checkpoint(tmp_path, accumulate=accumulate, loader=of_torchdata)
    assert found == (17 + 2 if accumulate == 1 else 9)


def goes_on_from_every_checkpoint(tmp_path, **fields):
    whole = Run(tmp_path / "whole", **fields)()
    found = checkpoints(tmp_path / "whole")
    for number, checkpoint in enumerate(found):
        again = Run(tmp_path / str(number), seed=5, resume_from=checkpoint, **fields)
        start = again.trainer.trainer_progress_state.global_step_id
        assert again().steps == whole.steps[start:]
        assert again.trainer.trainer_progress_state == whole.trainer.trainer_progress_state
        last = again.trainer.optimizer.state_dict()
        torch.testing.assert_close(last, whole.trainer.optimizer.state_dict(), rtol=0, atol=0)
    return len(found)


def test_a_run_that_resumed_can_be_resumed_from_at_once(tmp_path):
    whole = Run(tmp_path / "whole")()
    save = SaveCheckpointConfig(save_root=str(tmp_path / "again"), save_step_freq=1)
    middle = checkpoints(tmp_path / "whole")[8]
    Run(tmp_path / "again", seed=5, hooks=[save], max_step=9, resume_from=middle)()
    last = Run(tmp_path / "last", seed=6, resume_from=tmp_path / "again")()
    assert last.steps == whole.steps[9:]


def test_what_hooks_draw_before_the_first_step_does_not_matter(tmp_path):
    def drawing():
        hooks = PipelineHooks()
        draw = HookContext.from_callable(before=lambda arg: torch.rand(random.randint(1, 9)))
        hooks.register_hook("on_loop", draw)
        return hooks

    whole = Run(tmp_path / "whole", hooks=[drawing()])()
    for checkpoint in checkpoints(tmp_path / "whole")[6:9]:
        again = Run(tmp_path / "again", seed=5, hooks=[drawing()], resume_from=checkpoint)()
        assert again.steps == whole.steps[17 - len(again.steps) :]


def test_a_run_that_ended_can_be_made_longer(tmp_path):
    """Also within an accumulation window, whose gradients are part of the checkpoint."""
    whole = Run(tmp_path / "whole", accumulate=4, max_step=17)()
    short = Run(tmp_path / "short", save_step_freq=None, accumulate=4, max_step=10)()
    assert short.trainer.trainer_progress_state.micro_step_id == 3
    longer = Run(tmp_path / "longer", seed=5, accumulate=4, resume_from=tmp_path / "short")
    assert short.steps + longer().steps == whole.steps


def test_what_runs_between_epochs_is_not_run_twice(tmp_path):
    def validation(log):
        def evaluate(model):
            log.append(float(torch.rand(())))

        return ValidationHookConfig(eval_callback=evaluate, epoch_eval_freq=1)

    log = []
    whole = Run(tmp_path / "whole", validation=validation(log))()
    assert len(log) == 3
    for number, checkpoint in enumerate(checkpoints(tmp_path / "whole")[1::2]):
        again_log = []
        again = Run(
            tmp_path / str(number), seed=5, resume_from=checkpoint, validation=validation(again_log)
        )()
        assert again.steps == whole.steps[17 - len(again.steps) :]
        # The last one is of the end, in the middle of an epoch.
        epochs_done = int(checkpoint.name.split("-")[1])
        expected = [] if checkpoint.name.endswith("17") else log[epochs_done:]
        assert again_log == expected


def test_skipped_steps_and_the_record_go_on(tmp_path):
    """The state of hooks is in the checkpoint: the count of skips, the place in the record."""

    def poison(model):
        def before(arg):
            if arg.global_step_id in (3, 4, 8):
                for parameter in model().parameters():
                    parameter.grad[:] = float("nan")

        hooks = PipelineHooks()
        hooks.register_hook("on_model_backward", HookContext.from_callable("poison", after=before))
        return hooks

    def run(name, **fields):
        record = RecordHookConfig(path=str(tmp_path / name / "run.jsonl"))
        made = Run(tmp_path / name, hooks=[record, poison(lambda: made.model)], **fields)
        return made

    whole = run("whole")()
    records = read_record(tmp_path / "whole" / "run.jsonl")
    assert [r.step for r in records if r.skipped] == [3, 4, 8]
    assert whole.trainer.trainer_progress_state.optimizer_step_id == 14
    resumed = run("whole", seed=5, resume_from=checkpoints(tmp_path / "whole")[3])()
    assert resumed.steps == whole.steps[4:]
    again = read_record(tmp_path / "whole" / "run.jsonl")
    assert [(r.step, r.loss, r.norm_pre, r.lr) for r in again if not r.skipped] == [
        (r.step, r.loss, r.norm_pre, r.lr) for r in records if not r.skipped
    ]
    assert [r.step for r in again] == list(range(17))


def test_a_finished_run_trains_no_further_and_writes_nothing(tmp_path):
    Run(tmp_path)()
    before = checkpoints(tmp_path)
    save = SaveCheckpointConfig(save_root=str(tmp_path), save_step_freq=1)
    again = Run(tmp_path, hooks=[save], resume_from=tmp_path)()
    assert again.steps == []
    assert checkpoints(tmp_path) == before


@pytest.mark.parametrize(
    "form", [str, Path, lambda path: ResumeCheckpointConfig(resume_from=str(path))]
)
def test_it_resumes_from_a_folder_in_every_form(tmp_path, form):
    Run(tmp_path, max_step=3)()
    again = Run(tmp_path, resume_from=form(tmp_path))
    assert again.trainer.trainer_progress_state.global_step_id == 3
    seen = []
    again.trainer.hooks.register_hook("on_loop", HookContext.from_callable(before=seen.append))
    again()
    assert (seen[0].start_epoch, seen[0].start_step) == (0, 3)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path):
    whole = Run(tmp_path / "whole")()
    Run(tmp_path / "a", max_step=5)()
    last = checkpoints(tmp_path / "a")[-1]
    weights = last / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Run(tmp_path / "b", resume_from=last)
    with pytest.warns(UserWarning, match="passed over"):
        again = Run(tmp_path / "b", resume_from=tmp_path / "a")
    assert again().steps == whole.steps[4:]


def test_a_checkpoint_of_another_model_is_an_error(tmp_path):
    Run(tmp_path, max_step=1)()
    model = nn.Linear(4, 1)
    with pytest.raises(CheckpointError, match="does not fit this run"):
        HookBasedTrainer(
            Accelerator(cpu=True),
            model,
            DataLoader(Augmented(), batch_size=3),
            SimpleBatchProcessor.from_callable(Run._loss),
            torch.optim.AdamW(model.parameters()),
            max_step=2,
            resume_from=tmp_path,
        )


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_in_a_checkpoint_is_unpickled(tmp_path):
    """The original's trainer state is loaded with weights_only=False."""
    Run(tmp_path / "a", max_step=2)()
    good = checkpoints(tmp_path / "a")[-1]
    marker = tmp_path / "exploded"
    files = [file.name for file in good.iterdir() if file.suffix in {".bin", ".pkl", ".pt"}]
    assert {"optimizer.bin", "scheduler.bin", "hooks.pt", "process_0.pt"} <= set(files)
    for name in files:
        bad = shutil.copytree(good, tmp_path / name)
        torch.save(Bomb(marker), bad / name)
        replace_file(bad, name, (bad / name).read_bytes())
        # Accelerate's file of random states is not used.
        if name.startswith("random_states"):
            Run(tmp_path / "b", resume_from=bad)
        else:
            with pytest.raises(CheckpointError, match="does not fit"):
                Run(tmp_path / "b", resume_from=bad)
        assert not marker.exists()
    torch.load(tmp_path / "hooks.pt" / "hooks.pt", weights_only=False).close()
    assert marker.exists()


@pytest.mark.parametrize("state", [[], None, 7, {"GradientClippingHook:0": [1]}])
def test_a_state_of_hooks_that_is_none_is_refused_before_anything_is_loaded(tmp_path, state):
    Run(tmp_path / "a", max_step=2)()
    bad = checkpoints(tmp_path / "a")[-1]
    written = io.BytesIO()
    torch.save(state, written)
    replace_file(bad, "hooks.pt", written.getvalue())
    again = Run(tmp_path / "b")
    trainer = again.trainer
    before = [parameter.clone() for parameter in again.model.parameters()]
    with pytest.raises(CheckpointError, match=r"hooks\.pt is not what SaveCheckpoint writes"):
        load_training_state(
            bad, trainer.accelerator, trainer.optimizer, trainer.hooks, trainer._position
        )
    assert all(map(torch.equal, before, again.model.parameters()))


def test_a_file_of_a_process_that_the_manifest_does_not_name_is_not_counted(tmp_path):
    whole = Run(tmp_path / "whole", accumulate=3)()
    Run(tmp_path / "a", accumulate=3, max_step=5)()
    last = checkpoints(tmp_path / "a")[-1]
    shutil.copy(last / "process_0.pt", last / "process_1.pt")
    again = Run(tmp_path / "b", accumulate=3, resume_from=last)()
    assert again.steps == whole.steps[5:]


def test_modules_of_the_batch_processor_come_back(tmp_path):
    class Scaled(SimpleBatchProcessor):
        def __init__(self, value):
            self.scale = nn.Linear(1, 1, bias=False)
            nn.init.constant_(self.scale.weight, value)

        def forward(self, model, batch):
            return None, self.scale(model(batch)).sum()

    def run(value, **fields):
        model = nn.Linear(1, 1)
        trainer = HookBasedTrainer(
            Accelerator(cpu=True),
            model,
            [torch.ones(1, 1)],
            Scaled(value),
            torch.optim.SGD(model.parameters(), lr=0.1),
            hooks=SaveCheckpointConfig(save_root=str(tmp_path)),
            max_epoch=1,
            **fields,
        )
        trainer()
        return trainer.batch_processor.scale.weight.item()

    assert run(3.0) == 3.0
    assert run(5.0, resume_from=tmp_path) == 3.0


def test_a_loss_scaler_comes_back(tmp_path):
    def accelerator():
        made = Accelerator(cpu=True)
        made.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)
        made.native_amp = True
        made.state._mixed_precision = "fp16"
        return made

    whole = Run(tmp_path / "whole", accelerator=accelerator())()
    # The scale grew, and overflows lowered it again.
    assert whole.trainer.trainer_progress_state.optimizer_step_id < 17
    for checkpoint in checkpoints(tmp_path / "whole")[2:9:3]:
        again = Run(
            tmp_path / checkpoint.name, seed=5, accelerator=accelerator(), resume_from=checkpoint
        )()
        assert again.steps == whole.steps[17 - len(again.steps) :]
        assert (
            again.trainer.accelerator.scaler.state_dict()
            == whole.trainer.accelerator.scaler.state_dict()
        )


def test_two_clipping_hooks_are_found_before_a_checkpoint_is_looked_for(tmp_path):
    clip = GradientClippingHookConfig(clip_mode="norm", max_norm=1.0)
    with pytest.raises(DoubleClippingError):
        Run(tmp_path, hooks=[clip], resume_from=tmp_path / "nowhere")
