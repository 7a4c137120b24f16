"""Small trainings under Lightning, on the CPU: what the tests of the callback share."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

BATCHES, BATCH = 8, 4
LIMIT = 0.5
QUIET = [  # what Lightning says of small trainings, and what torch says of Lightning
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]
SAME = {"rtol": 1e-6, "atol": 1e-6}
CLOSE = {"rel": 1e-6, "abs": 1e-6}


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
        "log_every_n_steps": 1,
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


class ZerosForNone(torch.optim.SGD):
    """Makes zeros where there is no gradient, as Muon: KellerJordan/Muon#56."""

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        super().step()
        return loss


def zeros_for_none(parameters):
    return ZerosForNone(parameters, lr=0.1, momentum=0.9)


class Manual(Net):
    """Steps two optimizers by itself, of which the second has a limit that never clips."""

    def __init__(self, limit=None):
        super().__init__()
        self.automatic_optimization = False
        self.limit = limit

    def training_step(self, batch):
        for optimizer in self.optimizers():
            loss = self.loss_of(batch)
            self.losses.append(float(loss.detach()))
            optimizer.zero_grad()
            self.manual_backward(loss)
            if self.limit is not None:
                self.clip_gradients(optimizer, gradient_clip_val=self.limit)
            optimizer.step()

    def configure_optimizers(self):
        return momentum(self.up.named_parameters()), adamw(self.down.parameters())


class Keep(Callback):
    """Keeps the result of every step, and weights and moments before and after each batch."""

    def __init__(self, clipping):
        self.clipping = clipping
        self.results, self.before, self.after = [], [], []
        self.last = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before.append((weights(pl_module), moments(trainer.optimizers[0])))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append((weights(pl_module), moments(trainer.optimizers[0])))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.clipping.last is not self.last:
            self.last = self.clipping.last
            self.results.append(self.last.to_host())


def same(first, second):
    torch.testing.assert_close(first, first, rtol=0, atol=0)  # no NaN that would pass for unequal
    try:
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    except AssertionError:
        return False
    return True


def steps(state):
    """Return the moments that a step has made: none is as good as zeros."""
    return [{k: v for k, v in each.items() if v.abs().sum() > 0} for each in state[1]]
