"""The first tutorial: a classifier, and a monitor of its speed."""

import torch
from made_up import Classifier, loader, project
from robo_orchard_lab.pipeline import HookBasedTrainer
from robo_orchard_lab.pipeline.batch_processor import SimpleBatchProcessor
from robo_orchard_lab.pipeline.hooks import StatsMonitorConfig


class MyBatchProcessor(SimpleBatchProcessor):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.criterion = torch.nn.CrossEntropyLoss()

    def forward(self, model, batch):
        inputs, classes = batch
        output = model(inputs)
        loss = self.criterion(output, classes) if self.need_backward else None
        return output, loss


def main(workspace, **changes):
    accelerator = project(workspace, **changes)
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    trainer = HookBasedTrainer(
        model=model,
        dataloader=loader(50, 8, named=False),
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.5),
        accelerator=accelerator,
        batch_processor=MyBatchProcessor(need_backward=True),
        max_epoch=3,
        hooks=[StatsMonitorConfig(step_log_freq=4)],
    )
    trainer()
    return trainer
