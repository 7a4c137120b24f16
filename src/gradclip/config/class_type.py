"""Which class a ``class_type`` may name, decided before anything is imported.

A name is looked up among the classes that running code made configurable. Only two things widen
that: the packages where gradclip keeps its own configurable classes, which are imported whole, and
the packages that the caller of ``load`` allows. A file can therefore choose among classes; it
cannot make Python import or run anything else. RoboOrchardLab's names stand for gradclip's.
"""

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

from gradclip.config.robo_orchard import translated
from gradclip.errors import ArgumentTypeError, ArgumentValueError, ClassTypeError

__all__ = [
    "check_allow",
    "class_name",
    "configuration_of",
    "register",
    "resolve",
    "set_configuration",
]

ClassT = TypeVar("ClassT", bound=type)

ROOTS = ("gradclip.pipeline.hooks", "gradclip.clipping.policies")
"""Importing one of these packages registers every configurable class of gradclip in it."""

_DOTTED = r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*"
_MODULE = re.compile(_DOTTED)
_CLASS = re.compile(f"(?P<module>{_DOTTED}):(?P<qualname>{_DOTTED})")
_SHOWN_CHARACTERS = 100

# Weak, so that a class that is not used any more can be freed.
_registry: WeakValueDictionary[str, type] = WeakValueDictionary()
_configurations: WeakKeyDictionary[type, ref[type]] = WeakKeyDictionary()


def register(cls: ClassT) -> ClassT:
    """Let configuration files name ``cls``; also usable as a decorator.

    Returns:
        The class itself.
    """
    _registry[_spelled(cls)] = cls
    return cls


def set_configuration(cls: type, config: type) -> None:
    """Register ``cls``, and make ``config`` what a file that names ``cls`` is read as."""
    register(cls)
    _configurations[cls] = ref(config)


def configuration_of(cls: type) -> type | None:
    """Return the configuration class of ``cls``, or of its nearest ancestor that has one."""
    for base in cls.__mro__:
        reference = _configurations.get(base)
        if reference is not None and (config := reference()) is not None:
            return config
    return None


def class_name(cls: type) -> str:
    """Spell a class as a file names it, ``module:qualname``.

    Raises:
        ClassTypeError: GC002, the class has no such name: it was made inside a function.
    """
    name = _spelled(cls)
    if _CLASS.fullmatch(name) is None:
        raise ClassTypeError(
            f"class_type {name!r} cannot be found again from a file\n"
            "define the class at the top level of a module"
        )
    return name


def resolve(
    name: str, allow: Collection[str] = (), known: Mapping[str, type] | None = None
) -> type:
    """Find the class that a file names, without importing anything that was not allowed.

    Args:
        name: ``module:qualname``.
        allow: Packages and modules whose classes may be named though they are not registered.
            ``"a.b"`` allows the module ``a.b`` and what lies in it.
        known: Classes that the caller holds already, by name.

    Returns:
        The class; its ``__module__`` and ``__qualname__`` are those in ``name``, or in what that
        is translated to.

    Raises:
        ClassTypeError: GC002, the name is malformed, not allowed, or not that of a class.
    """
    prefixes = check_allow(allow)
    match = _CLASS.fullmatch(name)
    if match is None:
        raise ClassTypeError(
            f"class_type {_short(name)} is not of the form module:Class\n"
            "write the class's module, a colon and its name, in plain ASCII"
        )
    if known is not None and name in known:
        return known[name]
    if (cls := _registry.get(name)) is not None:
        return cls
    if (ours := translated(name)) is not None:
        return _mirrored(name, ours)
    module, qualname = match["module"], match["qualname"]
    for root in ROOTS:
        if _within(module, root):
            _import(name, root)
            if (cls := _registry.get(name)) is not None:
                return cls
            raise _refusal(name, f"{root} has no configurable class of that name")
    hidden = any(part.startswith("__") for part in module.split("."))
    if hidden or not any(_within(module, prefix) for prefix in prefixes):
        raise _refusal(
            name,
            "a file may name only what running code made configurable; nothing was imported for it",
            "if the class is yours, import its module before loading and gradclip.config.register "
            "it, or pass its package to load(path, allow=(...))",
        )
    found = _import(name, module)
    if (cls := _registry.get(name)) is not None:
        return cls
    return _walk(name, found, qualname)


def check_allow(allow: Collection[str]) -> Collection[str]:
    """Check what a caller passes as ``allow``.

    Raises:
        ArgumentTypeError: GC011, one string, whose letters would be taken for packages.
        ArgumentValueError: GC010, something in it is not a dotted name.
    """
    if isinstance(allow, str):
        raise ArgumentTypeError(
            f"allow is the string {allow!r}: expected a tuple of package names, allow=({allow!r},)"
        )
    for prefix in allow:
        if not isinstance(prefix, str) or _MODULE.fullmatch(prefix) is None:
            raise ArgumentValueError(f"allow has {prefix!r}: expected dotted package names")
    return allow


def _mirrored(name: str, ours: str) -> type:
    """Find the class of gradclip that stands for one of RoboOrchardLab, or is re-exported there."""
    module, _, qualname = ours.partition(":")
    if root := next((root for root in ROOTS if _within(module, root)), None):
        _import(name, root)
        for known, cls in sorted(_registry.items()):
            place, _, own = known.partition(":")
            if own == qualname and _within(place, module):
                return cls
    raise _refusal(
        name,
        f"it would be read as {_short(ours)}, and gradclip has no configurable class of that name; "
        "nothing of RoboOrchardLab was imported for it",
    )


def _walk(name: str, module: ModuleType, qualname: str) -> type:
    """Look into dictionaries only: a ``getattr`` could run code, and import more."""
    found: Any = module
    for part in qualname.split("."):
        found = vars(found).get(part)
        if not isinstance(found, type):
            raise _refusal(name, f"module {module.__name__} has no class of that name")
        if found.__module__ != module.__name__:
            break
    if _spelled(found) != name:
        raise _refusal(name, f"it is {_spelled(found)} there, and a class goes by its own name")
    return cast("type", found)


def _spelled(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def _import(name: str, module: str) -> ModuleType:
    try:
        return import_module(module)
    except Exception as error:
        raise ClassTypeError(
            f"class_type {_short(name)} cannot be resolved: importing {module} failed\n"
            f"{type(error).__name__}: {error}"
        ) from error


def _refusal(name: str, *notes: str) -> ClassTypeError:
    close = _closest(name)
    suggestion = [] if close is None else [f"did you mean {close!r}?"]
    headline = f"class_type {_short(name)} is not a configurable class"
    return ClassTypeError("\n".join([headline, *suggestion, *notes]))


def _closest(name: str) -> str | None:
    names = [known for known in list(_registry) if _CLASS.fullmatch(known)]
    last = name.rpartition(":")[2]
    same = [known for known in names if known.rpartition(":")[2] == last]
    return next(iter(same or get_close_matches(name, names, n=1)), None)


def _short(name: str) -> str:
    shown = ascii(name)
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[:_SHOWN_CHARACTERS] + "..."
