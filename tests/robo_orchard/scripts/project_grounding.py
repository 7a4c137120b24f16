"""The grounding project: three learning rates, evaluation after epochs, and evaluation alone."""

import torch
from made_up import Accuracy, Policy, loader, project
from robo_orchard_lab.pipeline import SimpleTrainer
from robo_orchard_lab.pipeline.batch_processor import SimpleBatchProcessor
from robo_orchard_lab.pipeline.hooks import (
    LossMovingAverageTrackerConfig,
    SaveCheckpointConfig,
    StatsMonitorConfig,
)


class MyBatchProcessor(SimpleBatchProcessor):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)

    def forward(self, model, batch):
        output = model(batch)
        loss = sum([y.mean() for x, y in output.items() if "loss" in x])
        return output, loss


def main(workspace, *, eval_only=False, **changes):
    accelerator = project(workspace, limit=3, **{"step_scheduler_with_optimizer": False} | changes)
    model = Policy()
    optimizer = torch.optim.AdamW(
        [
            {"params": model.backbone.parameters(), "lr": 1e-3},
            {"params": [model.head.weight], "lr": 5e-4},
            {"params": [model.head.bias]},
        ],
        lr=1e-2,
        weight_decay=5e-4,
    )
    schedulers = [
        torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=5),
        torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[9, 13], gamma=0.1),
    ]
    trainer = SimpleTrainer(
        model=model,
        dataloader=None if eval_only else loader(40, 8, named=True),
        val_dataloader=loader(16, 4, named=True, shuffle=False),
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.ChainedScheduler(schedulers),
        accelerator=accelerator,
        grad_clip_mode="norm",
        grad_max_norm=0.3,
        batch_processor=MyBatchProcessor(need_backward=True),
        hooks=[
            StatsMonitorConfig(step_log_freq=2),
            LossMovingAverageTrackerConfig(step_log_freq=2),
            SaveCheckpointConfig(save_step_freq=6, save_epoch_freq=None),
        ],
        metric=Accuracy(),
        max_epoch=3,
        epoch_eval_freq=1,
        lr_scheduler_step_at="step",
        resume_from=None,
        resume_share_dir="./resume_from",
    )
    trainer.eval() if eval_only else trainer()
    return trainer
