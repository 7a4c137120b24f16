"""What Accelerate or DeepSpeed makes of the objects of a run."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from gradclip.integrations.deepspeed import uses_deepspeed
from gradclip.pipeline.deepspeed import prepare_engine
from gradclip.pipeline.hooks.grad_clip import GradientClippingHook
from gradclip.pipeline.processes import keep_distributed

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from torch.optim import Optimizer

    from gradclip.pipeline.hooks.mixin import PipelineHooks

__all__ = ["prepared"]


def prepared(
    accelerator: "Accelerator",
    hooks: "PipelineHooks",
    model: "nn.Module",
    optimizer: "Optimizer",
    dataloader: Iterable[Any],
    lr_scheduler: Any,
) -> tuple[Any, Any, Iterable[Any], Any]:
    """Return model, optimizer, dataloader and scheduler as training needs them.

    Raises:
        DoubleClippingError: GC101, DeepSpeed cannot do what a clipping hook asks.
        ArgumentValueError: GC010, Accelerate cannot prepare them so that the trainer works.
    """
    if uses_deepspeed(accelerator):
        clipping = [each for each in hooks.walk() if isinstance(each, GradientClippingHook)]
        return prepare_engine(accelerator, clipping, model, optimizer, dataloader, lr_scheduler)
    keep_distributed(accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    if isinstance(dataloader, DataLoader):
        # On the CPU there is nowhere to move a batch to.
        moves = accelerator.device.type != "cpu"
        dataloader = accelerator.prepare(dataloader, device_placement=[moves])
    if lr_scheduler is not None:
        lr_scheduler = accelerator.prepare(lr_scheduler)
    return model, optimizer, dataloader, lr_scheduler
