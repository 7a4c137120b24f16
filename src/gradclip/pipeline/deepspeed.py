"""The trainer under DeepSpeed: what is prepared otherwise, and what is refused."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from gradclip.errors import ArgumentValueError
from gradclip.integrations.deepspeed import uses_deepspeed

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from torch.optim import Optimizer

    from gradclip.pipeline.hooks.grad_clip import GradientClippingHook

__all__ = ["prepare_engine", "refuse_a_broken_window", "refuse_checkpoints"]


def prepare_engine(
    accelerator: "Accelerator",
    clipping: "Iterable[GradientClippingHook]",
    model: "nn.Module",
    optimizer: "Optimizer",
    dataloader: Iterable[Any],
    lr_scheduler: Any,
) -> tuple[Any, Any, Iterable[Any], Any]:
    """Lower the limit of the clipping hook into DeepSpeed, then make the engine.

    DeepSpeed takes everything at once: from the dataloader it has the size of a batch. An engine
    that the accelerator made before is taken as it is, if it is the model.

    Returns:
        Model, optimizer, dataloader and scheduler, prepared.

    Raises:
        DoubleClippingError: GC101, DeepSpeed cannot do what the hook asks; nothing was prepared.
        ArgumentValueError: GC010, the accelerator has an engine of another model.
    """
    wrapped = accelerator.deepspeed_engine_wrapped
    if wrapped is not None and wrapped.engine is not model:
        raise ArgumentValueError(
            "the accelerator has an engine for another model already, and accelerator.backward() "
            "would step that one: make an Accelerator for each model under DeepSpeed"
        )
    for hook in clipping:
        hook.lower_into(accelerator)
    loader = [dataloader] if isinstance(dataloader, DataLoader) else []
    if wrapped is not None:
        prepared = accelerator.prepare(*loader) if loader else dataloader
        return model, optimizer, prepared, lr_scheduler
    given = [model, optimizer, *loader, *([] if lr_scheduler is None else [lr_scheduler])]
    model, optimizer, *others = accelerator.prepare(*given)
    if loader:
        dataloader, *others = others
    return model, optimizer, dataloader, others[0] if others else None


def refuse_a_broken_window(accelerator: "Accelerator") -> None:
    """Refuse to go on after an error that may have left gradients behind inside the engine.

    Stage 2 would add what is left of the broken accumulation window to the next one, and there is
    no way to drop it.

    Raises:
        ArgumentValueError: GC010, DeepSpeed accumulates gradients.
    """
    if uses_deepspeed(accelerator) and accelerator.gradient_accumulation_steps > 1:
        raise ArgumentValueError(
            "the last call of the trainer ended with an error, perhaps inside an accumulation "
            "window, and DeepSpeed cannot drop the gradients that are left of it: the next step "
            "would be made with them. Start again, with a new accelerator and model."
        )


def refuse_checkpoints(accelerator: "Accelerator") -> None:
    """Refuse to save or load where DeepSpeed has the state.

    Raises:
        ArgumentValueError: GC010, the accelerator is set up for DeepSpeed.
    """
    if uses_deepspeed(accelerator):
        raise ArgumentValueError(
            "gradclip's checkpoints do not cover DeepSpeed: its engine has weights and moments, "
            "and restores them by unpickling, which gradclip's checkpoints never do. Save with "
            "accelerator.save_state(folder) in a hook of your own, without SaveCheckpoint and "
            "resume_from, and load only what you trust. A checkpoint of DeepSpeed may bring back "
            "the gradient_clipping that it was saved with."
        )
