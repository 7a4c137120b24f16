"""The diffusion project: steps alone, clipping by the largest gradient, no evaluation."""

import torch
from made_up import Policy, loader, project
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


def main(workspace, **changes):
    accelerator = project(workspace, limit=3, **{"step_scheduler_with_optimizer": False} | changes)
    model = Policy()
    optimizer = torch.optim.AdamW(
        [{"params": model.backbone.parameters(), "lr": 1e-3}, {"params": model.head.parameters()}],
        lr=1e-2,
    )
    trainer = SimpleTrainer(
        model=model,
        dataloader=loader(44, 8, named=True),
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 9], gamma=0.5),
        accelerator=accelerator,
        grad_clip_mode="norm",
        grad_max_norm=0.05,
        grad_norm_type=float("inf"),
        batch_processor=MyBatchProcessor(need_backward=True),
        hooks=[
            StatsMonitorConfig(step_log_freq=2),
            LossMovingAverageTrackerConfig(step_log_freq=2),
            SaveCheckpointConfig(save_step_freq=5, save_epoch_freq=None),
        ],
        max_step=14,
        step_eval_freq=None,
        lr_scheduler_step_at="step",
        resume_from=None,
        resume_share_dir="./resume_from",
    )
    trainer()
    return trainer
