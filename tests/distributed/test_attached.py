"""An attachment on several ranks: sharded parameters, and an optimizer whose states are sharded."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gradclip import attach
from processes import together

BAD = 3


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def train(module, optimizer, rank, ranks):
    handle = attach(optimizer, 0.3)
    said = []
    for step in range(6):
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        targets = inputs.sum(1, keepdim=True)
        if step == BAD:
            inputs[-1, 0] = math.nan  # on the last rank alone
        mine, wanted = (tensor.chunk(ranks)[rank] for tensor in (inputs, targets))
        optimizer.zero_grad()
        nn.functional.mse_loss(module(mine), wanted).backward()
        optimizer.step()
        said.append((float(handle.last.norm_pre), bool(handle.last.skipped)))
    return said, [
        (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for p in module.parameters()
    ]


def on_ranks(rank, engine):
    module, ranks = model(), dist.get_world_size()
    if engine == "FSDP2":
        fully_shard(module)
    else:
        module = DistributedDataParallel(module)
    if engine == "ZeRO":
        from torch.distributed.optim import ZeroRedundancyOptimizer  # noqa: PLC0415 - it warns

        optimizer = ZeroRedundancyOptimizer(module.parameters(), torch.optim.AdamW, lr=0.1)
    else:
        fused = engine == "FSDP2"
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=fused)
    return train(module, optimizer, rank, ranks)


@pytest.mark.parametrize("engine", ["DDP", "ZeRO", "FSDP2"])
def test_it_ends_where_one_process_ends(engine):
    module = model()
    expected, weights = train(module, torch.optim.AdamW(module.parameters(), lr=0.1), 0, 1)
    assert [skipped for _, skipped in expected] == [step == BAD for step in range(6)]
    for said, found in together(on_ranks, 2, engine):
        for (norm, skipped), (wanted, skips) in zip(said, expected, strict=True):
            assert skipped is skips
            assert norm == pytest.approx(wanted, rel=1e-5, nan_ok=True)
        for ours, theirs in zip(found, weights, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
