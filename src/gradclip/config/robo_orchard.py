"""RoboOrchardLab's names for what gradclip has too, so that files written for it can be read.

Its package is never imported: a name is translated, and the translation is what is looked up.

>>> translated("robo_orchard_lab.pipeline.hooks.grad_clip:GradientClippingHook")
'gradclip.pipeline.hooks.grad_clip:GradientClippingHook'
"""

__all__ = ["CONFIG_TYPE", "translated"]

CONFIG_TYPE = "__config_type__"
"""The key under which its files name the configuration class."""

_MIRRORED = {
    "robo_orchard_lab.pipeline": "gradclip.pipeline",
    "robo_orchard_core.utils.hook": "gradclip.hook",
}
"""Its packages, and those of gradclip where the same names are."""


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
