"""What Accelerate or DeepSpeed makes of the objects of a run."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, IterableDataset

from gradclip.errors import ArgumentTypeError, ArgumentValueError
from gradclip.integrations.deepspeed import uses_deepspeed
from gradclip.pipeline.checkpoint.model_hooks import register_own_hooks
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
    optimizer: "Optimizer | None",
    dataloader: Iterable[Any] | None,
    lr_scheduler: Any,
) -> tuple[Any, Any, Iterable[Any] | None, Any]:
    """Return model, optimizer, dataloader and scheduler as training needs them; None stays None.

    Raises:
        DoubleClippingError: GC101, DeepSpeed cannot do what a clipping hook asks.
        ArgumentValueError: GC010, Accelerate cannot prepare them so that the trainer works.
        ArgumentTypeError: GC011, DeepSpeed is to prepare None.
    """
    if uses_deepspeed(accelerator):
        if optimizer is None or dataloader is None:
            raise ArgumentTypeError(
                "under DeepSpeed the trainer needs an optimizer and a dataloader, and one is None"
            )
        clipping = [each for each in hooks.walk() if isinstance(each, GradientClippingHook)]
        return prepare_engine(accelerator, clipping, model, optimizer, dataloader, lr_scheduler)
    register_own_hooks(accelerator, model)
    keep_distributed(accelerator, model)
    if optimizer is None:
        model = accelerator.prepare(model)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
    if dataloader is not None:
        dataloader = prepared_dataloader(accelerator, dataloader)
    if lr_scheduler is not None:
        lr_scheduler = accelerator.prepare(lr_scheduler)
    return model, optimizer, dataloader, lr_scheduler


def prepared_dataloader(accelerator: "Accelerator", dataloader: Iterable[Any]) -> Iterable[Any]:
    """Let Accelerate give each process its share of a DataLoader, and close windows with its end.

    Accelerate builds it anew: torchdata's with its state, if it is told so. Another one that keeps
    a state would lose it, so it is left as it is.

    Raises:
        ArgumentValueError: GC010, Accelerate prepared it already, in a way that its state cannot
            bring it back.
    """
    from accelerate.data_loader import DataLoaderDispatcher  # noqa: PLC0415 - the trainer alone needs it

    of_torchdata = any(
        each.__module__.startswith("torchdata.") for each in type(dataloader).__mro__
    )
    if isinstance(dataloader, DataLoader) and (of_torchdata or not keeps_its_state(dataloader)):
        configuration = accelerator.dataloader_config
        wanted = configuration.use_stateful_dataloader
        dispatches = bool(accelerator.dispatch_batches)
        # On the CPU there is nowhere to move a batch to.
        moves = accelerator.device.type != "cpu"
        try:
            configuration.use_stateful_dataloader = (wanted or of_torchdata) and _brings_back(
                dataloader.dataset, accelerator.num_processes, dispatches
            )
            return accelerator.prepare(dataloader, device_placement=[moves])  # type: ignore[no-any-return]
        finally:
            configuration.use_stateful_dataloader = wanted
    if hasattr(dataloader, "base_dataloader") and not _brings_back(
        dataloader.dataset,  # type: ignore[attr-defined]
        accelerator.num_processes,
        isinstance(dataloader, DataLoaderDispatcher),
    ):
        raise ArgumentValueError(
            "the accelerator prepared the dataloader with use_stateful_dataloader=True, and its "
            "state does not tell where it is: its dataset is a stream that has no state, or is "
            "shared by several processes, or the main process loads for all. Give the trainer the "
            "DataLoader as it was before accelerator.prepare()."
        )
    return dataloader


def _brings_back(dataset: Any, processes: int, dispatches: bool) -> bool:
    """Whether the state of torchdata's loader, behind Accelerate's wrapper, brings it back.

    In a stream without a state it counts twice what it passes over. Where processes share a stream
    the wrapper hides the state of that, and where one loads for all it is several batches ahead.
    """
    stream = isinstance(dataset, IterableDataset)
    if processes > 1:
        return not (stream or dispatches)
    return not stream or hasattr(dataset, "state_dict")
