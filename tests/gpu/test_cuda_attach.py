"""An attachment on a GPU: fused, capturable and scaled optimizers, without host waits."""

import pytest
import torch
from torch import nn

from every_policy import EVERY
from gradclip import GradientClipper, attach

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),  # once in a process
]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 1)).cuda()


def loss_of(module, step):
    inputs = torch.randn(32, 64, generator=torch.Generator().manual_seed(step)).cuda()
    return nn.functional.mse_loss(module(inputs), 30 * inputs.sum(1, keepdim=True))


@pytest.mark.parametrize("flags", [{"fused": True}, {"foreach": True}, {"capturable": True}])
def test_amp_ends_where_unscale_clip_and_step_by_hand_end(flags):
    ours, theirs = model(), model()
    mine = torch.optim.AdamW(ours.parameters(), lr=0.01, **flags)
    other = torch.optim.AdamW(theirs.parameters(), lr=0.01, **flags)
    scalers = [torch.amp.GradScaler("cuda", init_scale=1024.0) for _ in range(2)]
    attach(mine, 0.7)
    by_hand = GradientClipper(theirs, 0.7)
    for step in range(6):
        scalers[0].scale(loss_of(ours, step)).backward()
        scalers[0].step(mine)
        scalers[0].update()
        scalers[1].scale(loss_of(theirs, step)).backward()
        scalers[1].unscale_(other)
        by_hand.clip()
        scalers[1].step(other)
        scalers[1].update()
        mine.zero_grad()
        other.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "patterns"])
def test_a_fused_optimizer_never_waits(name):
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, fused=True)
    attach(optimizer, EVERY[name])
    for step in range(3):
        loss_of(module, step).backward()
        optimizer.step()
    loss = loss_of(module, 3)
    loss.backward()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(8):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
