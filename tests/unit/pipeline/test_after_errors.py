"""A run that failed, or was cut inside a window, and goes on."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradclip.clipping import NormClip
from gradclip.config import dump
from gradclip.errors import ArgumentTypeError, ConfigError, NonFiniteGradientError
from gradclip.pipeline import HookBasedTrainer, SimpleBatchProcessor
from gradclip.pipeline.hooks import (
    GradientClippingHookConfig,
    HookContext,
    PipelineHooks,
    SaveCheckpointConfig,
)


class WithALossOfItsOwn(SimpleBatchProcessor):
    """Its module has parameters that the model does not hold."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.loss = nn.Linear(1, 1)
        self.fail_at = fail_at
        self.seen = []

    def forward(self, model, batch):
        inputs, targets = batch
        self.seen.append(inputs[0, 0].item())
        if len(self.seen) == self.fail_at:
            raise OSError("the disk is gone")
        outputs = model(inputs)
        return outputs, ((self.loss(outputs) - targets) ** 2).mean()


def trainer(*, fail_at=None, accumulate=1, max_step=8, hooks=(), resume_from=None):
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    processor = WithALossOfItsOwn(fail_at)
    parameters = [*model.parameters(), *processor.loss.parameters()]
    data = TensorDataset(torch.randn(44, 2), torch.randn(44, 1))
    return HookBasedTrainer(
        accelerator=Accelerator(cpu=True, gradient_accumulation_steps=accumulate),
        model=model,
        dataloader=DataLoader(data, batch_size=4),
        batch_processor=processor,
        optimizer=torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        hooks=hooks,
        max_step=max_step,
        grad_clip=GradientClippingHookConfig(clip_mode="norm", max_norm=1.0),
        resume_from=resume_from,
    )


def weights(run):
    tensors = [*run.model.parameters(), *run.batch_processor.loss.parameters()]
    return [tensor.detach().clone() for tensor in tensors]


def test_a_window_that_a_checkpoint_cuts_keeps_every_gradient(tmp_path):
    """Also of parameters that are not the model's."""
    whole = trainer(accumulate=4)
    whole()
    saving = SaveCheckpointConfig(save_root=str(tmp_path))
    trainer(accumulate=4, max_step=6, hooks=[saving])()
    rest = trainer(accumulate=4, resume_from=tmp_path)
    rest()
    assert all(map(torch.equal, weights(rest), weights(whole)))


@pytest.mark.parametrize("fail_at", [1, 3])
def test_a_batch_that_failed_is_trained_when_the_run_goes_on(fail_at):
    whole = trainer(max_step=11)
    whole()
    run = trainer(fail_at=fail_at, max_step=11)
    with pytest.raises(OSError, match="disk"):
        run()
    run()
    assert run.trainer_progress_state.global_step_id == 11
    seen = run.batch_processor.seen
    assert seen[fail_at - 1] == seen[fail_at]
    assert all(map(torch.equal, weights(run), weights(whole)))


def test_nothing_steps_on_what_a_failure_left_of_a_window():
    def fail(arg):
        calls.append(arg)
        if len(calls) == 2:
            raise OSError("the disk is gone")

    calls = []
    failing = PipelineHooks()
    failing.register_hook("on_model_backward", HookContext.from_callable(after=fail))
    run = trainer(accumulate=4, hooks=[failing], max_step=5)
    start = weights(run)
    with pytest.raises(OSError, match="disk"):
        run()
    assert all(map(torch.equal, weights(run), start))
    run()
    # The window began anew, with its first batch.
    assert run.trainer_progress_state.micro_step_id == 1
    fresh = trainer(accumulate=4, max_step=5)
    fresh()
    assert all(map(torch.equal, weights(run), weights(fresh)))
    assert not all(map(torch.equal, weights(run), start))


def test_an_optimizer_that_needs_a_closure_is_refused_at_once():
    model = nn.Linear(2, 1)
    with pytest.raises(ArgumentTypeError, match="closure"):
        HookBasedTrainer(
            model=model,
            dataloader=[],
            batch_processor=SimpleBatchProcessor.from_callable(lambda m, b: (None, None)),
            optimizer=torch.optim.LBFGS(model.parameters()),
            max_step=1,
        )


def test_patterns_that_toml_would_turn_around_are_not_written(tmp_path):
    """tomli-w writes plain values before tables, and the first pattern that matches wins."""
    config = GradientClippingHookConfig(policy={"*.weight": NormClip(max_norm=2.0), "head.*": 1.0})
    with pytest.raises(ConfigError, match="order"):
        dump(config, tmp_path / "config.toml")
    for suffix in ("yaml", "json"):
        dump(config, tmp_path / f"config.{suffix}")
    assert not (tmp_path / "config.toml").exists()


def test_a_run_goes_on_after_a_step_that_was_unscaled_and_not_made():
    """A loss scaler refuses to unscale an optimizer twice, if nobody tells it."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    model, bad = nn.Linear(2, 1), [1]

    def forward(model, batch):
        loss = model(batch[0]).square().mean()
        return {}, loss * (float("nan") if bad and bad.pop() else 1.0)

    run = HookBasedTrainer(
        accelerator=accelerator,
        model=model,
        dataloader=DataLoader(TensorDataset(torch.ones(16, 2)), batch_size=4),
        batch_processor=SimpleBatchProcessor.from_callable(forward),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        grad_clip=GradientClippingHookConfig(policy=1.0, nonfinite="raise"),
        max_step=2,
    )
    before = model.weight.detach().clone()
    with pytest.raises(NonFiniteGradientError):
        run()
    run()
    assert not torch.equal(model.weight, before)
    assert accelerator.scaler.get_scale() == 16.0
