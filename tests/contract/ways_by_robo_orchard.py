"""The way in through RoboOrchardLab's trainer."""

import torch
from accelerate import Accelerator
from robo_orchard_lab.pipeline import HookBasedTrainer
from robo_orchard_lab.pipeline.batch_processor import SimpleBatchProcessor
from robo_orchard_lab.pipeline.hook_based_trainer import ResumeCheckpointConfig
from robo_orchard_lab.pipeline.hooks.checkpoint import SaveCheckpointConfig
from robo_orchard_lab.pipeline.hooks.mixin import HookContext, PipelineHooks
from tiny_model import TinyModel, batches, sgd, weights
from torch.utils.data import DataLoader
from trained import Trained

from gradclip.integrations.robo_orchard import GradientClippingHookConfig


def adapter(feature, gradients, folder):
    model = TinyModel()
    optimizer = sgd(model)
    after = []
    note = PipelineHooks()

    def noted(arg):
        after.append(weights(model))
        feature.assign(clipping(), after)

    def clipping():
        return trainer.hooks.hooks["on_step"]._context_handlers[0].after_info.owner

    note.register_hook("on_step", HookContext.from_callable(after=noted))
    path = folder / "run"
    resumed = path.exists()
    trainer = HookBasedTrainer(
        accelerator=Accelerator(cpu=True),
        model=model,
        dataloader=DataLoader(batches(gradients), batch_size=None),
        batch_processor=SimpleBatchProcessor.from_callable(
            lambda model, batch: (None, model(**batch))
        ),
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        hooks=[note, SaveCheckpointConfig(save_root=str(path))],
        grad_clip=GradientClippingHookConfig(**feature.fields),
        max_epoch=2 if resumed else 1,  # each run is an epoch
        resume_from=ResumeCheckpointConfig(resume_from=str(path)) if resumed else None,
    )
    trainer()
    return Trained(after, clipping().stats)
