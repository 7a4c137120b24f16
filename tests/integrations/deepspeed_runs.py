"""What ranks do in the tests of DeepSpeed: each function here runs on every rank."""

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

RANKS, STEPS, BATCH = 2, 10, 4
LIMIT = 0.05


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)

    def forward(self, inputs):
        return self.down(torch.tanh(self.norm(self.up(inputs))))


def momentum(model, lr=0.5):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def data(steps=STEPS):
    inputs = torch.randn(steps * RANKS * BATCH, 8, generator=torch.Generator().manual_seed(11))
    return TensorDataset(inputs, inputs.sum(1, keepdim=True) * 3)


def loader(batch_size, steps=STEPS):
    return DataLoader(data(steps), batch_size=batch_size)


def forward(model, batch):
    inputs, targets = batch
    outputs = model(inputs.to(next(model.parameters()).dtype)).float()
    return outputs, nn.functional.mse_loss(outputs, targets)


def accelerator_for(plugin, **options):
    """Make an accelerator for DeepSpeed on the CPU, as the first of this process."""
    import deepspeed  # noqa: PLC0415 - it takes seconds, and warns: on ranks alone

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    # A faster all-reduce, which DeepSpeed would compile first: half a minute, with a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    gloo = InitProcessGroupKwargs(backend="gloo")  # or Accelerate counts one process on the CPU
    return Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[gloo], **options)


def accelerator(stage, gradient_clipping=None, **options):
    plugin = DeepSpeedPlugin(zero_stage=stage, gradient_clipping=gradient_clipping)
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = BATCH
    return accelerator_for(plugin, **options)


def weights(engine):
    """Return all weights whole, as float32."""
    from deepspeed import zero  # noqa: PLC0415

    with zero.GatheredParameters(list(engine.module.parameters())):
        return {
            name: parameter.detach().float().clone()
            for name, parameter in engine.module.named_parameters()
        }
