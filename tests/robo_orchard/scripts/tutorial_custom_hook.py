"""The third tutorial: a hook of one's own, with its configuration."""

import logging

import torch
from made_up import Classifier, loader, project
from robo_orchard_lab.pipeline import HookBasedTrainer
from robo_orchard_lab.pipeline.batch_processor import SimpleBatchProcessor
from robo_orchard_lab.pipeline.hooks.mixin import (
    HookContext,
    PipelineHookArgs,
    PipelineHooks,
    PipelineHooksConfig,
)

logger = logging.getLogger("script")


class MyHook(PipelineHooks):
    def __init__(self, cfg: "MyHookConfig"):
        super().__init__()
        self.cfg = cfg
        for channel in ("on_loop", "on_epoch", "on_step"):
            self.register_hook(
                channel=channel,
                hook=HookContext.from_callable(
                    before=lambda args, c=channel: self.say("begin", c, args),
                    after=lambda args, c=channel: self.say("end", c, args),
                ),
            )

    def say(self, what: str, channel: str, args: PipelineHookArgs):
        if channel != "on_step" or (args.step_id + 1) % self.cfg.log_step_freq == 0:
            counts = args.epoch_id, args.step_id, args.global_step_id
            logger.info("%s %s %s", what, channel, counts)


class MyHookConfig(PipelineHooksConfig[MyHook]):
    class_type: type[MyHook] = MyHook
    log_step_freq: int = 5


class MyBatchProcessor(SimpleBatchProcessor):
    def forward(self, model, batch):
        inputs, classes = batch
        output = model(inputs)
        return output, torch.nn.functional.cross_entropy(output, classes)


def main(workspace, **changes):
    accelerator = project(workspace, **changes)
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = HookBasedTrainer(
        model=model,
        dataloader=loader(50, 8, named=False),
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.5),
        accelerator=accelerator,
        batch_processor=MyBatchProcessor(need_backward=True),
        max_epoch=3,
        hooks=[MyHookConfig(log_step_freq=3)],
    )
    trainer()
    return trainer
