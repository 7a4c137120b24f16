"""Mixed precision with a loss scaler, one that overflows now and then; fused or not."""

import sys

import torch
from torch import nn

fused = "--fused" in sys.argv
torch.manual_seed(3)
net = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 4))
opt = torch.optim.Adam(net.parameters(), lr=1e-2, fused=fused)
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=8)
for step in range(40):
    x = torch.randn(16, 12)
    y = x.sum(1).long() % 4
    if step % 13 == 7:
        x = x * float("inf")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nn.functional.cross_entropy(net(x).float(), y)
    opt.zero_grad()
    scaler.scale(loss).backward()
    if not fused:
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(net.parameters(), max_norm=0.5)
    scaler.step(opt)
    scaler.update()
print("scale", scaler.get_scale(), [p.double().sum().item() for p in net.parameters()])
torch.save(
    (net.state_dict(), opt.state_dict(), scaler.state_dict(), torch.get_rng_state()), sys.argv[-1]
)
