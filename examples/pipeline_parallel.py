"""The stages of a pipeline that tie a weight: one norm for all of them, the tied weight once.

    torchrun --nproc_per_node 2 examples/pipeline_parallel.py

Each rank has a stage, whose parameters no other rank knows of; that is what ``partitioned`` says.
Both have a copy of the tied weight, whose gradients are added up by hand: ``duplicated`` says so.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import gradclip


class Stage(nn.Module):
    """A weight that both stages have, and one of its own."""

    def __init__(self, number: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tied = nn.Parameter(torch.randn(8, 8) / 3)
        torch.manual_seed(number)
        self.own = nn.Linear(8, 8)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return what the next stage is given."""
        return self.own(torch.tanh(inputs @ self.tied))


cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
dist.init_process_group("nccl" if cuda else "gloo")
rank, everyone = dist.get_rank(), dist.group.WORLD

module = Stage(rank).to(device)
stage = PipelineStage(module, rank, dist.get_world_size(), device)
schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=nn.functional.mse_loss)
optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
clipper = gradclip.GradientClipper(
    module, 1.0, partitioned={"*": everyone}, duplicated={"tied": everyone}
)

generator = torch.Generator().manual_seed(1)
for step in range(20):
    inputs = torch.randn(16, 8, generator=generator).to(device)
    optimizer.zero_grad()
    if rank == 0:
        schedule.step(inputs)
    else:
        schedule.step(target=5 * inputs.cumsum(1))
    dist.all_reduce(module.tied.grad)  # each stage has a part of it
    result = clipper.clip()
    with gradclip.withhold(optimizer, result.skipped):
        optimizer.step()
    if step in {0, 19}:
        stats = result.to_host()
        print(f"rank {rank}, step {step}: norm {stats.norm_pre:.6f} -> {stats.norm_post:.6f}")

dist.barrier()
sys.stdout.flush()
os._exit(0)  # over gloo an ordinary exit of several processes aborts now and then
