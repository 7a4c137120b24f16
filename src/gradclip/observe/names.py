"""What parameters are called: found in the modules that are alive, since nobody hands them over."""

import gc
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.fx import GraphModule

__all__ = ["Names"]

_MOST_SCANS = 20
"""A scan looks at every object there is: a tenth of a second."""

_WRAPPERS = (
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_forward_module.",
    "_checkpoint_wrapped_module.",
)


class Names:
    """Finds the name of each parameter in the modules that hold it.

    Attributes:
        parts: Of which parameters a rank has a part that no other rank has, by id.
        owners: The class of the model that has each parameter, by id.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[ref[Tensor], str]] = {}
        self._scans = 0
        self.parts: set[int] = set()
        self.owners: dict[int, str] = {}

    def of(self, parameters: Sequence[Tensor]) -> list[str]:
        """Return a name for each; that of its place and shape, where no module has it."""
        known = self._known
        missing = [p for p in parameters if id(p) not in known or known[id(p)][0]() is not p]
        if missing:
            found = self._scan({id(each) for each in missing})
            for at, each in enumerate(parameters):
                if id(each) in found or id(each) not in known or known[id(each)][0]() is not each:
                    shape = "x".join(map(str, each.shape))
                    name = found.get(id(each), f"parameter {at} ({shape})")
                    known[id(each)] = ref(each), name
        return _distinct([known[id(each)][1] for each in parameters])

    def _scan(self, wanted: set[int]) -> dict[int, str]:
        """Climb from the modules that hold parameters to their roots, which name them."""
        if self._scans >= _MOST_SCANS:
            return {}
        self._scans += 1
        modules = list(_living_modules())
        above: dict[int, list[nn.Module]] = {}
        for module in modules:
            for child in (vars(module).get("_modules") or {}).values():
                if child is not None:
                    above.setdefault(id(child), []).append(module)
        waiting = [
            module
            for module in modules
            if any(id(p) in wanted for p in (vars(module).get("_parameters") or {}).values())
        ]
        seen: set[int] = set()
        roots: list[nn.Module] = []
        while waiting:
            module = waiting.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            if id(module) in above:
                waiting += above[id(module)]
            else:
                roots.append(module)
        return self._named(roots, wanted)

    def _named(self, roots: list[nn.Module], wanted: set[int]) -> dict[int, str]:
        inside = [
            (root, {id(p): name for name, p in root.named_parameters() if id(p) in wanted})
            for root in roots
        ]
        # What torch.compile traced has names of its own.
        inside.sort(key=lambda pair: (isinstance(pair[0], GraphModule), -len(pair[1])))
        several = len({frozenset(each) for _, each in inside if each}) > 1
        found: dict[int, str] = {}
        for root, names in inside:
            if any(type(each).__name__ == "FullyShardedDataParallel" for each in root.modules()):
                self.parts.update(names)
            prefix = f"{type(root).__name__}." if several else ""
            for key, name in names.items():
                found.setdefault(key, prefix + _plain(name))
                self.owners.setdefault(key, _class_of(root))
        return found


def _living_modules() -> Iterator[nn.Module]:
    """Yield every module; those that ``gc.freeze`` hides too."""
    frozen = gc.get_freeze_count()
    if frozen:
        gc.unfreeze()
    try:
        # The type is asked, and not the object, which may answer with anything.
        yield from (each for each in gc.get_objects() if issubclass(type(each), nn.Module))
    finally:
        if frozen:
            gc.freeze()


def _plain(name: str) -> str:
    """Return a name without what wrappers put into it."""
    for each in _WRAPPERS:
        name = name.replace(each, "")
    return name.removeprefix("module.")


def _class_of(model: nn.Module) -> str:
    """Return what a model is called inside wrappers."""
    for inner in (getattr(model, each, None) for each in ("_orig_mod", "module")):
        model = inner if isinstance(inner, nn.Module) else model
    name = type(model).__name__
    return name.removeprefix("FSDP")  # fully_shard derives a class


def _distinct(names: list[str]) -> list[str]:
    seen: dict[str, Any] = {}
    result = []
    for name in names:
        count = seen[name] = seen.get(name, 0) + 1
        result.append(name if count == 1 else f"{name} ({count})")
    return result
