"""Training under DeepSpeed's ZeRO, on two processes: DeepSpeed clips, at the limit of gradclip.

    torchrun --nproc_per_node 2 examples/deepspeed_zero.py
    accelerate launch --use_deepspeed --num_processes 2 examples/deepspeed_zero.py

It needs deepspeed and transformers beside gradclip, and runs on a CPU as well:
``DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed transformers``. The first run on a CPU
compiles an operator of DeepSpeed, for about half a minute.
"""

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gradclip.pipeline import HookBasedTrainer, SimpleBatchProcessor
from gradclip.pipeline.hooks import (
    GradientClippingHookConfig,
    HookContext,
    PipelineHookArgs,
    PipelineHooks,
)


def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    inputs, targets = batch
    outputs = model(inputs)
    return outputs, nn.functional.mse_loss(outputs, targets)


class ClippingReport(PipelineHooks):
    """Prints how many steps of an epoch were clipped, and the largest norm."""

    def __init__(self) -> None:
        super().__init__()
        self.clipped: list[bool] = []
        self.norms: list[float] = []
        self.register_hook("on_step", HookContext.from_callable(after=self._count))
        self.register_hook("on_epoch", HookContext.from_callable(after=self._report))

    def _count(self, args: PipelineHookArgs) -> None:
        assert args.clip_result is not None
        self.clipped.append(bool(args.clip_result.clipped))
        self.norms.append(float(args.clip_result.norm_pre))

    def _report(self, args: PipelineHookArgs) -> None:
        assert args.accelerator is not None
        args.accelerator.print(
            f"epoch {args.epoch_id}: DeepSpeed clipped {sum(self.clipped)} of "
            f"{len(self.clipped)} steps, largest norm {max(self.norms):.1f}"
        )
        self.clipped.clear()
        self.norms.clear()


def main() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(1024, 16)
    targets = inputs[:, :1] * 3 + torch.randn(1024, 1) * (torch.rand(1024, 1) < 0.05) * 30
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))

    # On a CPU, Accelerate would count one process if it were not told the backend.
    backend = None if torch.cuda.is_available() else "gloo"
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(zero_stage=2),
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend)],
    )
    HookBasedTrainer(
        accelerator=accelerator,
        model=model,
        dataloader=DataLoader(TensorDataset(inputs, targets), batch_size=8, shuffle=True),
        batch_processor=SimpleBatchProcessor.from_callable(forward),
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        # Written into DeepSpeed's gradient_clipping before the engine is made.
        grad_clip=GradientClippingHookConfig(clip_mode="norm", max_norm=5.0),
        hooks=ClippingReport(),
        max_epoch=3,
    )()
    accelerator.print(f"gradient_clipping {accelerator.deepspeed_config['gradient_clipping']}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
