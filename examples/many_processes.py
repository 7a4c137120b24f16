"""The trainer on one process or many: the same script, the same clipping, the same result.

    python examples/many_processes.py
    torchrun --nproc_per_node 2 examples/many_processes.py
    torchrun --nproc_per_node 4 examples/many_processes.py --engine fsdp2
    accelerate launch --multi_gpu --num_processes 2 examples/many_processes.py
    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 8 examples/many_processes.py

All but the last run on a CPU too, over gloo. Under ``accelerate launch`` the engine comes from its
options, and Accelerate uses FSDP on accelerators alone; ``--engine fsdp2`` shards the model here.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from gradclip.pipeline import HookBasedTrainer, SimpleBatchProcessor
from gradclip.pipeline.hooks import (
    GradientClippingHookConfig,
    HookContext,
    PipelineHookArgs,
    PipelineHooks,
    SaveCheckpointConfig,
)

GLOBAL_BATCH = 128

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--engine", choices=["ddp", "fsdp2"], default="ddp")
parser.add_argument("--checkpoints", type=Path, help="save here, and resume from what is there")
options = parser.parse_args()
checkpoints: Path | None = options.checkpoints


class Report(PipelineHooks):
    """Counts the clipped steps; every process has the same numbers, and one prints them."""

    def __init__(self) -> None:
        super().__init__()
        self.clipped: list[bool] = []
        self.register_hook("on_optimizer_step", HookContext.from_callable(after=self._count))
        self.register_hook("on_epoch", HookContext.from_callable(after=self._print))

    def _count(self, args: PipelineHookArgs) -> None:
        assert args.clip_result is not None
        self.clipped.append(bool(args.clip_result.clipped))

    def _print(self, args: PipelineHookArgs) -> None:
        if args.accelerator.is_main_process:
            print(f"epoch {args.epoch_id}: clipped {sum(self.clipped)} of {len(self.clipped)}")
        self.clipped.clear()


def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    inputs, targets = batch
    outputs = model(inputs)
    return outputs, nn.functional.mse_loss(outputs, targets)


# Without cpu=True, Accelerate does not see the other processes on a machine without accelerators.
accelerator = Accelerator(cpu=not torch.accelerator.is_available())
torch.manual_seed(0)
inputs = torch.randn(4096, 8)
truth = inputs.sum(dim=1, keepdim=True)
targets = truth + torch.distributions.StudentT(1.5).sample((4096, 1))

model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)).to(accelerator.device)
if options.engine == "fsdp2":
    fully_shard(model[0])
    fully_shard(model)
hooks: list[object] = [Report()]
if checkpoints:
    hooks.append(SaveCheckpointConfig(save_root=str(checkpoints)))

trainer = HookBasedTrainer(
    accelerator=accelerator,
    model=model,
    dataloader=DataLoader(
        TensorDataset(inputs, targets), batch_size=GLOBAL_BATCH // accelerator.num_processes
    ),
    batch_processor=SimpleBatchProcessor.from_callable(forward),
    optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
    grad_clip=GradientClippingHookConfig(clip_mode="norm", max_norm=5.0),
    hooks=hooks,
    max_epoch=4,
    resume_from="auto" if checkpoints else None,  # starts or resumes
)
trainer()

with torch.no_grad():
    outputs = trainer.model(inputs.to(accelerator.device))  # all take part: each has a shard
    error = nn.functional.mse_loss(outputs, truth.to(accelerator.device))
if accelerator.is_main_process:
    print(f"error without noise {error:.4f} on {accelerator.num_processes} processes")
accelerator.wait_for_everyone()
sys.stdout.flush()
os._exit(0)  # over gloo an ordinary exit of several processes aborts now and then
