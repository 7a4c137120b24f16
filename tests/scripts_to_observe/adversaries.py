"""A GAN of two small networks on a made-up distribution: two optimizers, three backward passes."""

import sys

import torch
from torch import nn

torch.manual_seed(999)


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, noise):
        return self.main(noise)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def forward(self, points):
        return self.main(points).squeeze(1)


netG, netD = Generator(), Discriminator()
criterion = nn.BCEWithLogitsLoss()
optimizerD = torch.optim.Adam(netD.parameters(), lr=2e-3, betas=(0.5, 0.999))
optimizerG = torch.optim.Adam(netG.parameters(), lr=2e-3, betas=(0.5, 0.999))
for i in range(50):
    netD.zero_grad()
    angle = torch.rand(32) * 6.28
    real = torch.stack([angle.cos(), angle.sin()], 1)
    errD_real = criterion(netD(real), torch.ones(32))
    errD_real.backward()
    fake = netG(torch.randn(32, 4))
    errD_fake = criterion(netD(fake.detach()), torch.zeros(32))
    errD_fake.backward()
    nn.utils.clip_grad_value_(netD.parameters(), 0.01)
    optimizerD.step()
    netG.zero_grad()
    errG = criterion(netD(fake), torch.ones(32))
    errG.backward()
    nn.utils.clip_grad_norm_(netG.parameters(), 0.2)
    optimizerG.step()
    if i % 10 == 0:
        print(f"[{i}] D {errD_real.item() + errD_fake.item():.9f} G {errG.item():.9f}")
torch.save([each.state_dict() for each in (netG, netD, optimizerG, optimizerD)], sys.argv[1])
