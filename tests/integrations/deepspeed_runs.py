"""Small real runs of DeepSpeed, for its tests."""

import importlib.util

import pytest
import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradclip import GradientClipper
from gradclip.pipeline.hooks import HookContext, PipelineHooks
from processes import together

NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="make test-integrations installs it"
)
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


def on_two(function, *args):
    """Run a function on two ranks, and return what it returned: the same on both."""
    first, second = together(function, RANKS, *args, env={"DS_ACCELERATOR": "cpu"})
    assert repr(first) == repr(second)
    return first


def by_hand(policy, lr=0.5):
    """Train in one process, clipped by gradclip; return the results and the weights."""
    model = Model()
    optimizer = momentum(model, lr)
    clipper = GradientClipper(model, policy)
    results = []
    for batch in loader(RANKS * BATCH):
        forward(model, batch)[1].backward()
        results.append(clipper.clip().to_host())
        optimizer.step()
        optimizer.zero_grad()
    return results, dict(model.named_parameters())


class Collect(PipelineHooks):
    """Keeps what each optimizer step was: the result, whether it was made, and the rate after."""

    def __init__(self):
        super().__init__()
        self.steps = []
        self.register_hook("on_step", HookContext.from_callable("collect", after=self.keep))

    def keep(self, arg):
        if arg.is_optimizer_step_boundary and arg.exception is None:
            self.steps.append(
                (
                    None if arg.clip_result is None else arg.clip_result.to_host(),
                    arg.is_optimizer_step_committed,
                    arg.lr_scheduler and arg.lr_scheduler.get_last_lr()[0],
                )
            )
