"""Checkpoints that RoboOrchardLab 0.4.0 wrote, to go on with; nothing in them is unpickled.

They are Accelerate's: ``checkpoint_<n>`` with weights, optimizers, schedulers and random states,
and the trainer's progress in ``custom_checkpoint_0.pkl``. One that was taken at an epoch's end goes
on exactly as that run would have gone on. Inside an epoch they do not say in which order its
batches came; where the sampler's seed says it, the rest of the epoch is the same too.
"""

import logging
import re
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from gradclip.errors import CheckpointError, GradClipError, warn
from gradclip.pipeline.checkpoint.moment import Moment, parts
from gradclip.pipeline.checkpoint.progress import TrainerProgressState
from gradclip.pipeline.checkpoint.rng import RandomState

if TYPE_CHECKING:
    from accelerate import Accelerator

    from gradclip.pipeline.checkpoint.data_position import DataPosition

__all__ = ["find", "load"]

logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint_(\d+)")
_PROGRESS = "custom_checkpoint_0.pkl"


def find(path: Path) -> Path | None:
    """Return a checkpoint of RoboOrchardLab, or the last of a folder that has no other ones.

    Args:
        path: A checkpoint, or a folder of them.
    """
    if not path.is_dir():
        return None
    if (path / _PROGRESS).is_file():
        return path
    folders = [each for each in path.iterdir() if each.is_dir()]
    if any((each / "manifest.json").exists() for each in folders):
        return None
    found = [
        (int(match[1]), each)
        for each in folders
        if (match := _NAME.fullmatch(each.name)) and (each / _PROGRESS).is_file()
    ]
    return max(found)[1] if found else None


def load(
    folder: Path, accelerator: "Accelerator", position: "DataPosition"
) -> TrainerProgressState:
    """Load weights, optimizers, schedulers, scaler, random states and progress.

    Returns:
        How far the run was.

    Raises:
        CheckpointError: GC301, a file is missing, damaged, or does not fit the objects of this run.
    """
    try:
        progress = _progress(folder, accelerator, position.dataloader)
        random = _random_state(folder, accelerator.process_index)
        _load_models(folder, accelerator)
        _load_others(folder, accelerator)
        _go_to(position, progress, random)
    except GradClipError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder} is a checkpoint of RoboOrchardLab, and cannot be resumed from: {error}\n"
            "  Model, optimizer and scheduler must be made as they were for the run that wrote it. "
            "Some of them may be loaded by now: make them anew before training."
        ) from error
    if accelerator.is_main_process:
        logger.info(
            "Resume from a checkpoint of RoboOrchardLab: %s, at epoch %s and step %s",
            folder,
            progress.epoch_id,
            progress.step_id,
        )
    return progress


def _read(file: Path) -> Any:
    from accelerate.utils import load  # noqa: PLC0415 - it knows the NumPy kinds that Accelerate writes

    return load(file, map_location="cpu", weights_only=True)


def _progress(folder: Path, accelerator: "Accelerator", dataloader: object) -> TrainerProgressState:
    """Return how far the run was.

    Its hooks save before the step under way is counted, but for those after an epoch and after the
    loop: the former have as many steps as an epoch has, the latter none.
    """
    told: Mapping[str, int] = _read(folder / _PROGRESS)
    epoch, step, total = (int(told[name]) for name in ("epoch_id", "step_id", "global_step_id"))
    length = len(dataloader) if isinstance(dataloader, Sized) else None
    if step and step == length:
        epoch, step = epoch + 1, 0
    elif step or _stepped_since(folder, accelerator, total):
        step, total = step + 1, total + 1
        if step == length:
            epoch, step = epoch + 1, 0
    per_step = accelerator.gradient_accumulation_steps
    return TrainerProgressState(epoch, step, total, 0, total // per_step)


def _stepped_since(folder: Path, accelerator: "Accelerator", total: int) -> bool:
    """Whether a scheduler was stepped with a batch that is not counted yet."""
    file = folder / "scheduler.bin"
    alone = accelerator.num_processes == 1 and accelerator.gradient_accumulation_steps == 1
    return alone and file.exists() and _read(file).get("last_epoch") == total + 1


def _random_state(folder: Path, process: int) -> RandomState:
    file = folder / f"random_states_{process}.pkl"
    if not file.exists():
        raise CheckpointError(
            f"{folder} has no {file.name}: it was written by fewer processes than there are now. "
            "Resume on as many."
        )
    told = _read(file)
    return RandomState(
        python=told["random_state"],
        torch=told["torch_manual_seed"],
        cuda=tuple(told.get("torch_cuda_manual_seed", ())),
        numpy=told["numpy_random_seed"],
    )


def _load_models(folder: Path, accelerator: "Accelerator") -> None:
    from safetensors.torch import load_file  # noqa: PLC0415 - it comes with Accelerate

    for number, wrapped in enumerate(accelerator._models):  # noqa: SLF001 - as Accelerate numbers them
        ending = f"_{number}" if number else ""
        file = folder / f"model{ending}.safetensors"
        state = load_file(file) if file.exists() else _read(folder / f"pytorch_model{ending}.bin")
        if all(name.startswith("module.") for name in state):  # saved as DDP has it
            state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        model = accelerator.unwrap_model(wrapped, keep_torch_compile=False)
        missing, unexpected = model.load_state_dict(state, strict=False)
        # Of tied weights one name is saved.
        lost = set(missing) - _tied(model, state)
        if lost or unexpected:
            raise CheckpointError(
                f"{folder} has weights of another model: it lacks {sorted(lost)[:5]}, and has "
                f"{unexpected[:5]} in addition"
            )


def _tied(model: nn.Module, loaded: Mapping[str, Any]) -> set[str]:
    """Return the names of weights that share their memory with one that was loaded."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    known = {id(weight) for name, weight in weights.items() if name in loaded}
    return {name for name, weight in weights.items() if id(weight) in known}


def _load_others(folder: Path, accelerator: "Accelerator") -> None:
    for kind, objects in {
        "optimizer": accelerator._optimizers,  # noqa: SLF001 - as Accelerate numbers them
        "scheduler": accelerator._schedulers,  # noqa: SLF001
    }.items():
        for number, each in enumerate(objects):
            each.load_state_dict(_read(folder / f"{kind}{f'_{number}' if number else ''}.bin"))
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(_read(folder / "scaler.pt"))


def _go_to(position: "DataPosition", progress: TrainerProgressState, random: RandomState) -> None:
    """Put the data where the run was."""
    seeded = {
        f"{path}.iteration": progress.epoch_id
        for path, part in parts(position.dataloader).items()
        if isinstance(getattr(part, "iteration", None), int)
    }
    now = Moment(random, seeded).state_dict()
    inside = progress.step_id > 0
    if inside and not any(
        type(part).__name__ == "SeedableRandomSampler"
        for part in parts(position.dataloader).values()
    ):
        warn(
            "the checkpoint of RoboOrchardLab was taken inside an epoch, and does not say in which "
            "order the batches of the epoch came: what is left of it may hold samples that were "
            "trained on already. Resume from one that was taken at an epoch's end for an exact "
            "continuation."
        )
    position.load_state_dict(
        {
            "batches": progress.step_id,
            "start": now if inside else None,
            "asked": None,
            "now": now,
        }
    )
