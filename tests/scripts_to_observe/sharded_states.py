"""DeepSpeed on the CPU: its second stage, and accumulation over two batches."""

import os
import sys
import tempfile

import torch
import torch.distributed as dist
from torch import nn

os.environ.update(DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
import deepspeed

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first
with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    made = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=made, config=config)
    for _ in range(60):
        x = torch.randn(4, 6)
        engine.backward(nn.functional.mse_loss(engine(x), x.sum(1, keepdim=True) * 3))
        engine.step()
    weights = [each.detach().clone() for each in engine.module.parameters()]
    torch.save((weights, torch.get_rng_state()), sys.argv[1])
    dist.destroy_process_group()
