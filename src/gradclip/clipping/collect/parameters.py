"""Which tensors: where parameters come from, what they are called, which policy they follow."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from operator import is_
from typing import Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn

from gradclip.clipping.collect.shards import Shards
from gradclip.errors import ArgumentTypeError, ArgumentValueError

_WRAPPERS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)

_PAIR = 2

Names: TypeAlias = list[str | None]


class ParameterSource(Protocol):
    """Where parameters are found again at each call, since wrappers replace them."""

    @property
    def module(self) -> nn.Module | None:
        """The module that has them, if it is known."""
        ...

    def tensors(self) -> list[Tensor]:
        """Return the parameters in a fixed order; duplicates allowed."""
        ...

    def names(self) -> Names:
        """Return what those are called, None for what has no name; asked when they changed."""
        ...

    def all_names(self) -> Names:
        """Return what patterns may be meant for: others than those of its own, too."""
        ...


@dataclass(frozen=True)
class ListedParameters:
    """Parameters that were listed once.

    Args:
        listed: Tensors.
        labels: What they are called, if anything.
    """

    listed: list[Tensor]
    labels: Names | None = None
    module: None = None

    def tensors(self) -> list[Tensor]:
        """Return what was listed."""
        return self.listed

    def names(self) -> Names:
        """Return the names that were listed."""
        return [None] * len(self.listed) if self.labels is None else self.labels

    all_names = names


@dataclass(frozen=True)
class ModuleParameters:
    """The parameters that a module has at the moment it is asked."""

    module: nn.Module

    def tensors(self) -> list[Tensor]:
        """Return ``parameters()``."""
        return list(self.module.parameters())

    def names(self) -> Names:
        """Return their names without the prefixes that wrappers add."""
        return [clean_name(name) for name, _ in self.module.named_parameters()]

    all_names = names


@dataclass(frozen=True)
class OptimizerParameters:
    """The parameters that an optimizer steps, named by it or by a module.

    Args:
        optimizer: Anything with ``param_groups``; read again at each call.
        module: Gives the names, of which the optimizer may have some that are relative to a part.

    Raises:
        ArgumentValueError: GC010, for one that steps inside the backward pass.
    """

    optimizer: torch.optim.Optimizer
    module: nn.Module | None = None

    def __post_init__(self) -> None:
        if (
            getattr(self.optimizer, "_overlap_with_ddp", False)
            or type(self.optimizer).__name__ == "LayerWiseDummyOptimizer"  # of transformers
            or any(hasattr(tensor, "_in_backward_optimizers") for tensor in self.tensors())
        ):
            raise ArgumentValueError(
                "these parameters are stepped inside the backward pass, tensor by tensor, before a "
                "norm of all gradients is known, so nothing can be clipped by it. Step after "
                "backward(): without _apply_optimizer_in_backward, overlap_with_ddp=True, or a "
                "layer-wise optimizer of transformers. No gradient was changed."
            )

    def tensors(self) -> list[Tensor]:
        """Return the parameters of all groups, in order."""
        return [tensor for group in self.optimizer.param_groups for tensor in group["params"]]

    def names(self) -> Names:
        """Return the module's names, or the optimizer's own."""
        module = self.module
        known = {} if module is None else {id(p): n for n, p in module.named_parameters()}
        names: Names = []
        for group in self.optimizer.param_groups:
            own = group.get("param_names") or ()
            if len(own) != len(group["params"]):
                own = (None,) * len(group["params"])
            for name, parameter in zip(own, group["params"], strict=True):
                label = known.get(id(parameter), name)
                names.append(None if label is None else clean_name(label))
        return names

    def all_names(self) -> Names:
        """Return its names, and those of the module: other optimizers may have the rest."""
        others = () if self.module is None else self.module.named_parameters()
        return [*self.names(), *(clean_name(name) for name, _ in others)]


def clean_name(name: str) -> str:
    """Strip what wrappers (DDP, FSDP1, ``torch.compile``, checkpointing, Fabric) put into a name.

    >>> clean_name("module._orig_mod.layers.0._fsdp_wrapped_module.weight")
    'layers.0.weight'
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def as_source(params: object) -> ParameterSource:
    """Turn what a caller gave as parameters into a source.

    Args:
        params: A tensor, an iterable of tensors or (name, tensor) pairs, a module, an optimizer
            (anything with ``param_groups``), or a source.

    Raises:
        ArgumentTypeError: GC011, for anything else.
        ArgumentValueError: GC010, for a generator that was already exhausted.
    """
    if isinstance(params, ListedParameters | ModuleParameters | OptimizerParameters):
        return params
    if isinstance(params, nn.Module):
        return ModuleParameters(params)
    if hasattr(params, "param_groups"):
        return OptimizerParameters(params)  # type: ignore[arg-type]
    return _listed(as_sequence(params))


def _listed(items: Sequence[object]) -> ListedParameters:
    if all(issubclass(kind, Tensor) for kind in set(map(type, items))):
        return ListedParameters(cast("list[Tensor]", list(items)))
    tensors: list[Tensor] = []
    names: Names = []
    for number, item in enumerate(items):
        name: str | None = None
        tensor = item
        if isinstance(item, tuple) and len(item) == _PAIR and isinstance(item[0], str):
            name, tensor = item
        if not isinstance(tensor, Tensor):
            raise ArgumentTypeError(
                f"parameters[{number}] is a {type(item).__name__}: expected a tensor or a "
                f"(name, tensor) pair, seen {_short(item)}"
            )
        tensors.append(tensor)
        names.append(None if name is None else clean_name(name))
    return ListedParameters(tensors, names)


def as_sequence(tensors: object) -> Sequence[object]:
    """Read a tensor, or an iterable of whatever, once.

    Raises:
        ArgumentTypeError: GC011, if it is no iterable.
        ArgumentValueError: GC010, for a finished generator, which would pass for an empty list.
    """
    if isinstance(tensors, Tensor):
        return (tensors,)
    if inspect.isgenerator(tensors) and inspect.getgeneratorstate(tensors) == inspect.GEN_CLOSED:
        raise ArgumentValueError(
            "parameters is a generator that was already exhausted, so nothing would be clipped. "
            "Pass a fresh one (model.parameters()) or a list."
        )
    if isinstance(tensors, str | bytes | Mapping) or not isinstance(tensors, Iterable):
        raise ArgumentTypeError(
            f"parameters is a {type(tensors).__name__}: expected tensors, (name, tensor) pairs, an "
            f"nn.Module or a torch Optimizer, seen {_short(tensors)}"
        )
    return tuple(tensors)


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


@dataclass(eq=False)
class ParameterGroup:
    """The parameters that one policy bounds together.

    Args:
        pattern: What their names match.
        parameters: Each once.
        numbers: Which of the source's they are.
        source: Where they were found.
    """

    pattern: str
    parameters: list[Tensor]
    numbers: list[int]
    source: ParameterSource

    def __post_init__(self) -> None:
        distributed = any(hasattr(parameter, "_spec") for parameter in self.parameters)
        self._shards = Shards(self.parameters) if distributed else None

    def local(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """Return what of the gradients of these parameters is on this process.

        Raises:
            UnsupportedGradientError: GC020, for one that is placed otherwise than its parameter.
        """
        if self._shards is None:
            return gradients
        return self._shards.local(gradients, lambda: self.names)

    @cached_property
    def names(self) -> list[str]:
        """What they are called: needed for messages and results only."""
        known = self.source.names()
        return [
            f"parameters[{number}]" if (name := known[number]) is None else name
            for number in self.numbers
        ]


class Parameters:
    """Parameters sorted by pattern; sorted anew only when the source gives other ones.

    Args:
        source: Where they are found.
        patterns: Name patterns (``fnmatch``), the first match wins; None for one group of all.
    """

    def __init__(self, source: ParameterSource, patterns: Sequence[str] | None) -> None:
        self._source = source
        self._patterns = patterns
        self._seen: list[Tensor] = []
        self._groups: dict[str, ParameterGroup] = {}
        self.groups()

    def groups(self) -> dict[str, ParameterGroup]:
        """Return the groups by pattern, each parameter once.

        Raises:
            ArgumentValueError: GC010, for a parameter without a name, or one that no pattern
                matches.
        """
        current = self._source.tensors()
        unchanged = current is self._seen or (
            len(current) == len(self._seen) and all(map(is_, current, self._seen))
        )
        if not unchanged or not self._groups:
            self._groups = self._sort(current)
            self._seen = current
        return self._groups

    def _sort(self, parameters: list[Tensor]) -> dict[str, ParameterGroup]:
        backwards = range(len(parameters) - 1, -1, -1)
        first = dict(zip(map(id, reversed(parameters)), backwards, strict=True))
        numbers = sorted(first.values())
        chosen: dict[str, list[int]] = {pattern: [] for pattern in self._patterns or ("*",)}
        if self._patterns is None:
            chosen["*"] = numbers
        else:
            names = self._source.names()
            for number in numbers:
                pattern = self._pattern_of(names[number], number, parameters[number])
                chosen[pattern].append(number)
        return {
            pattern: ParameterGroup(pattern, [parameters[n] for n in some], some, self._source)
            for pattern, some in chosen.items()
        }

    def _pattern_of(self, name: str | None, number: int, parameter: Tensor) -> str:
        if name is None:
            raise ArgumentValueError(
                f"policy is a mapping of name patterns, and parameters[{number}], of shape "
                f"{tuple(parameter.shape)}, has no name. Pass an nn.Module, (name, tensor) pairs "
                "(model.named_parameters()), or an optimizer made from them."
            )
        if (pattern := self._first_match(name)) is not None:
            return pattern
        raise ArgumentValueError(
            f"no pattern of policy matches the parameter {name!r}; patterns: "
            f"{', '.join(map(repr, self._patterns or ()))}. It would silently go unclipped: add "
            '"*": NormClip(...) to bound the rest, or "*": None to leave it alone.'
        )

    def _first_match(self, name: str) -> str | None:
        return next((each for each in self._patterns or () if fnmatchcase(name, each)), None)

    def require_matches(self) -> None:
        """Raise if a pattern matches nothing, where no other process has what it could match.

        Raises:
            ArgumentValueError: GC010.
        """
        if not self._seen or all(group.parameters for group in self._groups.values()):
            return
        names = [name for name in self._source.all_names() if name is not None]
        for pattern in self._patterns or ():
            if not any(self._first_match(name) == pattern for name in names):
                known = [name for group in self._groups.values() for name in group.names]
                raise ArgumentValueError(
                    f"the pattern {pattern!r} of policy matches no parameter (or earlier patterns "
                    f"took all of them); names look like {_short(known[:4], 160)}"
                )
