"""What RoboOrchardLab 0.4.0 has and gradclip does not: names, and fields that do nothing."""

from collections.abc import Callable
from typing import NoReturn

from gradclip.config import Config
from gradclip.errors import AbsentNameError, warn

__all__ = ["refusing", "warn_of_idle"]

_CACHE = (
    "call accelerate.utils.memory.clear_device_cache() in a hook of your own: "
    'hooks.register_hook("on_epoch", HookContext.from_callable(after=...))'
)
_MODEL = (
    "SaveCheckpoint keeps the weights of every checkpoint in its model.safetensors; for a folder "
    "with the weights alone call accelerator.save_model(model, folder) in a hook of your own"
)
_INSTEAD = {
    "ClearCacheHook": _CACHE,
    "ClearCacheHookConfig": _CACHE,
    "SaveModel": _MODEL,
    "SaveModelConfig": _MODEL,
}


def refusing(module: str) -> Callable[[str], NoReturn]:
    """Return a module's ``__getattr__``, which says of such a name what to use.

    Args:
        module: Its name.
    """

    def absent(name: str) -> NoReturn:
        if name in _INSTEAD:
            raise AbsentNameError(f"{module} has no {name}: {_INSTEAD[name]}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return absent


def warn_of_idle(config: Config, *names: str) -> None:
    """Warn of fields that were given, and that are there so that configurations can be read."""
    for name in names:
        if name in config.model_fields_set:
            warn(f"{type(config).__name__}({name}=...) does nothing in gradclip")
