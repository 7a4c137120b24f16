"""What a checkpoint holds, and how it comes back: nothing in it is unpickled.

Accelerate writes and reads model, optimizer, scheduler and loss scaler; it loads them with
``weights_only``. What it would unpickle, or load without saying that it failed, is written here:
the random states, the position in the data, the state of the hooks.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gradclip.errors import ArgumentValueError, CheckpointError, GradClipError
from gradclip.pipeline.checkpoint_store import find
from gradclip.pipeline.deepspeed import refuse_checkpoints
from gradclip.pipeline.rng import RandomState

if TYPE_CHECKING:
    from accelerate import Accelerator

    from gradclip.pipeline.data_position import DataPosition
    from gradclip.pipeline.hooks.mixin import PipelineHookArgs, PipelineHooks
    from gradclip.pipeline.progress_state import TrainerProgressState

__all__ = ["check_checkpointable", "load_training_state", "save_training_state"]

_HOOKS = "hooks.pt"


def check_checkpointable(accelerator: "Accelerator") -> None:
    """Refuse what could only be restored by unpickling it.

    Raises:
        ArgumentValueError: GC010, objects were registered for checkpointing, or DeepSpeed has the
            state.
    """
    refuse_checkpoints(accelerator)
    registered = accelerator._custom_objects  # noqa: SLF001 - there is no other way to ask
    if registered:
        names = ", ".join(sorted({type(each).__name__ for each in registered}))
        raise ArgumentValueError(
            f"accelerator.register_for_checkpointing({names}) is restored by unpickling, and "
            "gradclip's checkpoints unpickle nothing. Keep such state in a PipelineHooks with "
            "state_dict() and load_state_dict(); checkpoints hold it."
        )


def save_training_state(
    folder: Path, arg: "PipelineHookArgs", progress: "TrainerProgressState"
) -> None:
    """Write everything that the next step depends on.

    Args:
        folder: Where this process writes its files.
        arg: The hook's argument, with an accelerator.
        progress: How far the run is; within an accumulation window, gradients are part of it.
    """
    accelerator = arg.accelerator
    assert accelerator is not None
    check_checkpointable(accelerator)
    with _naming_its_own_folder(accelerator):
        accelerator.save_state(str(folder))
    if accelerator.is_main_process:
        torch.save(_hooks_state(arg.hooks), folder / _HOOKS)
    own: dict[str, Any] = {"gradients": {}}
    if arg.data_position is None:
        own["random"] = RandomState.capture().state_dict()
    else:
        own["data"] = arg.data_position.state_dict()
    if progress.micro_step_id and arg.optimizer is not None:
        own["gradients"] = {
            number: parameter.grad
            for number, parameter in enumerate(_stepped(arg.optimizer))
            if parameter.grad is not None
        }
    torch.save(own, folder / _process_file(accelerator))


def load_training_state(
    path: Path,
    accelerator: "Accelerator",
    optimizer: torch.optim.Optimizer,
    hooks: "PipelineHooks",
    position: "DataPosition",
) -> "TrainerProgressState":
    """Restore a checkpoint, or the last one in a folder of them.

    Returns:
        How far the run was.

    Raises:
        CheckpointError: GC301, there is none, it is damaged, or it does not fit these objects.
    """
    check_checkpointable(accelerator)
    folder, manifest = find(path)
    try:
        accelerator.load_state(str(folder))
        own = _load(folder / _process_file(accelerator))
        if "data" in own:
            position.load_state_dict(own["data"])
        else:
            RandomState.from_state_dict(own["random"]).restore()
        parameters = _stepped(optimizer)
        for number, gradient in own["gradients"].items():
            parameters[number].grad = gradient.to(parameters[number].device)
        _load_hooks_state(hooks, _load(folder / _HOOKS))
    except GradClipError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint {folder} is undamaged and does not fit this run: {error}\n"
            "  Model, optimizer, scheduler and hooks must be made as they were for the run that "
            "wrote it. Some of them may be loaded by now: make them anew before training."
        ) from error
    return manifest.progress


def _stepped(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _load(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def _process_file(accelerator: "Accelerator") -> str:
    return f"process_{accelerator.process_index}.pt"


def _named_hooks(hooks: "PipelineHooks | None") -> "Iterator[tuple[str, PipelineHooks]]":
    """Name every set of hooks by its class and its number among those of that class."""
    counts: dict[str, int] = {}
    for each in () if hooks is None else hooks.walk():
        name = type(each).__qualname__
        number = counts[name] = counts.get(name, -1) + 1
        yield f"{name}:{number}", each


def _hooks_state(hooks: "PipelineHooks | None") -> dict[str, dict[str, Any]]:
    states = {name: each.state_dict() for name, each in _named_hooks(hooks)}
    return {name: state for name, state in states.items() if state}


def _load_hooks_state(hooks: "PipelineHooks", states: Mapping[str, Mapping[str, Any]]) -> None:
    for name, each in _named_hooks(hooks):
        if name in states:
            each.load_state_dict(states[name])


@contextmanager
def _naming_its_own_folder(accelerator: "Accelerator") -> Iterator[None]:
    """Keep Accelerate from writing into a folder that it names and rotates itself."""
    project = accelerator.project_configuration
    naming = project.automatic_checkpoint_naming
    project.automatic_checkpoint_naming = False
    try:
        yield
    finally:
        project.automatic_checkpoint_naming = naming
