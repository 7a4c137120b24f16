"""A loop of your own under FSDP2 over tensor parallelism: one call clips the whole model.

    torchrun --nproc_per_node 4 examples/tensor_parallel.py

Ranks are a mesh of 2 (data) x 2 (tensor). Some parameters are split over both, some over one, the
norm's over none, and its gradients arrive as summands: torch's function raises for such a mix. The
last line compares with one process that has the whole model.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import gradclip


class Model(nn.Module):
    """A block with a norm, and the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Linear(8, 16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 1)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        inner = self.norm(torch.tanh(self.embed(inputs)))
        return nn.functional.mse_loss(self.down(torch.tanh(self.up(inner))), targets)


def train(model: nn.Module, rank: int, size: int) -> list[float]:
    """Train on this rank's part of each batch, and return the norms before clipping."""
    clipper = gradclip.GradientClipper(model, 1.0)  # every rank makes one
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    norms = []
    for _ in range(20):
        inputs = torch.randn(32, 8, generator=generator)
        mine = inputs.chunk(size)[rank].to(device)
        loss = model(mine, 5 * mine.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        result = clipper.clip()  # and every rank calls it
        with gradclip.withhold(optimizer, result.skipped):
            optimizer.step()
        norms.append(result.to_host().norm_pre)
    return norms


device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
mesh = init_device_mesh(device, (2, 2), mesh_dim_names=("data", "tensor"))

model = parallelize_module(
    Model().to(device),
    mesh["tensor"],
    {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
        "norm": SequenceParallel(sequence_dim=0),
        "up": ColwiseParallel(input_layouts=Shard(0)),
        "down": RowwiseParallel(),
    },
)
fully_shard(model, mesh=mesh["data"])
norms = train(model, mesh.get_local_rank("data"), 2)

if dist.get_rank() == 0:
    alone = train(Model().to(device), 0, 1)
    worst = max(abs(a / b - 1) for a, b in zip(norms, alone, strict=True))
    print(f"norms on 4 ranks  {norms[0]:.4f} ... {norms[-1]:.4f}")
    print(f"norms on one      {alone[0]:.4f} ... {alone[-1]:.4f}")
    print(f"largest relative difference {worst:.0e}")
dist.barrier()
sys.stdout.flush()
os._exit(0)  # over gloo an ordinary exit of several processes aborts now and then
