"""The manipulation project: a function before saving, evaluation after steps, or alone."""

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
    dataloader = optimizer = lr_scheduler = None
    if not eval_only:
        dataloader = loader(40, 8, named=True)
        optimizer = torch.optim.AdamW(
            [
                {"params": model.backbone.parameters(), "lr": 1e-3},
                {"params": model.head.parameters()},
            ],
            lr=1e-2,
            weight_decay=5e-4,
        )
        lr_scheduler = torch.optim.lr_scheduler.ChainedScheduler(
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.001, total_iters=5),
                torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[10], gamma=0.1),
            ]
        )
    accelerator.register_save_state_pre_hook(model.accelerator_save_state_pre_hook)
    trainer = SimpleTrainer(
        model=model,
        dataloader=dataloader,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        accelerator=accelerator,
        grad_clip_mode="norm",
        grad_max_norm=0.3,
        batch_processor=MyBatchProcessor(need_backward=True),
        hooks=[
            StatsMonitorConfig(step_log_freq=2),
            LossMovingAverageTrackerConfig(step_log_freq=2),
            SaveCheckpointConfig(save_step_freq=4, save_epoch_freq=None),
        ],
        max_step=13,
        step_eval_freq=4,
        lr_scheduler_step_at="step",
        resume_from=None,
        resume_share_dir="./resume_from",
        val_dataloader=loader(16, 8, named=True, shuffle=False),
        metric=Accuracy(),
    )
    trainer.eval() if eval_only else trainer()
    return trainer
