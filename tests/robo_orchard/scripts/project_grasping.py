"""The grasping project: warm-up and cosine decay, all of clipping, evaluation at the end."""

import math

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


def warmup_then_cosine(step, warmup=4, total=15, least=1e-5):
    if step < warmup:
        return (1 - least) * step / warmup + least
    ratio = (step - warmup) / total
    return (1 - least) * 0.5 * (1 + math.cos(math.pi * ratio)) + least


def main(workspace, *, eval_only=False, **changes):
    accelerator = project(workspace, **{"step_scheduler_with_optimizer": False} | changes)
    model = Policy()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.008, weight_decay=1e-5)
    trainer = SimpleTrainer(
        model=model,
        dataloader=loader(40, 8, named=True),
        val_dataloader=loader(16, 4, named=True, shuffle=False),
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_then_cosine),
        accelerator=accelerator,
        batch_processor=MyBatchProcessor(need_backward=True),
        hooks=[
            StatsMonitorConfig(step_log_freq=3),
            LossMovingAverageTrackerConfig(step_log_freq=3),
            SaveCheckpointConfig(save_step_freq=None, save_epoch_freq=1),
        ],
        metric=Accuracy(),
        max_step=15,
        max_epoch=3,
        lr_scheduler_step_at="step",
        step_eval_freq=None,
        epoch_eval_freq=100,
        resume_from=None,
        resume_share_dir=None,
        grad_clip_mode="norm",
        grad_clip_value=None,
        grad_max_norm=0.2,
        grad_norm_type=2,
    )
    if not eval_only:
        trainer()
    trainer.eval()
    return trainer
