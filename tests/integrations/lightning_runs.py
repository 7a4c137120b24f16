"""Small trainings under Lightning, on the CPU: what the tests of the callback share."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

BATCHES, BATCH = 8, 4
LIMIT = 0.5


def loader(batches=BATCHES, batch=BATCH, rank=0, ranks=1):
    """Return batches; of those of several ranks together, those of one."""
    inputs = torch.randn(batches * batch * ranks, 8, generator=torch.Generator().manual_seed(11))
    mine = inputs[rank::ranks]
    return DataLoader(TensorDataset(mine, mine.sum(1, keepdim=True) * 3), batch_size=batch)


class Net(LightningModule):
    """Two layers; keeps its losses, and can break a gradient.

    Args:
        make: Makes the optimizer of (name, parameter) pairs.
        broken: After which backward passes a gradient is set to what.
    """

    def __init__(self, make=None, broken=None):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
        self.make = make or adamw
        self.broken = broken or {}
        self.losses = []
        self.backwards = 0

    def loss_of(self, batch):
        inputs, targets = batch
        return nn.functional.mse_loss(self.down(torch.tanh(self.norm(self.up(inputs)))), targets)

    def training_step(self, batch):
        loss = self.loss_of(batch)
        self.losses.append(float(loss.detach()))
        return loss

    def on_after_backward(self):
        if (value := self.broken.get(self.backwards)) is not None:
            self.up.weight.grad[0, 0] = value
        self.backwards += 1

    def configure_optimizers(self):
        return self.make(self.named_parameters())


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.05)


def fused_adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.05, fused=True)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def fused_momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True)


def trainer(*callbacks, **options):
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **{**settings, **options})


def fit(model, *callbacks, batches=BATCHES, **options):
    made = trainer(*callbacks, **options)
    made.fit(model, loader(batches))
    return made


def half(scale=1024.0, **options):
    """Return the plugin for float16 with a loss scaler, which Lightning offers for CUDA alone."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, **options)
    return MixedPrecision("16-mixed", device="cpu", scaler=scaler)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moments(optimizer):
    return [
        {
            name: value.clone()
            for name, value in optimizer.state[parameter].items()
            if value is not None
        }
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
