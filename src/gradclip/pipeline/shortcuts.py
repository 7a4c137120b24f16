"""Accelerate's wrappers, passed by where they add nothing but time.

For one process without a loss scaler and without accumulation, ``accumulate``, ``backward`` and the
wrappers of optimizer and scheduler come down to the calls below. They cost as much as a step of
a small model: one divides the loss by 1, one searches the disk for an optional package.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from gradclip.integrations.wrapped import behind_accelerate

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor, nn

__all__ = ["accumulating", "backward", "step_scheduler", "stepping"]

_NOTHING = nullcontext()


def accumulating(
    accelerator: "Accelerator", model: "nn.Module", *, last: bool
) -> AbstractContextManager[None]:
    """Return ``accelerator.accumulate(model)``, or nothing where every batch is a step.

    Args:
        accelerator: Counts the batches of a window.
        model: What is trained.
        last: Whether the epoch ends with this batch, and with it the window. Accelerate's own
            dataloaders tell it that themselves.
    """
    if _is_plain(accelerator):
        accelerator.sync_gradients = True
        return _NOTHING
    if last and accelerator.gradient_state.sync_with_dataloader:
        accelerator.step = accelerator.gradient_accumulation_steps - 1
    context: AbstractContextManager[None] = accelerator.accumulate(model)
    return context


def backward(accelerator: "Accelerator | None", loss: "Tensor") -> None:
    """Run the backward pass, scaled as the accelerator wants it."""
    if accelerator is None or _is_plain(accelerator):
        loss.backward()
    else:
        accelerator.backward(loss)


def stepping(
    accelerator: "Accelerator | None", optimizer: "torch.optim.Optimizer"
) -> "torch.optim.Optimizer":
    """Return what to call ``step`` of, where no loss scaler has a say in it."""
    if accelerator is not None and (
        accelerator.has_lomo_optimizer or accelerator.distributed_type == "XLA"
    ):
        return optimizer
    return behind_accelerate(optimizer)


def step_scheduler(accelerator: "Accelerator | None", scheduler: Any) -> None:
    """Advance the scheduler by one step that was made."""
    plain = accelerator is not None and _is_plain(accelerator)
    # Accelerate's wrapper keeps a scheduler with a fixed length from going beyond it.
    if plain and type(scheduler).__module__.startswith("accelerate."):
        inner = scheduler.scheduler
        scheduler = scheduler if hasattr(inner, "total_steps") else inner
    scheduler.step()


def _is_plain(accelerator: "Accelerator") -> bool:
    return (
        accelerator.distributed_type == "NO"
        and accelerator.gradient_accumulation_steps == 1
        and accelerator.scaler is None
        and not accelerator.has_lomo_optimizer
    )
