"""What a checkpoint holds, and how it comes back: nothing in it is unpickled.

Of all processes together it holds weights, optimizer states and the state of the hooks; of each
process its random states, its position in the data, and the gradients of an open window. On
another number of processes the former come back as they were; the latter as far as they can.
"""

import fnmatch
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gradclip.errors import ArgumentValueError, CheckpointError, GradClipError
from gradclip.pipeline.checkpoint import robo_orchard
from gradclip.pipeline.checkpoint.manifest import Manifest
from gradclip.pipeline.checkpoint.model_hooks import call_load_hooks, call_save_hooks
from gradclip.pipeline.checkpoint.plain import from_plain, to_plain
from gradclip.pipeline.checkpoint.rng import RandomState
from gradclip.pipeline.checkpoint.state_file import read_state, write_state
from gradclip.pipeline.checkpoint.store import find
from gradclip.pipeline.checkpoint.weights import (
    check_gatherable,
    gathered_weights,
    load_weights,
    write_weights,
)
from gradclip.pipeline.deepspeed import refuse_checkpoints
from gradclip.pipeline.processes import together

if TYPE_CHECKING:
    from accelerate import Accelerator

    from gradclip.pipeline.checkpoint.data_position import DataPosition
    from gradclip.pipeline.checkpoint.progress import TrainerProgressState
    from gradclip.pipeline.hooks.mixin import PipelineHookArgs, PipelineHooks

__all__ = [
    "check_checkpointable",
    "hooks_state",
    "keepable",
    "load_training_state",
    "save_training_state",
]

_HOOKS = "hooks.pt"
_WRITTEN = {"state", "kinds"}


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
    check_gatherable(accelerator)


def keepable(
    accelerator: "Accelerator", progress: "TrainerProgressState"
) -> "TrainerProgressState":
    """Return the progress that a checkpoint can hold: FSDP2 keeps an open window to itself."""
    if not (progress.micro_step_id and getattr(accelerator, "is_fsdp2", False)):
        return progress
    warnings.warn(
        f"the run ends {progress.micro_step_id} batches into an accumulation window, whose "
        "gradients FSDP2 does not give out before the window ends: a run that resumes goes on "
        "without them",
        stacklevel=2,
    )
    return replace(progress, micro_step_id=0)


def save_training_state(
    folder: Path, arg: "PipelineHookArgs", progress: "TrainerProgressState"
) -> None:
    """Write everything that the next step depends on; all processes do so together.

    Args:
        folder: Where this process writes its files.
        arg: The hook's argument, with an accelerator.
        progress: How far the run is; within an accumulation window, gradients are part of it.
    """
    accelerator = arg.accelerator
    assert accelerator is not None
    check_checkpointable(accelerator)
    weights = gathered_weights(accelerator)
    kept = hooks_state(arg.hooks)  # on all processes: a hook may ask the others for its state
    call_save_hooks(accelerator, weights, folder)
    # From here on a process that fails leaves no other one waiting in a collective.
    write_weights(folder, weights)
    if accelerator.is_main_process:
        write_state(kept, folder / _HOOKS)
    own: dict[str, Any] = {"gradients": {}}
    if arg.data_position is None:
        own["random"] = RandomState.capture().state_dict()
    else:
        own["data"] = arg.data_position.state_dict()
    if progress.micro_step_id and arg.optimizer is not None:
        own["gradients"] = {
            number: _local(parameter.grad)
            for number, parameter in enumerate(_stepped(arg.optimizer))
            if parameter.grad is not None
        }
    write_state(own, folder / _process_file(accelerator.process_index))


def load_training_state(
    path: Path,
    accelerator: "Accelerator",
    optimizer: torch.optim.Optimizer | None,
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
    theirs: Path | None = None
    with together(accelerator) as all_processes:
        folder, manifest = path, None
        if accelerator.is_main_process:
            theirs = robo_orchard.find(path)
            if theirs is None:
                folder, manifest = find(path)
    # The others take what the main process found, and need not read every byte again.
    theirs, folder, manifest = all_processes.from_main((theirs, folder, manifest))
    if theirs is not None:
        return robo_orchard.load(theirs, accelerator, position)
    assert manifest is not None
    try:
        hooks_state = _read_hooks_state(folder)
        call_load_hooks(accelerator, folder)
        load_weights(folder, accelerator)
        _load_own(folder, manifest, accelerator, optimizer, position)
        _load_hooks_state(hooks, hooks_state)
    except GradClipError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint {folder} is undamaged and does not fit this run: {error}\n"
            "  Model, optimizer, scheduler and hooks must be made as they were for the run that "
            "wrote it. Some of them may be loaded by now: make them anew before training."
        ) from error
    return manifest.progress


def _load_own(
    folder: Path,
    manifest: Manifest,
    accelerator: "Accelerator",
    optimizer: torch.optim.Optimizer | None,
    position: "DataPosition",
) -> None:
    """Restore what each process had of its own, as far as there were as many of them."""
    before = len(fnmatch.filter(manifest.files, _process_file("*")))
    now = accelerator.num_processes
    # Which batches an epoch has follows from what all processes have alike.
    known = accelerator.process_index < before
    own = read_state(folder / _process_file(accelerator.process_index if known else 0))
    data = own.get("data", {})
    if before != now and manifest.progress.micro_step_id:
        raise _of_its_own(folder, "an accumulation window", "gradients", before, now)
    if before != now and data.get("place") and data["start"]:
        raise _of_its_own(folder, "an epoch", "a dataloader that keeps a state", before, now)
    if data:
        position.load_state_dict(data, keep_random=not known)
    elif known:
        RandomState.from_state_dict(own["random"]).restore()
    parameters = _stepped(optimizer)
    # Without an optimizer nothing is trained.
    for number, gradient in own["gradients"].items() if parameters else ():
        parameters[number].grad = _placed(gradient, parameters[number])


def _of_its_own(folder: Path, part: str, what: str, before: int, now: int) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {folder} was taken inside {part} by {before} processes, each with {what} "
        f"of its own, and {now} cannot go on with it. Resume on {before}, or from a checkpoint "
        f"that was taken at the end of {part}."
    )


def _local(gradient: torch.Tensor) -> torch.Tensor:
    local: torch.Tensor = getattr(gradient, "_local_tensor", gradient)
    return local


def _placed(local: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return a gradient whose part on this process was kept."""
    local = local.to(_local(parameter).device)
    if not hasattr(parameter, "_spec"):
        return local
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - slow, and only for these

    spec: Any = parameter._spec  # noqa: SLF001
    return DTensor.from_local(
        local,
        spec.mesh,
        spec.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _stepped(optimizer: torch.optim.Optimizer | None) -> list[torch.Tensor]:
    groups = [] if optimizer is None else optimizer.param_groups
    return [parameter for group in groups for parameter in group["params"]]


def _process_file(number: object) -> str:
    return f"process_{number}.pt"


def _named_hooks(hooks: "PipelineHooks | None") -> "Iterator[tuple[str, PipelineHooks]]":
    """Name every set of hooks by its class and its number among those of that class."""
    counts: dict[str, int] = {}
    for each in () if hooks is None else hooks.walk():
        name = type(each).__qualname__
        number = counts[name] = counts.get(name, -1) + 1
        yield f"{name}:{number}", each


def hooks_state(hooks: "PipelineHooks | None") -> dict[str, Any]:
    """Return the states of all hooks as a file can hold them.

    Raises:
        ArgumentTypeError: GC011, one holds an object that could only be unpickled.
    """
    states = {name: each.state_dict() for name, each in _named_hooks(hooks)}
    return {
        name: to_plain(state, f"{name.partition(':')[0]}.state_dict()")
        for name, state in states.items()
        if state
    }


def _read_hooks_state(folder: Path) -> dict[str, dict[str, Any]]:
    states = read_state(folder / _HOOKS)
    if isinstance(states, dict) and all(isinstance(state, dict) for state in states.values()):
        # Earlier ones are as the hook gave them.
        return {
            name: from_plain(state) if state.keys() == _WRITTEN else state
            for name, state in states.items()
        }
    raise CheckpointError(
        f"{folder / _HOOKS} is not what SaveCheckpoint writes: it holds no states by the names of "
        "hooks. Resume from another checkpoint."
    )


def _load_hooks_state(hooks: "PipelineHooks", states: Mapping[str, Mapping[str, Any]]) -> None:
    for name, each in _named_hooks(hooks):
        if name in states:
            each.load_state_dict(states[name])
