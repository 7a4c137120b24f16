"""Runs a function right after a module was executed, without importing that module."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["when_imported"]

_waiting: dict[str, list[Callable[[ModuleType], None]]] = {}


def when_imported(name: str, function: Callable[[ModuleType], None]) -> None:
    """Call a function with a module as soon as that was executed: now, if it was already.

    Whoever imports a name of the module later gets what the function put there.
    """
    module = sys.modules.get(name)
    if module is not None:
        function(module)
        return
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _waiting.setdefault(name, []).append(function)


class _Finder(MetaPathFinder):
    """Lets the others find a module that is waited for, and puts itself around its loader."""

    def __init__(self) -> None:
        self._searched: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _waiting or fullname in self._searched:
            return None
        self._searched.add(fullname)
        try:
            others = (each for each in sys.meta_path if each is not self)
            found = (each.find_spec(fullname, path, target) for each in others)
            spec = next((each for each in found if each is not None), None)
        finally:
            self._searched.discard(fullname)
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads as another loader does, and calls what waits for the module.

    Args:
        loader: The other one. It is the loader of the module again before anybody looks.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__loader__"] = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        for function in _waiting.pop(module.__name__, ()):
            function(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
