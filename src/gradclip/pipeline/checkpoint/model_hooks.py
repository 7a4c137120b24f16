"""The functions that Accelerate's users register to run before a model is saved or loaded.

Those of ``register_save_state_pre_hook`` are given the models, their state dictionaries and the
folder, and may write files there; those of ``register_load_state_pre_hook`` the models and the
folder. Here they cannot take over the saving of a model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradclip.errors import ArgumentValueError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["call_load_hooks", "call_save_hooks", "register_own_hooks"]


def register_own_hooks(accelerator: "Accelerator", model: Any) -> None:
    """Let a model of RoboOrchardLab register its own, as its trainer does."""
    if callable(register := getattr(model, "accelerator_register_all_hooks", None)):
        model.accelerate_model_id = len(accelerator._models)  # noqa: SLF001 - its trainer does so
        register(accelerator)


def call_save_hooks(accelerator: "Accelerator", states: Mapping[str, Any], folder: Path) -> None:
    """Call what was registered to run before a model is saved.

    Args:
        accelerator: Knows the hooks and the models.
        states: By file name, what will be written; empty on all processes but the main one.
        folder: Where the checkpoint is written.

    Raises:
        ArgumentValueError: GC010, one took a state away, so that the model would not be saved.
    """
    models = accelerator._models  # noqa: SLF001 - there is no other way to ask
    for hook in accelerator._save_model_state_pre_hook.values():  # noqa: SLF001
        weights = [state for name, state in states.items() if name.startswith("model")]
        before = len(weights)
        hook(list(models), weights, str(folder))
        if len(weights) != before:
            raise _taken_over("register_save_state_pre_hook")


def call_load_hooks(accelerator: "Accelerator", folder: Path) -> None:
    """Call what was registered to run before a model is loaded.

    Raises:
        ArgumentValueError: GC010, one took a model away, so that it would not be loaded.
    """
    for hook in accelerator._load_model_state_pre_hook.values():  # noqa: SLF001
        models = list(accelerator._models)  # noqa: SLF001
        before = len(models)
        hook(models, str(folder))
        if len(models) != before:
            raise _taken_over("register_load_state_pre_hook")


def _taken_over(name: str) -> ArgumentValueError:
    return ArgumentValueError(
        f"a function of accelerator.{name} took a model out of its list, to save or load it "
        "itself: checkpoints of gradclip hold every model. Let it leave the list as it is; it may "
        "write files of its own."
    )
