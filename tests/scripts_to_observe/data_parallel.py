"""DistributedDataParallel over gloo, for torchrun."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(21)
model = DistributedDataParallel(nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
torch.manual_seed(100 + rank)
for step in range(40):
    x = torch.randn(8, 6)
    loss = nn.functional.mse_loss(model(x), x.square().sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
states = model.state_dict(), optimizer.state_dict(), torch.get_rng_state()
torch.save(states, f"{sys.argv[1]}.{rank}")
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
sys.stderr.flush()
