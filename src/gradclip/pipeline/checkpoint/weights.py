"""Weights and optimizer states as one process would have them, whatever engine holds them.

What is sharded (FSDP2, tensor parallelism) is gathered tensor by tensor when it is saved, and
split anew when it is loaded, so a checkpoint depends neither on the engine nor on how many
processes there are. Every process takes part in both; only the main one keeps and writes what was
gathered.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradclip.errors import ArgumentValueError
from gradclip.integrations.wrapped import behind_accelerate

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
    for number, scheduler in enumerate(accelerator._schedulers):  # noqa: SLF001
        found[_file("scheduler", number, "bin")] = scheduler.state_dict()
    if accelerator.scaler is not None:
        found["scaler.pt"] = accelerator.scaler.state_dict()
    return found if main else {}


def write_weights(folder: "Path", states: Mapping[str, Any]) -> None:
    """Write what ``gathered_weights`` returned."""
    from safetensors.torch import save_file  # noqa: PLC0415 - it comes with Accelerate

    for name, state in states.items():
        if name.endswith(".safetensors"):
            save_file(_unshared(state), folder / name, metadata={"format": "pt"})
        else:
            torch.save(state, folder / name)


def load_weights(folder: "Path", accelerator: "Accelerator") -> None:
    """Load what ``write_weights`` wrote, each process its own part; a collective of all of them."""
    for number, model in enumerate(_models(accelerator)):
        _load_model(model, folder / _file("model", number, "safetensors"))
    for number, wrapped in enumerate(accelerator._optimizers):  # noqa: SLF001
        optimizer = behind_accelerate(wrapped)
        state = _load(folder / _file("optimizer", number, "bin"))
        optimizer.load_state_dict(_split_like_parameters(state, optimizer))
    for number, scheduler in enumerate(accelerator._schedulers):  # noqa: SLF001
        scheduler.load_state_dict(_load(folder / _file("scheduler", number, "bin")))
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(_load(folder / "scaler.pt"))


def _models(accelerator: "Accelerator") -> list[nn.Module]:
    """Return the models without what DDP and the compiler put around them."""
    models = accelerator._models  # noqa: SLF001
    return [accelerator.unwrap_model(model, keep_torch_compile=False) for model in models]


def _file(kind: str, number: int, ending: str) -> str:
    return f"{kind}_{number}.{ending}" if number else f"{kind}.{ending}"


def _load(file: "Path") -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return a state with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(each, change) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(each, change) for each in value)
    return value


def _whole(tensor: Tensor) -> Tensor:
    if not hasattr(tensor, "_spec"):
        return tensor
    whole: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return whole.cpu()


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that share no memory, as safetensors wants them: tied weights come twice."""
    seen: set[int] = set()
    unshared = {}
    for name, tensor in state.items():
        memory = tensor.untyped_storage().data_ptr()
        unshared[name] = (tensor.clone() if memory in seen else tensor).contiguous()
        seen.add(memory)
    return unshared


def _split_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor that this process has of ``like``, as a DTensor."""
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415 - slow, and only for these

    spec: Any = like._spec  # type: ignore[attr-defined]  # noqa: SLF001
    device = like._local_tensor.device  # type: ignore[attr-defined]  # noqa: SLF001 - offloaded ones are elsewhere
    there = whole.to(spec.mesh.device_type)
    split = distribute_tensor(there, spec.mesh, spec.placements)
    return split if split.device == device else split.to(device)


def _load_model(model: nn.Module, file: "Path") -> None:
    from safetensors.torch import load_file  # noqa: PLC0415 - it comes with Accelerate

    state: dict[str, Tensor] = load_file(file)
    current = model.state_dict()
    for name in sorted(state.keys() & current.keys()):
        if hasattr(current[name], "_spec"):
            state[name] = _split_like(state[name], current[name])
    model.load_state_dict(state)


def _split_like_parameters(state: Any, optimizer: torch.optim.Optimizer) -> Any:
    """Split what an optimizer keeps of sharded parameters in their shape."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, of_parameter in sorted(state["state"].items()):
        parameter = parameters[number]
        if not hasattr(parameter, "_spec"):
            continue
        for name, value in sorted(of_parameter.items()):
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
                of_parameter[name] = _split_like(value, parameter)
    return state
