"""Train through hooks: a clipping configuration, and a hook of your own that sees what it did.

The data is that of plain_loop.py: targets with heavy-tailed noise.
"""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gradclip.pipeline import HookBasedTrainer, SimpleBatchProcessor
from gradclip.pipeline.hooks import (
    GradientClippingHookConfig,
    HookContext,
    PipelineHookArgs,
    PipelineHooks,
)


class ClippingReport(PipelineHooks):
    """Counts the clipped steps of each epoch, and prints them with the last loss."""

    def __init__(self) -> None:
        super().__init__()
        self.clipped: list[bool] = []
        self.register_hook("on_step", HookContext.from_callable(after=self._count))
        self.register_hook("on_epoch", HookContext.from_callable(after=self._report))

    def _count(self, args: PipelineHookArgs) -> None:
        assert args.clip_result is not None
        self.clipped.append(bool(args.clip_result.clipped))

    def _report(self, args: PipelineHookArgs) -> None:
        print(f"epoch {args.epoch_id}: clipped {sum(self.clipped)} of {len(self.clipped)} steps")
        self.clipped.clear()


def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    inputs, targets = batch
    outputs = model(inputs)
    return outputs, nn.functional.mse_loss(outputs, targets)


torch.manual_seed(0)
inputs = torch.randn(4096, 8)
truth = inputs.sum(dim=1, keepdim=True)
targets = truth + torch.distributions.StudentT(1.5).sample((4096, 1))
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))

trainer = HookBasedTrainer(
    model=model,
    dataloader=DataLoader(TensorDataset(inputs, targets), batch_size=32, shuffle=True),
    batch_processor=SimpleBatchProcessor.from_callable(forward),
    optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
    grad_clip=GradientClippingHookConfig(clip_mode="norm", max_norm=5.0),
    hooks=[ClippingReport()],
    max_epoch=4,
)
trainer()

with torch.no_grad():
    error = nn.functional.mse_loss(model(inputs), truth)
print(f"error without noise {error:.2f}")
