"""RoboOrchardLab's names for what gradclip has too, so that files written for it can be read.

Its package is never imported: a name is translated, and the translation is what is looked up.

>>> translated("robo_orchard_lab.pipeline.hooks.grad_clip:GradientClippingHook")
'gradclip.pipeline.hooks.grad_clip:GradientClippingHook'
"""

from typing import Any

__all__ = ["CONFIG_TYPE", "translated", "with_nulls"]

CONFIG_TYPE = "__config_type__"
"""The key under which its files name the configuration class."""

_TOML_NULL = "null"
"""How its TOML files write None, which TOML has no word for."""

_MIRRORED = {
    "robo_orchard_lab.pipeline": "gradclip.pipeline",
    "robo_orchard_core.utils.hook": "gradclip.hook",
}
"""Its packages, and those of gradclip where the same names are."""


def with_nulls(data: Any) -> Any:
    """Return the data of a TOML file with None where RoboOrchardLab wrote it.

    >>> with_nulls({"__config_type__": "m:C", "max_norm": "null"})
    {'__config_type__': 'm:C', 'max_norm': None}
    """
    if isinstance(data, list):
        return [with_nulls(each) for each in data]
    if not isinstance(data, dict):
        return data
    found = {key: with_nulls(value) for key, value in data.items()}
    if CONFIG_TYPE not in found:
        return found
    return {key: None if value == _TOML_NULL else value for key, value in found.items()}


def translated(name: str) -> str | None:
    """Return gradclip's name for a class that a file of RoboOrchardLab names.

    Args:
        name: ``module:qualname``.

    Returns:
        The same class under gradclip's package; None where gradclip mirrors no such package.
    """
    for theirs, ours in _MIRRORED.items():
        rest = name.removeprefix(theirs)
        if rest != name and rest.startswith((".", ":")):
            return ours + rest
    return None
