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
_COUNTS = ("epoch_id", "step_id", "global_step_id")


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
        written = len(list(folder.glob("random_states_*.pkl")))
        known = accelerator.process_index < written
        own = _read(folder / f"random_states_{accelerator.process_index if known else 0}.pkl")
        progress, notes = _progress(folder, accelerator, position.dataloader, int(own["step"]))
        if progress.step_id:
            _check_processes(folder, written, accelerator.num_processes)
        _load_models(folder, accelerator)
        _load_others(folder, accelerator)
        _go_to(position, progress, _random_state(own), keep_random=not known)
    except GradClipError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder} is a checkpoint of RoboOrchardLab, and cannot be resumed from: {error}\n"
            "  Model, optimizer and scheduler must be made as they were for the run that wrote it. "
            "Some of them may be loaded by now: make them anew before training."
        ) from error
    if accelerator.is_main_process:
        for note in notes:
            warn(f"the checkpoint of RoboOrchardLab {folder} {note}")
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


def _progress(
    folder: Path, accelerator: "Accelerator", dataloader: object, counted: int
) -> tuple[TrainerProgressState, list[str]]:
    """Return how far the run was, and what there is to say of that.

    Its hooks save before the step under way is counted. At which moment, Accelerate's own count of
    batches says: it begins anew where an epoch ends.

    Args:
        folder: The checkpoint.
        accelerator: Says how windows of accumulation are counted.
        dataloader: Has the epoch's batches.
        counted: Accelerate's count.
    """
    told, notes = _told(folder)
    epoch, step, total = (int(told[name]) for name in _COUNTS)
    length = len(dataloader) if isinstance(dataloader, Sized) else 0
    anew = accelerator.gradient_state.sync_with_dataloader
    per_step = accelerator.gradient_accumulation_steps
    batches = counted if anew else counted - (total - step)
    # After the loop, where max_step ended it after the first batch of an epoch.
    is_cut = not step and length > 1 and total % length == 1
    if batches == (0 if anew else step) and (anew or step in (0, length)):  # at an epoch's end
        if step:
            total += step + 1 == length
            epoch, step = epoch + 1, 0
    elif batches in (step, step + 1) and not is_cut:  # the former where max_step ended the run
        step, total = batches, total + batches - step
        if lost := min(counted % per_step, step):
            notes.append(
                "was taken inside an accumulation window, and has not the gradients of it: the "
                f"batches of the window, {lost}, are trained on again"
            )
            step, total = step - lost, total - lost
        elif step == length:
            epoch, step = epoch + 1, 0
    elif step:
        notes.append(
            "was taken inside an epoch that its run had resumed in, and does not say how many "
            "batches of it were trained on: the epoch begins anew"
        )
        step, total = 0, total + 1
    return TrainerProgressState(epoch, step, total, 0, total // per_step), notes


def _check_processes(folder: Path, before: int, now: int) -> None:
    """Refuse another number of processes inside an epoch, which they share.

    Raises:
        CheckpointError: GC301, there were more, or fewer.
    """
    if before != now:
        raise CheckpointError(
            f"{folder} was taken inside an epoch by {before} processes, and {now} cannot go on "
            f"with the rest of it. Resume on {before}, or from a checkpoint that was taken at an "
            "epoch's end."
        )


def _told(folder: Path) -> tuple[Mapping[str, int], list[str]]:
    """Return the trainer's progress, which is among what was registered for checkpointing."""
    found: Mapping[str, int] | None = None
    others = []
    problem: Exception | None = None
    for file in sorted(folder.glob("custom_checkpoint_*.pkl")):
        told: Any = None
        try:
            told = _read(file)
        except Exception as error:  # noqa: BLE001 - it may be another object's
            problem = problem or error
        if found is None and isinstance(told, Mapping) and told.keys() == set(_COUNTS):
            found = told
        else:
            others.append(file.name)
    if found is None:
        raise ValueError(f"no custom_checkpoint_<n>.pkl holds a trainer's progress ({problem})")
    if not others:
        return found, []
    return found, [f"keeps other objects, in {', '.join(others)}, which are not read"]


def _random_state(told: Mapping[str, Any]) -> RandomState:
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


def _go_to(
    position: "DataPosition",
    progress: TrainerProgressState,
    random: RandomState,
    *,
    keep_random: bool,
) -> None:
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
        },
        keep_random=keep_random,
    )
