"""What Accelerate or DeepSpeed makes of the objects of a run."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from gradclip.errors import ArgumentValueError
from gradclip.integrations.deepspeed import uses_deepspeed
from gradclip.pipeline.checkpoint.own_state import keeps_its_state
from gradclip.pipeline.deepspeed import prepare_engine
from gradclip.pipeline.hooks.grad_clip import GradientClippingHook
from gradclip.pipeline.processes import keep_distributed

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from torch.optim import Optimizer

    from gradclip.pipeline.hooks.mixin import PipelineHooks

__all__ = ["prepared", "prepared_dataloader"]


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
    dataloader = prepared_dataloader(accelerator, dataloader)
    if lr_scheduler is not None:
        lr_scheduler = accelerator.prepare(lr_scheduler)
    return model, optimizer, dataloader, lr_scheduler


def prepared_dataloader(accelerator: "Accelerator", dataloader: Iterable[Any]) -> Iterable[Any]:
    """Let Accelerate give each process its share of a DataLoader, and close windows with its end.

    Accelerate builds it anew: torchdata's with its state, if it is told so, and another one that
    keeps a state without, so that one is left as it is.

    Raises:
        ArgumentValueError: GC010, the main process would load for all from a dataloader that keeps
            its state.
    """
    from accelerate.data_loader import DataLoaderDispatcher  # noqa: PLC0415 - only the trainer needs it

    of_torchdata = any(
        each.__module__.startswith("torchdata.") for each in type(dataloader).__mro__
    )
    if isinstance(dataloader, DataLoader) and (of_torchdata or not keeps_its_state(dataloader)):
        configuration = accelerator.dataloader_config
        wanted = configuration.use_stateful_dataloader
        # On the CPU there is nowhere to move a batch to.
        moves = accelerator.device.type != "cpu"
        try:
            configuration.use_stateful_dataloader = wanted or of_torchdata
            dataloader = accelerator.prepare(dataloader, device_placement=[moves])
        finally:
            configuration.use_stateful_dataloader = wanted
    if (
        isinstance(dataloader, DataLoaderDispatcher)
        and keeps_its_state(dataloader)
        and accelerator.num_processes > 1
    ):
        raise ArgumentValueError(
            "the main process would load the batches of all processes, some of them ahead, and the "
            "state that the dataloader keeps of itself would not be that of the batches that were "
            "trained. Make the accelerator with DataLoaderConfiguration(dispatch_batches=False)."
        )
    return dataloader
