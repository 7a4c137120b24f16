"""The second tutorial: metrics, speed and checkpoints by the hooks that come with it."""

import torch
from made_up import CLASSES, Classifier, loader, project
from robo_orchard_lab.pipeline import HookBasedTrainer
from robo_orchard_lab.pipeline.batch_processor import SimpleBatchProcessor
from robo_orchard_lab.pipeline.hook_based_trainer import ResumeCheckpointConfig
from robo_orchard_lab.pipeline.hooks import (
    MetricEntry,
    MetricTracker,
    MetricTrackerConfig,
    SaveCheckpointConfig,
    StatsMonitorConfig,
)
from torchmetrics import Accuracy


class MyMetricTracker(MetricTracker):
    def update_metric(self, batch, model_outputs):
        _, targets = batch
        for metric in self.metrics:
            metric(model_outputs, targets)


class MyMetricTrackerConfig(MetricTrackerConfig):
    class_type: type[MyMetricTracker] = MyMetricTracker


def top(k):
    metric = Accuracy(task="multiclass", num_classes=CLASSES, top_k=k)
    return MetricEntry(names=[f"top{k}_acc"], metric=metric)


def forward(model, batch):
    inputs, classes = batch
    output = model(inputs)
    return output, torch.nn.functional.cross_entropy(output, classes)


def main(workspace, *, resume_from=None, **changes):
    accelerator = project(workspace, **changes)
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    trainer = HookBasedTrainer(
        model=model,
        dataloader=loader(50, 8, named=False),
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.5),
        accelerator=accelerator,
        batch_processor=SimpleBatchProcessor.from_callable(forward, need_backward=True),
        max_epoch=3,
        hooks=[
            MyMetricTrackerConfig(
                metric_entrys=[top(1), top(5)], step_log_freq=4, log_main_process_only=False
            ),
            StatsMonitorConfig(step_log_freq=4),
            SaveCheckpointConfig(save_step_freq=1024),
        ],
        resume_from=resume_from and ResumeCheckpointConfig(resume_from=resume_from),
    )
    print(trainer.hooks)  # noqa: T201
    trainer()
    return trainer
