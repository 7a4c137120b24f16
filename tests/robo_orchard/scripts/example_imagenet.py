"""The ImageNet example: a script with a configuration, a clipping hook, and its own last step."""

import torch
from made_up import CLASSES, Classifier, loader, project
from robo_orchard_lab.pipeline import HookBasedTrainer
from robo_orchard_lab.pipeline.batch_processor import SimpleBatchProcessor
from robo_orchard_lab.pipeline.hook_based_trainer import GradientClippingHookConfig
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
        for metric in self.metrics:
            metric(model_outputs, batch[1])


class MyMetricTrackerConfig(MetricTrackerConfig):
    class_type: type[MetricTracker] = MyMetricTracker


class MyBatchProcessor(SimpleBatchProcessor):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.criterion = torch.nn.CrossEntropyLoss()

    def forward(self, model, batch):
        inputs, target = batch
        output = model(inputs)
        return output, self.criterion(output, target) if self.need_backward else None


def main(workspace, **changes):
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    trainer = HookBasedTrainer(
        model=model,
        dataloader=loader(60, 8, named=False),
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1),
        accelerator=project(workspace, **changes),
        batch_processor=MyBatchProcessor(need_backward=True),
        max_epoch=3,
        grad_clip=GradientClippingHookConfig(clip_mode="value", clip_value=0.01),
        hooks=[
            MyMetricTrackerConfig(
                metric_entrys=MetricEntry(
                    names="top1_acc", metric=Accuracy(task="multiclass", num_classes=CLASSES)
                ),
                reset_by="step",
                reset_freq=5,
                step_log_freq=3,
            ),
            StatsMonitorConfig(step_log_freq=4),
            SaveCheckpointConfig(save_step_freq=10),
        ],
    )
    print(trainer.hooks)  # noqa: T201
    trainer()
    return trainer
