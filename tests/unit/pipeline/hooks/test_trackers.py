"""Losses, speed and metrics: what is logged, and what goes to the trackers."""

import logging
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch import nn
from torch.utils.data import DataLoader

from gradclip.errors import ArgumentTypeError, ArgumentValueError
from gradclip.pipeline import HookBasedTrainer, SimpleBatchProcessor
from gradclip.pipeline.hooks import (
    HookContext,
    LossMovingAverageTrackerConfig,
    LossTrackerConfig,
    MetricEntry,
    MetricTracker,
    MetricTrackerConfig,
    PipelineHookArgs,
    PipelineHooks,
    SaveCheckpointConfig,
    StatsMonitorConfig,
)


class Kept(GeneralTracker):
    """Keeps what is logged."""

    name = "kept"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.scalars = []

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **kwargs):
        self.scalars += [(name, step, value) for name, value in values.items()]


def run(hooks, outputs=None, *, rows=8, accumulate=1, **limits):
    """Train on the numbers 1, 2, ..., two a batch, so that losses are 1.5, 3.5, ..."""
    kept = Kept()
    accelerator = Accelerator(cpu=True, log_with=kept, gradient_accumulation_steps=accumulate)
    accelerator.init_trackers("test")
    model = nn.Linear(1, 1)

    def forward(model, batch):
        value = batch.mean()
        told = (
            {"a_loss": value, "loss_b": 10 * value, "other": value} if outputs is None else outputs
        )
        return told, 0 * model(batch).sum() + value

    optimizer = torch.optim.SGD(
        [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.2}]
    )
    trainer = HookBasedTrainer(
        accelerator,
        model,
        DataLoader(torch.arange(1.0, rows + 1).reshape(rows, 1), batch_size=2),
        SimpleBatchProcessor.from_callable(forward),
        optimizer,
        hooks=hooks,
        **limits or {"max_epoch": 1},
    )
    return trainer, kept.scalars


def messages(caplog):
    return [each.message for each in caplog.records if "TRAINING" not in each.message]


@pytest.mark.smoke
def test_losses_are_logged_as_means_since_the_last_log(caplog):
    config = LossTrackerConfig(step_log_freq=2, log_total_loss=True)
    with caplog.at_level(logging.INFO, "gradclip"):
        trainer, scalars = run(config, max_epoch=2)
        trainer()
    assert scalars[:6] == [
        ("Loss/a_loss", 1, 2.5),
        ("Loss/loss_b", 1, 25.0),
        ("Loss/Total_Loss", 1, 27.5),
        ("Loss/a_loss", 3, 6.5),
        ("Loss/loss_b", 3, 65.0),
        ("Loss/Total_Loss", 3, 71.5),
    ]
    assert [step for _, step, _ in scalars] == [1] * 3 + [3] * 3 + [5] * 3 + [7] * 3
    assert messages(caplog)[0] == (
        "Epoch[0/1] Step[1] GlobalStep[1/NA]: a_loss[2.5000]\tloss_b[25.0000]\ttotal_loss[27.5000]"
    )


def test_a_run_that_resumes_logs_what_the_whole_run_logs(tmp_path):
    whole, all_scalars = run(LossTrackerConfig(step_log_freq=4), max_epoch=2)
    whole()
    save = SaveCheckpointConfig(save_root=str(tmp_path), save_epoch_freq=9)
    first, scalars = run([LossTrackerConfig(step_log_freq=4), save], max_step=6)
    first()
    again, rest = run([LossTrackerConfig(step_log_freq=4), save], max_epoch=2, resume_from="auto")
    again()
    assert scalars + rest == all_scalars


def test_an_epoch_that_a_stop_cuts_is_not_said_to_be_over(caplog):
    stopping = PipelineHooks()
    stopping.register_hook(
        "on_step", HookContext.from_callable(after=lambda arg: arg.request_stop())
    )
    metric = MetricTrackerConfig(class_type=Tracking, metric_entrys=MetricEntry(["a", "b"], Sum()))
    with caplog.at_level(logging.INFO, "gradclip"):
        run([stopping, StatsMonitorConfig(), metric])[0]()
    assert messages(caplog) == []


def test_the_losses_of_the_last_batch_alone():
    trainer, scalars = run(LossTrackerConfig(step_log_freq=4, moving_average=False))
    trainer()
    assert scalars == [("Loss/a_loss", 3, 7.5), ("Loss/loss_b", 3, 75.0)]


class Told(dict):
    def loss_keys(self):
        return ["other"]


def test_outputs_may_say_themselves_which_are_losses():
    outputs = Told(loss=torch.tensor(1.0), other=torch.tensor([2.0, 4.0]))
    trainer, scalars = run(LossTrackerConfig(step_log_freq=4), outputs)
    trainer()
    assert scalars == [("Loss/other", 3, 3.0)]


@pytest.mark.parametrize(
    ("outputs", "said"), [(torch.ones(1), "of type Tensor"), ({"loss": 1.0}, "of type float")]
)
def test_outputs_without_tensors_by_name_are_refused(outputs, said):
    trainer, _ = run(LossTrackerConfig(), outputs)
    with pytest.raises(ArgumentTypeError, match=said):
        trainer()


@pytest.mark.parametrize("each", [1, 100])
def test_batches_that_come_again_count_once_and_many_batches_stay_few_tensors(each):
    failing = iter([False] * (each + 2) + [True] + [False] * 400)

    def fail(arg):
        if next(failing):
            raise KeyError

    broken = PipelineHooks()
    broken.register_hook("on_model_forward", HookContext.from_callable(before=fail))
    tracking = LossTrackerConfig(step_log_freq=each + 5)()
    trainer, scalars = run([tracking, broken], rows=2 * (each + 5), accumulate=3)
    with pytest.raises(KeyError):
        trainer()
    assert len(tracking._batches) <= 66
    trainer()
    losses = [2 * number + 1.5 for number in range(each + 5)]
    ((_, _, mean), _) = scalars
    assert math.isclose(mean, sum(losses) / len(losses), rel_tol=1e-6)


def test_the_old_names_have_their_defaults_and_warn():
    with pytest.warns(DeprecationWarning, match="use LossTrackerConfig"):
        config = LossMovingAverageTrackerConfig()
    assert (config.step_log_freq, config.log_total_loss, config.moving_average) == (25, True, True)
    assert type(config()).__name__ == "LossTracker"


def test_speed_time_left_and_learning_rates(caplog, monkeypatch):
    seconds = iter(range(0, 10_000, 2))
    monkeypatch.setattr("gradclip.pipeline.hooks.stats.monotonic", lambda: next(seconds))
    monitor = StatsMonitorConfig(step_log_freq=3)()
    with caplog.at_level(logging.INFO, "gradclip"):
        trainer, scalars = run(monitor, max_epoch=2)
        trainer()
    assert (monitor.batch_size, monitor.total_batch_size, monitor.steps_per_epoch) == (2, 2, 4)
    assert scalars == [
        (f"LR/group{group}", step, rate) for step in (2, 5) for group, rate in ((0, 0.1), (1, 0.2))
    ]
    rates = "Learning Rate Group 0: 1.00000e-01.\tLearning Rate Group 1: 2.00000e-01.\t"
    step, epoch, later, last = messages(caplog)
    assert step == (
        "Epoch[0] Step[2] GlobalStep[2] Training Speed: 1.00 samples/sec across all devices.\t"
        f"Average Step Time: 2.00 sec.\tEstimated Remaining Time: 0:00:10.\t{rates}"
    )
    assert epoch.startswith("Epoch[0] completed. Epoch Time: ")
    assert "Estimated Remaining Time: 0:00:08." in epoch
    assert "Estimated Remaining Time: 0:00:04." in later
    assert "Estimated Remaining Time: 0:00:00." in last


def test_the_time_left_is_right_in_a_run_that_resumes(caplog, monkeypatch):
    seconds = iter(range(0, 10_000, 2))
    monkeypatch.setattr("gradclip.pipeline.hooks.stats.monotonic", lambda: next(seconds))
    monitor = StatsMonitorConfig(step_log_freq=1, batch_size=2, steps_per_epoch=10)()
    arg = PipelineHookArgs(
        epoch_id=3, step_id=4, global_step_id=34, max_epoch=5, start_epoch=3, start_step=4
    )
    with caplog.at_level(logging.INFO, "gradclip"), monitor.begin("on_step", arg):
        pass
    assert "Estimated Remaining Time: 0:00:30." in caplog.text


def test_a_dataloader_that_tells_no_batch_size_is_named():
    monitor = StatsMonitorConfig()()
    arg = PipelineHookArgs(dataloader=[torch.ones(2)])
    with pytest.raises(ArgumentValueError, match="list: set batch_size"):  # noqa: SIM117
        with monitor.begin("on_loop", arg):
            pass


class Sum:
    """A metric of two values."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.total = self.count = 0

    def update(self, values):
        self.total += float(values.sum())
        self.count += 1

    def compute(self):
        return self.total, self.count

    def to(self, device):
        self.device = device


class Tracking(MetricTracker):
    def update_metric(self, batch, model_outputs):
        for metric in self.metrics:
            metric.update(batch)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"step_log_freq": 2},
            [
                "Epoch[0] Step[1] GlobalStep[1]: total[10.0000] count[2.0000] ",
                "Epoch[0] Step[3] GlobalStep[3]: total[36.0000] count[4.0000] ",
                "Epoch[0]: total[36.0000] count[4.0000] ",
            ],
        ),
        (
            {"step_log_freq": 0, "reset_by": "step", "reset_freq": 3},
            ["Epoch[0]: total[15.0000] count[1.0000] "],
        ),
    ],
)
def test_metrics_are_updated_logged_and_reset(caplog, fields, expected):
    metric = Sum()
    config = MetricTrackerConfig(
        class_type=Tracking, metric_entrys=MetricEntry(["total", "count"], metric), **fields
    )
    with caplog.at_level(logging.INFO, "gradclip"):
        run(config)[0]()
    assert messages(caplog) == expected
    assert metric.device == torch.device("cpu")
    assert metric.count == (0 if "reset_by" not in fields else 1)


def test_a_metric_without_names_and_a_tracker_without_its_method_are_refused():
    with pytest.raises(ArgumentValueError, match="returned 2 values for the names"):
        MetricEntry("total", Sum()).get()
    config = MetricTrackerConfig(metric_entrys=[MetricEntry("total", Sum())])
    with pytest.raises(NotImplementedError, match="update_metric"):
        run(config)[0]()
