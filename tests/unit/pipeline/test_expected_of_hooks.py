"""What RoboOrchardLab's own tests of trainer, stats and metric expect, written anew."""

import logging
from unittest.mock import MagicMock

import pytest
import torch
from accelerate import Accelerator

from gradclip import EMAClip, GuardClip, NormClip
from gradclip.errors import ArgumentValueError
from gradclip.pipeline import SimpleBatchProcessor, SimpleTrainer
from gradclip.pipeline.hooks import (
    GradientClippingHookConfig,
    HookContext,
    LossTracker,
    LossTrackerConfig,
    MetricEntry,
    MetricTracker,
    MetricTrackerConfig,
    PipelineHookArgs,
    PipelineHooks,
    SaveCheckpoint,
    SaveCheckpointConfig,
    StatsMonitor,
    StatsMonitorConfig,
    ValidationHook,
    ValidationHookConfig,
)


def mocked():
    accelerator, dataloader = MagicMock(), MagicMock()
    accelerator.num_processes, accelerator.is_main_process = 4, True
    dataloader.batch_size = 32
    dataloader.__len__.return_value = 100
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.Adam([{"params": [w], "lr": 0.01} for w in weights], lr=0.0)
    return PipelineHookArgs(
        accelerator, dataloader=dataloader, optimizer=optimizer, max_step=1000, max_epoch=10
    )


def test_stats_ask_the_dataloader():
    monitor, arg = StatsMonitorConfig()(), mocked()
    with monitor.begin("on_loop", arg):
        pass
    assert (monitor.batch_size, monitor.total_batch_size) == (32, 128)
    assert monitor.steps_per_epoch == 100


@pytest.mark.parametrize(("step", "logged"), [(10, 0), (9, 1)])
def test_stats_log_after_steps_without_a_loop(caplog, step, logged):
    monitor, arg = (
        StatsMonitorConfig(batch_size=32, steps_per_epoch=100, step_log_freq=10)(),
        mocked(),
    )
    arg.global_step_id = step
    with caplog.at_level(logging.INFO, "gradclip"), monitor.begin("on_step", arg):
        pass
    assert len(caplog.records) == logged


def test_stats_log_after_an_epoch_without_a_loop(caplog):
    monitor, arg = StatsMonitorConfig(batch_size=32, steps_per_epoch=100)(), mocked()
    with caplog.at_level(logging.INFO, "gradclip"), monitor.begin("on_epoch", arg):
        arg.global_step_id = 10
    assert len(caplog.records) == 1


class Share:
    """The share of predictions that are right."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.right = self.count = 0

    def update(self, outputs, labels):
        self.right += int((outputs == labels).sum())
        self.count += len(labels)

    def compute(self):
        return self.right / max(self.count, 1)


class CustomMetricTracker(MetricTracker):
    def update_metric(self, batch, model_outputs):
        for metric in self.metrics:
            metric.update(model_outputs, batch)


def test_metrics_are_computed_named_and_reset_with_the_epoch():
    metric = Share()
    entry = MetricEntry(names=["accuracy"], metric=metric)
    assert (entry.names, entry.metric) == (["accuracy"], metric)
    tracker = MetricTrackerConfig(
        class_type=CustomMetricTracker, metric_entrys=[entry], reset_by="epoch", step_log_freq=2
    )()
    labels = torch.tensor([1, 0, 1])
    arg = PipelineHookArgs(MagicMock(), step_id=1, batch=labels, model_outputs=labels)
    with tracker.begin("on_batch", arg):
        pass
    with tracker.begin("on_step", arg):
        pass
    assert list(entry.get()) == [("accuracy", 1.0)]
    with tracker.begin("on_epoch", arg):
        pass
    assert metric.compute() == 0.0


@pytest.mark.filterwarnings("ignore:SimpleTrainer is deprecated")
def test_a_trainer_of_a_list_runs_whatever_hooks_are_put_in_place(linear):
    counts = []

    class Counting(PipelineHooks):
        def __init__(self):
            super().__init__()
            for channel in ("on_loop", "on_epoch", "on_step"):
                self.register_hook(
                    channel=channel,
                    hook=HookContext.from_callable(
                        before=lambda args, c=channel: counts.append(("before", c)),
                        after=lambda args, c=channel: counts.append(("after", c)),
                    ),
                )

    class Processor(SimpleBatchProcessor):
        def forward(self, model, batch):
            outputs = model(batch)
            return outputs, torch.mean((outputs - 1) ** 2)

    def make():
        model = linear([0.1, 0.2])
        optimizer = torch.optim.SGD(params=model.parameters(), lr=0.01)
        return SimpleTrainer(
            model=model,
            dataloader=[torch.tensor([[0.5, 0.5]]), torch.tensor([[0.1, 0.2]])],
            optimizer=optimizer,
            lr_scheduler=torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1),
            accelerator=Accelerator(cpu=True),
            batch_processor=Processor(),
            max_epoch=1,
        )

    trainer = make()
    assert trainer.max_epoch == 1
    trainer.hooks = Counting()
    trainer()
    assert [counts.count((when, "on_step")) for when in ("before", "after")] == [2, 2]
    assert counts[0] == ("before", "on_loop")
    assert counts[-1] == ("after", "on_loop")

    trainer = make()
    trainer()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.0001)
    assert trainer.metric is None


class ByKey:
    """Outputs that have keys, and nothing else of a dictionary."""

    def keys(self):
        return ["loss"]

    def __getitem__(self, key):
        return torch.tensor(4.0)


class AddsOne(LossTracker):
    def update(self, accelerator, model_outputs):
        super().update(accelerator, model_outputs)
        self.cached_loss["more"] = self.cached_loss["loss"] + 1


class KeepsItsOwn(LossTracker):
    def reset_cached_loss(self):
        self.cached_loss, self.moving_average_count = {}, {}

    def update(self, accelerator, model_outputs):
        self.cached_loss["more"] = 5.0


@pytest.mark.parametrize("kind", [AddsOne, KeepsItsOwn])
def test_what_a_subclass_writes_among_the_losses_is_logged(caplog, kind):
    tracker = kind(LossTrackerConfig(step_log_freq=1))
    arg = PipelineHookArgs(model_outputs=ByKey())
    with caplog.at_level(logging.INFO, "gradclip"), tracker.begin("on_step", arg):
        pass
    assert "more[5.0000]" in caplog.text
    assert tracker.cached_loss == {}


@pytest.mark.parametrize(
    ("kind", "config", "methods"),
    [
        (LossTracker, LossTrackerConfig(), "_on_step_end"),
        (StatsMonitor, StatsMonitorConfig(), "_on_loop_begin _on_step_end _on_epoch_end"),
        (
            MetricTracker,
            MetricTrackerConfig(metric_entrys=[]),
            "_on_loop_begin _on_batch_end _on_step_end _on_epoch_end",
        ),
        (
            SaveCheckpoint,
            SaveCheckpointConfig(save_root="."),
            "_on_step_end _on_epoch_end _on_loop_end",
        ),
    ],
)
def test_what_a_subclass_does_instead_is_done(kind, config, methods):
    seen = []
    for name in methods.split():
        other = type(kind.__name__, (kind,), {name: lambda self, arg: seen.append(arg)})(config)
        channel = f"on_{name.split('_')[2]}"
        when = "before" if name.endswith("begin") else "after"
        (hook,) = (other.hooks[channel][n] for n in range(len(other.hooks[channel])))
        getattr(hook, when)(None)
    assert len(seen) == len(methods.split())


class Third(ValidationHook):
    def need_eval(self, arg):
        return arg.global_step_id == 2 or (arg.global_step_id == 0 and super().need_eval(arg))


def test_a_subclass_decides_when_to_evaluate():
    seen = []
    config = ValidationHookConfig(eval_callback=seen.append, step_eval_freq=1)
    hook, model = Third(config), torch.nn.Linear(1, 1)
    for step in range(4):
        with hook.begin("on_step", PipelineHookArgs(model=model, global_step_id=step)):
            pass
    assert seen == [model, model]


def _clipped(hook, arg):
    with hook.begin("on_step", arg):
        arg.optimizer.param_groups[0]["params"][0].grad = torch.tensor([3.0, 4.0])
    return arg.clip_result.to_host()


def test_a_limit_may_be_set_on_the_clipping_hook():
    hook = GradientClippingHookConfig(clip_mode="norm", max_norm=1.0, clip_value=3.5)()
    assert (hook.clip_mode, hook.max_norm, hook.norm_type, hook.clip_value) == ("norm", 1, 2, 3.5)
    hook.norm_type = 1.0  # before the first step
    arg = PipelineHookArgs(optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))]))
    assert _clipped(hook, arg).norm_pre == 7.0
    hook.max_norm = 2.0
    stats = _clipped(hook, arg)
    assert (hook.max_norm, stats.threshold, "max_norm=2.0" in stats.new_policy) == (2.0, 2.0, True)
    hook.policy = NormClip(max_norm=0.5, norm_type=1.0)
    assert (hook.max_norm, _clipped(hook, arg).threshold) == (0.5, 0.5)
    hook.policy = NormClip(max_norm=0.5, norm_type=1.0, skip_above=6.0)
    assert (hook.max_norm, _clipped(hook, arg).skip_reason) == (None, "policy")
    with pytest.raises(ArgumentValueError, match="assign max_norm would change nothing"):
        hook.max_norm = 3.0


def test_a_policy_that_no_clipper_takes_is_refused_before_there_is_one():
    hook = GradientClippingHookConfig(policy=GuardClip())()
    for bad in ([], [None], -1.0, EMAClip(on_spike="skip", max_spikes=26)):
        with pytest.raises(ArgumentValueError):
            hook.policy = bad
        assert hook.policy == GuardClip()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("norm_type", 1.0, "norm_type of '\\*' is 2.0"),
        ("clip_value", 3.0, "assign clip_value would change nothing"),
        ("clip_mode", "value", "clip_value must be specified"),
        ("max_norm", -1.0, "max_norm"),
        ("policy", EMAClip(), "scope"),
        ("nonfinite", "raise", "assign nonfinite would change nothing"),
    ],
)
def test_what_would_change_nothing_or_cannot_be_is_refused_by_the_clipping_hook(name, value, said):
    hook = GradientClippingHookConfig(clip_mode="norm", max_norm=1.0)()
    arg = PipelineHookArgs(optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))]))
    _clipped(hook, arg)
    with pytest.raises(ValueError, match=said):
        setattr(hook, name, value)
    assert (hook.clip_mode, hook.max_norm, hook.norm_type, hook.clip_value) == ("norm", 1, 2, None)
    assert _clipped(hook, arg).threshold == 1.0
