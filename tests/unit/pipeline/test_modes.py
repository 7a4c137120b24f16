"""Optimizers that have modes, as schedule-free ones do: what is evaluated, saved, left behind."""

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradclip.pipeline import HookBasedTrainer, SimpleBatchProcessor
from gradclip.pipeline.hooks import (
    HookContext,
    PipelineHookArgs,
    PipelineHooks,
    SaveCheckpointConfig,
    ValidationHookConfig,
)


class ScheduleFree(torch.optim.Optimizer):
    """SGD as in Defazio et al. 2024 (arXiv:2405.15682): steps at y, and is used at x."""

    def __init__(self, parameters, lr=0.1, beta=0.9):
        super().__init__(parameters, {"lr": lr, "beta": beta, "k": 0, "train_mode": False})

    def move(self, *, train):
        for group in self.param_groups:
            if group["train_mode"] != train:
                beta = group["beta"]
                for parameter in group["params"]:
                    if "z" in self.state[parameter]:
                        weight = 1 - beta if train else 1 - 1 / beta
                        parameter.data.lerp_(self.state[parameter]["z"], weight)
                group["train_mode"] = train

    def train(self):
        self.move(train=True)

    def eval(self):
        self.move(train=False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"], "it steps at y alone"
            group["k"] += 1
            for parameter in group["params"]:
                z = self.state[parameter].setdefault("z", parameter.detach().clone())
                z.sub_(parameter.grad, alpha=group["lr"])
                # x = (y - (1 - beta) z_before) / beta, averaged with z, and y between both
                x = parameter.lerp(z + group["lr"] * parameter.grad, 1 - 1 / group["beta"])
                x.lerp_(z, 1 / group["k"])
                parameter.copy_(x.lerp(z, 1 - group["beta"]))


def averaged(optimizer):
    """x, computed from y and z."""
    return [
        p.detach().lerp(optimizer.state[p]["z"], 1 - 1 / group["beta"])
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def trainer(hooks=(), **fields):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    data = TensorDataset(torch.randn(24, 3), torch.randn(24, 1))
    return HookBasedTrainer(
        accelerator=Accelerator(cpu=True),
        model=model,
        dataloader=DataLoader(data, batch_size=4),
        batch_processor=SimpleBatchProcessor.from_callable(
            lambda m, batch: (None, nn.functional.mse_loss(m(batch[0]), batch[1]))
        ),
        optimizer=ScheduleFree(model.parameters()),
        hooks=hooks,
        **{"max_step": 10} | fields,
    )


def test_what_is_evaluated_and_saved_is_what_is_to_be_used(tmp_path):
    """schedule_free#48: it was y, 0.03 off x."""
    wanted, seen = [], []

    def note(arg):
        wanted.append(averaged(arg.optimizer.optimizer))

    noting = PipelineHooks()
    noting.register_hook("on_optimizer_step", HookContext.from_callable(after=note))
    run = trainer(
        [
            noting,
            SaveCheckpointConfig(
                save_root=str(tmp_path), save_step_freq=1, save_epoch_freq=None, keep_last=None
            ),
        ],
        validation=ValidationHookConfig(
            eval_callback=lambda model: seen.append(
                [p.detach().clone() for p in model.parameters()]
            ),
            step_eval_freq=1,
        ),
    )
    run()
    saved = [
        [load_file(folder / "model.safetensors")[name] for name in ("weight", "bias")]
        for folder in sorted(tmp_path.iterdir())
    ]
    assert len(wanted) == len(seen) == len(saved) == 10
    torch.testing.assert_close(seen, wanted)
    torch.testing.assert_close(saved, wanted)
    # And what is left is that too; it is no y.
    torch.testing.assert_close([p.detach() for p in run.model.parameters()], wanted[-1])
    assert (run.model.weight - run.optimizer.state[run.model.weight]["z"]).abs().max() > 1e-3


def test_a_run_that_resumes_goes_on_at_y(tmp_path, weights):
    whole = trainer([SaveCheckpointConfig(save_root=str(tmp_path), save_step_freq=4)])
    whole()
    folder = min(tmp_path.iterdir())
    torch.manual_seed(5)
    again = trainer(
        [SaveCheckpointConfig(save_root=str(tmp_path / "again"), save_step_freq=4)],
        resume_from=folder,
    )
    again()
    assert weights(again.model) == weights(whole.model)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_the_mode_comes_back_though_evaluation_fails(error):
    once = iter([True])

    def evaluate(model):
        if next(once, False):
            raise error("it failed")

    run = trainer(validation=ValidationHookConfig(eval_callback=evaluate, step_eval_freq=2))
    with pytest.raises(error):
        run()
    assert not run.optimizer.param_groups[0]["train_mode"]
    run()
    assert run.trainer_progress_state.global_step_id == 10


def test_an_optimizer_that_is_in_evaluation_stays_there():
    model = nn.Linear(1, 1)
    optimizer = ScheduleFree(model.parameters())
    hook = ValidationHookConfig(eval_callback=lambda model: None, step_eval_freq=1)()
    with hook.begin("on_step", PipelineHookArgs(model=model, optimizer=optimizer)):
        pass
    assert not optimizer.param_groups[0]["train_mode"]
