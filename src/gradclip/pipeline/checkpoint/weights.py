"""Weights and optimizer states as one process would have them, whatever engine holds them.

What is sharded (FSDP2, tensor parallelism) is gathered tensor by tensor when it is saved, and
split anew when it is loaded, so a checkpoint depends neither on the engine nor on how many
processes there are. Every process takes part in the gathering; only the main one keeps and writes
what was gathered.

``torch.distributed.checkpoint.state_dict`` is not used, for it

- makes a step of zeros with an optimizer that has no state, when it saves and when it loads;
- drops what an optimizer keeps beside the states of its parameters, and empty lists;
- makes strings of the whole numbers that are keys inside a state, and lists of tuples;
- refuses SGD without momentum, a parameter that never had a gradient, an optimizer of two models;
- refuses a model that saves an entry that is none of its attributes;
- leaves a weight that the checkpoint lacks as it was, without a word.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradclip.errors import ArgumentValueError
from gradclip.integrations.wrapped import behind_accelerate
from gradclip.pipeline.checkpoint.parameter_groups import described_groups, restore_groups
from gradclip.pipeline.checkpoint.state_file import read_state, write_state

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator

__all__ = ["check_gatherable", "gathered_weights", "load_weights", "write_weights"]


def check_gatherable(accelerator: "Accelerator") -> None:
    """Refuse models whose parameters no longer tell what they are.

    Raises:
        ArgumentValueError: GC010, a model is wrapped by FSDP1.
    """
    for model in accelerator._models:  # noqa: SLF001 - there is no other way to ask
        for parameter in model.parameters():
            if getattr(parameter, "_fsdp_flattened", False):
                raise ArgumentValueError(
                    "checkpoints hold whole tensors, and FSDP1 keeps flat pieces of them: use "
                    "FSDP2 (FullyShardedDataParallelPlugin(fsdp_version=2), or fully_shard)"
                )


def gathered_weights(accelerator: "Accelerator") -> dict[str, Any]:
    """Gather models, optimizers, schedulers and the loss scaler; a collective of all processes.

    Returns:
        State dictionaries by file name, with whole tensors in host memory; empty on all processes
        but the main one.
    """
    main = accelerator.is_main_process
    found: dict[str, Any] = {}

    def keep(tensor: Tensor) -> Tensor | None:
        whole = _whole(tensor)  # every process takes part, also where the result is dropped
        return whole if main else None

    for number, model in enumerate(_models(accelerator)):
        found[_file("model", number, "safetensors")] = _mapped(model.state_dict(), keep)
    for number, optimizer in enumerate(accelerator._optimizers):  # noqa: SLF001
        state = _mapped(behind_accelerate(optimizer).state_dict(), keep)
        found[_file("optimizer", number, "bin")] = state
        groups = described_groups(behind_accelerate(optimizer), _models(accelerator))
        found[_file("parameters", number, "pt")] = groups
    for number, scheduler in enumerate(accelerator._schedulers):  # noqa: SLF001
        found[_file("scheduler", number, "bin")] = scheduler.state_dict()
    if accelerator.scaler is not None:
        found["scaler.pt"] = accelerator.scaler.state_dict()
    return found if main else {}


def write_weights(folder: "Path", states: Mapping[str, Any]) -> None:
    """Write what ``gathered_weights`` returned.

    Raises:
        OSError: The disk is full, or cannot be written; perhaps behind an error of torch.
    """
    from safetensors import SafetensorError  # noqa: PLC0415 - it comes with Accelerate
    from safetensors.torch import save_file  # noqa: PLC0415

    for name, state in states.items():
        if not name.endswith(".safetensors"):
            write_state(state, folder / name)
            continue
        try:
            save_file(_unshared(state), folder / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def load_weights(folder: "Path", accelerator: "Accelerator") -> None:
    """Load what ``write_weights`` wrote, each process its own part."""
    from safetensors.torch import load_file  # noqa: PLC0415 - it comes with Accelerate

    for number, model in enumerate(_models(accelerator)):
        state = load_file(folder / _file("model", number, "safetensors"))
        likes = model.state_dict()
        model.load_state_dict({n: _split_like(whole, likes.get(n)) for n, whole in state.items()})
    for number, wrapped in enumerate(accelerator._optimizers):  # noqa: SLF001
        optimizer = behind_accelerate(wrapped)
        whole = read_state(folder / _file("optimizer", number, "bin"))
        parameters = folder / _file("parameters", number, "pt")
        if parameters.exists():
            groups = read_state(parameters)
            restore_groups(optimizer, _models(accelerator), groups, whole)
        optimizer.load_state_dict(_split_like_parameters(whole, optimizer))
    for number, scheduler in enumerate(accelerator._schedulers):  # noqa: SLF001
        scheduler.load_state_dict(read_state(folder / _file("scheduler", number, "bin")))
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(read_state(folder / "scaler.pt"))


def _models(accelerator: "Accelerator") -> list[nn.Module]:
    """Return the models without what DDP and the compiler put around them."""
    models = accelerator._models  # noqa: SLF001
    return [accelerator.unwrap_model(model, keep_torch_compile=False) for model in models]


def _file(kind: str, number: int, ending: str) -> str:
    return f"{kind}_{number}.{ending}" if number else f"{kind}.{ending}"


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return a state with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(each, change) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(each, change) for each in value)
    return value


def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.detach().full_tensor().cpu() if hasattr(tensor, "_spec") else tensor
    return whole


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that share no memory, as safetensors wants them: tied weights come twice."""
    seen: set[int] = set()
    unshared = {}
    for name, tensor in state.items():
        memory = tensor.untyped_storage().data_ptr()
        unshared[name] = (tensor.clone() if memory in seen else tensor).contiguous()
        seen.add(memory)
    return unshared


def _split_like(whole: Tensor, like: Any) -> Tensor:
    """Return what this process has of a whole tensor that belongs to ``like``; nothing is sent.

    Where ``like`` is a DTensor, one of its shape is split as it is, and any other (the mean of each
    row, say) is a DTensor that every process has whole. Numbers stay plain.
    """
    if not (hasattr(like, "_spec") and whole.dim()):
        return whole
    from torch.distributed.tensor import DTensor, Replicate  # noqa: PLC0415 - slow, and only for these

    mesh = like.device_mesh
    split = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if whole.shape == like.shape:
        # distribute_tensor() cannot split unevenly under FSDP2 over tensor parallelism.
        split = split.redistribute(placements=like.placements)
    return split.to(like.to_local().device)  # not its mesh's, where it is offloaded


def _split_like_parameters(state: Any, optimizer: torch.optim.Optimizer) -> Any:
    """Split what an optimizer keeps of its parameters, at any depth."""
    kept = state.get("state", {})
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    for number, parameter in enumerate(parameters):
        if number in kept:
            kept[number] = _mapped(kept[number], partial(_split_like, like=parameter))
    return state
