"""Parameter groups that were added while a run went on: Lightning#21901."""

import shutil

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradclip.errors import CheckpointError
from gradclip.pipeline import HookBasedTrainer, SimpleBatchProcessor
from gradclip.pipeline.hooks import (
    GradientClippingHookConfig,
    HookContext,
    PipelineHooks,
    SaveCheckpointConfig,
)


class Unfreezing(PipelineHooks):
    """Trains the head, from the second epoch on the body too, and from the third more of it."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.register_hook("on_epoch", HookContext.from_callable(before=self.unfreeze))

    def unfreeze(self, arg):
        if arg.step_id == 0 and arg.epoch_id in (1, 2):
            layer = self.body[arg.epoch_id - 1]
            layer.requires_grad_(True)
            group = {"params": list(layer.parameters()), "lr": 0.01 * arg.epoch_id}
            arg.optimizer.optimizer.add_param_group(group)


def trainer(root, optimizer=torch.optim.AdamW, accumulate=1, seed=0, every=100, **fields):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(20, 3, generator=generator))
    save = SaveCheckpointConfig(
        save_root=str(root), save_epoch_freq=None, save_step_freq=every, keep_last=None
    )
    return HookBasedTrainer(
        accelerator=Accelerator(cpu=True, gradient_accumulation_steps=accumulate),
        model=model,
        dataloader=DataLoader(data, batch_size=4, shuffle=True),
        batch_processor=SimpleBatchProcessor.from_callable(
            lambda m, batch: (None, m(batch[0]).square().mean())
        ),
        optimizer=optimizer(model[1].parameters(), lr=0.1),
        grad_clip=GradientClippingHookConfig(clip_mode="norm", max_norm=0.5),
        hooks=[Unfreezing(model[0]), save],
        **{"max_epoch": 4} | fields,
    )


@pytest.mark.parametrize(
    ("optimizer", "accumulate"), [(torch.optim.AdamW, 1), (torch.optim.SGD, 2)]
)
def test_a_run_that_unfroze_a_part_resumes_everywhere(tmp_path, weights, optimizer, accumulate):
    """With one more group, and with two; the script begins frozen: Lightning#21901."""
    whole = trainer(tmp_path / "whole", optimizer, accumulate, every=6)
    whole()
    for number, folder in enumerate(sorted((tmp_path / "whole").iterdir())[:2]):
        again = trainer(tmp_path / str(number), optimizer, accumulate, seed=5, resume_from=folder)
        again()
        assert weights(again.model) == weights(whole.model)
        rates = [group["lr"] for group in again.optimizer.param_groups]
        assert rates == [0.1, 0.01, 0.02]


def test_the_gradients_of_an_open_window_find_their_group(tmp_path, weights):
    whole = trainer(tmp_path / "whole", accumulate=3)
    whole()
    cut = trainer(tmp_path / "cut", accumulate=3, max_step=12)
    cut()
    assert cut.trainer_progress_state.micro_step_id == 2
    again = trainer(tmp_path / "cut", accumulate=3, seed=5, resume_from="auto")
    again()
    assert weights(again.model) == weights(whole.model)


def test_a_checkpoint_that_has_no_names_loads_as_before(tmp_path):
    """One of an older version."""
    trainer(tmp_path / "a", max_step=2)()
    folder = shutil.copytree(max((tmp_path / "a").iterdir()), tmp_path / "old")
    (folder / "parameters.pt").unlink()
    run = trainer(tmp_path / "b")
    from gradclip.pipeline.checkpoint.weights import load_weights  # noqa: PLC0415

    load_weights(folder, run.accelerator)


def test_a_group_whose_parameters_nobody_knows_is_named(tmp_path):
    def add(arg):
        arg.optimizer.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})

    run = trainer(tmp_path / "a", max_step=1)
    adding = HookContext.from_callable(before=add)
    run.hooks.register_hook("on_loop", adding)
    run()
    with pytest.raises(CheckpointError, match=r"group 1 was added .* none of the models"):
        trainer(tmp_path / "b", resume_from=tmp_path / "a")
