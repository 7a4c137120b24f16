"""The hooks of a run come from a file: pipeline.yaml, next to this one."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradclip
from gradclip.diagnostics import read_record, summarise
from gradclip.pipeline import HookBasedTrainer, SimpleBatchProcessor


def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    inputs, targets = batch
    outputs = model(inputs)
    return outputs, nn.functional.mse_loss(outputs, targets)


torch.manual_seed(0)
inputs = torch.randn(4096, 8)
truth = inputs.sum(dim=1, keepdim=True)
targets = truth + torch.distributions.StudentT(1.5).sample((4096, 1))
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))

record = Path("gradclip-example.jsonl")
record.unlink(missing_ok=True)  # a run does not write over the record of another one
hooks = gradclip.config.load(Path(__file__).with_name("pipeline.yaml"))
trainer = HookBasedTrainer(
    model=model,
    dataloader=DataLoader(TensorDataset(inputs, targets), batch_size=32, shuffle=True),
    batch_processor=SimpleBatchProcessor.from_callable(forward),
    optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
    hooks=hooks,
    max_epoch=4,
)
trainer()

with torch.no_grad():
    error = nn.functional.mse_loss(model(inputs), truth)
run = summarise(read_record(record))
print(f"clipped {run.clipped} of {run.steps} steps, largest norm {run.norm_max:.0f}")
print(f"error without noise {error:.2f}")
