"""RoboOrchardLab's older trainer, and the names that gradclip leaves out."""

from importlib import import_module

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

import gradclip.pipeline.hooks
from gradclip.errors import ArgumentTypeError, ArgumentValueError, GradClipError
from gradclip.pipeline import (
    HookBasedTrainer,
    ResumeCheckpointConfig,
    SimpleBatchProcessor,
    SimpleTrainer,
)
from gradclip.pipeline.hooks import (
    GradientClippingHookConfig,
    ModelOutput,
    ModelOutputHasLossKeys,
)

pytestmark = pytest.mark.filterwarnings("ignore:SimpleTrainer is deprecated")


class Mean:
    """A metric that asks for the accelerator."""

    def __init__(self):
        self.values, self.modes = [], []

    def update(self, batch, outputs):
        self.values.append(float(outputs.sum()))
        self.modes.append(outputs.requires_grad)

    def compute(self, accelerator):
        assert accelerator.num_processes == 1
        return sum(self.values) / len(self.values)

    def reset(self):
        self.values = []


def make(cls=SimpleTrainer, **fields):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Dropout(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = DataLoader(torch.arange(16.0).reshape(8, 2), batch_size=2)
    given = {
        "model": model,
        "accelerator": Accelerator(cpu=True),
        "batch_processor": SimpleBatchProcessor.from_callable(lambda m, b: (m(b), m(b).sum())),
        "dataloader": data,
        "optimizer": optimizer,
        "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1),
        "max_epoch": 1,
    }
    return cls(**given | fields)


def test_it_trains_as_the_other_trainer_does(weights):
    old = make(grad_clip_mode="norm", grad_max_norm=0.1)
    old()
    new = make(
        HookBasedTrainer, grad_clip=GradientClippingHookConfig(clip_mode="norm", max_norm=0.1)
    )
    new()
    assert weights(old.model) == weights(new.model)


def test_it_is_deprecated_from_birth():
    with pytest.warns(DeprecationWarning, match="use HookBasedTrainer"):
        make()


@pytest.mark.parametrize("trains", [True, False])
def test_eval_goes_through_the_validation_data(trains, caplog):
    metric = Mean()
    rows = DataLoader(torch.ones(20, 2), batch_size=1)
    nothing = {} if trains else {"dataloader": None, "optimizer": None, "lr_scheduler": None}
    run = make(val_dataloader=rows, metric=metric, step_eval_freq=2, **nothing)
    total = float(run.model[0].weight.detach().sum())
    with caplog.at_level("INFO", "gradclip"):
        assert run.eval() == pytest.approx(total)  # without dropout
    assert [each.message for each in caplog.records] == ["BEGIN EVAL", "eval: 10", "eval: 20"]
    assert metric.values == []
    assert not any(metric.modes)
    assert run.model.training
    if trains:
        run()
        assert len(metric.modes) == 20 + 2 * 20
    else:
        with pytest.raises(ArgumentTypeError, match="dataloader is None"):
            run()


def test_what_it_cannot_do_is_said():
    with pytest.raises(ArgumentValueError, match="lr_scheduler_step_at = 'epoch'"):
        make(lr_scheduler_step_at="epoch")
    with pytest.raises(ArgumentValueError, match=r"eval\(\) needs val_dataloader and metric"):
        make().eval()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("gradclip.pipeline.hooks", "ClearCacheHook"),
        ("gradclip.pipeline.hooks.memory", "ClearCacheHookConfig"),
        ("gradclip.pipeline.hooks", "SaveModelConfig"),
        ("gradclip.pipeline.hooks.checkpoint", "SaveModel"),
    ],
)
def test_names_that_are_left_out_say_what_to_use(module, name):
    with pytest.raises(ImportError, match=f"has no {name}: ") as caught:
        exec(f"from {module} import {name}")
    assert isinstance(caught.value, GradClipError)
    assert not hasattr(gradclip.pipeline.hooks, "Anything")


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("batch_processor.mixin", "BatchProcessorMixin"),
        ("batch_processor.simple", "BatchProcessorFromCallable LossNotProvidedError"),
        ("hook_based_trainer", "HookBasedTrainer PipelineHookOrConfigType ResumeCheckpointConfig"),
        ("hook_based_trainer", "GradientClippingHookConfig ValidationHookConfig"),
        ("hooks.loss_tracker", "LossTracker LossTrackerConfig LossMovingAverageTracker"),
        ("hooks.metric", "MetricEntry MetricTracker MetricTrackerConfig"),
        ("hooks.mixin", "ClassType ModelOutput ModelOutputHasLossKeys PipelineHooks"),
        ("hooks.stats", "StatsMonitor StatsMonitorConfig"),
        ("trainer", "SimpleTrainer"),
    ],
)
def test_the_modules_of_robo_orchard_lab_are_there(module, names):
    found = import_module(f"gradclip.pipeline.{module}")
    assert all(hasattr(found, name) for name in names.split())


def test_outputs_are_told_by_what_they_have():
    assert isinstance({}, ModelOutput)
    assert not isinstance({}, ModelOutputHasLossKeys)
    with pytest.warns(UserWarning, match=r"ResumeCheckpointConfig\(cache_dir=...\) does nothing"):
        ResumeCheckpointConfig(resume_from="a", cache_dir="/tmp/b")
