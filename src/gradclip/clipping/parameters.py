"""Which tensors: where parameters come from, what they are called, which policy they follow."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from operator import is_
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from gradclip.errors import ArgumentTypeError, ArgumentValueError

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

Names: TypeAlias = list[str | None]


class ParameterSource(Protocol):
    """Where parameters are found again at each call, since wrappers replace them."""

    def tensors(self) -> list[Tensor]:
        """Return the parameters in a fixed order; duplicates allowed."""
        ...

    def names(self) -> Names:
        """Return what those are called, None for what has no name; asked when they changed."""
        ...


@dataclass(frozen=True)
class ListedParameters:
    """Parameters that were listed once: tensors, or (name, tensor) pairs."""

    listed: tuple[tuple[str | None, Tensor], ...]

    def tensors(self) -> list[Tensor]:
        """Return what was listed."""
        return [tensor for _, tensor in self.listed]

    def names(self) -> Names:
        """Return the names that were listed."""
        return [name for name, _ in self.listed]


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


@dataclass(frozen=True)
class OptimizerParameters:
    """The parameters that an optimizer steps, named by it or by a module.

    Args:
        optimizer: Anything with ``param_groups``; read again at each call.
        module: Gives names where the optimizer has none.
    """

    optimizer: torch.optim.Optimizer
    module: nn.Module | None = None

    def tensors(self) -> list[Tensor]:
        """Return the parameters of all groups, in order."""
        return [tensor for group in self.optimizer.param_groups for tensor in group["params"]]

    def names(self) -> Names:
        """Return the optimizer's own names, or the module's."""
        module = self.module
        known = {} if module is None else {id(p): n for n, p in module.named_parameters()}
        names: Names = []
        for group in self.optimizer.param_groups:
            own = group.get("param_names") or (None,) * len(group["params"])
            for name, parameter in zip(own, group["params"], strict=True):
                label = known.get(id(parameter)) if name is None else name
                names.append(None if label is None else clean_name(label))
        return names


def clean_name(name: str) -> str:
    """Strip what wrappers (DDP, FSDP1, ``torch.compile``, checkpointing) put into a name.

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
    return ListedParameters(tuple(_listed(params)))


def _listed(params: object) -> Iterator[tuple[str | None, Tensor]]:
    for number, item in enumerate(as_sequence(params)):
        if isinstance(item, Tensor):
            yield None, item
        elif (
            isinstance(item, tuple)
            and len(item) == 2  # noqa: PLR2004 - a pair
            and isinstance(item[0], str)
            and isinstance(item[1], Tensor)
        ):
            yield clean_name(item[0]), item[1]
        else:
            raise ArgumentTypeError(
                f"parameters[{number}] is a {type(item).__name__}: expected a tensor or a "
                f"(name, tensor) pair, seen {_short(item)}"
            )


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


@dataclass
class ParameterGroup:
    """The parameters that one policy bounds together."""

    pattern: str
    parameters: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


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
        for pattern in patterns or ():
            self._require_match(pattern)

    def groups(self) -> dict[str, ParameterGroup]:
        """Return the groups by pattern, each parameter once.

        Raises:
            ArgumentValueError: GC010, for a parameter without a name, or one that no pattern
                matches.
        """
        current = self._source.tensors()
        unchanged = len(current) == len(self._seen) and all(map(is_, current, self._seen))
        if not unchanged or not self._groups:
            self._groups = self._sort(current)
            self._seen = current
        return self._groups

    def _sort(self, parameters: list[Tensor]) -> dict[str, ParameterGroup]:
        groups = {pattern: ParameterGroup(pattern) for pattern in self._patterns or ("*",)}
        taken: set[int] = set()
        names = self._source.names()
        for number, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
            if id(parameter) in taken:
                continue
            taken.add(id(parameter))
            group = groups[self._pattern_of(name, number, parameter)]
            group.parameters.append(parameter)
            group.names.append(name if name is not None else f"parameters[{number}]")
        return groups

    def _pattern_of(self, name: str | None, number: int, parameter: Tensor) -> str:
        if self._patterns is None:
            return "*"
        if name is None:
            raise ArgumentValueError(
                f"policy is a mapping of name patterns, and parameters[{number}], of shape "
                f"{tuple(parameter.shape)}, has no name. Pass an nn.Module, (name, tensor) pairs "
                "(model.named_parameters()), or an optimizer made from them."
            )
        for pattern in self._patterns:
            if fnmatchcase(name, pattern):
                return pattern
        raise ArgumentValueError(
            f"no pattern of policy matches the parameter {name!r}; patterns: "
            f"{', '.join(map(repr, self._patterns))}. It would silently go unclipped: add "
            '"*": NormClip(...) to bound the rest, or "*": None to leave it alone.'
        )

    def _require_match(self, pattern: str) -> None:
        if self._seen and not self._groups[pattern].parameters:
            known = [name for group in self._groups.values() for name in group.names]
            raise ArgumentValueError(
                f"the pattern {pattern!r} of policy matches no parameter (or earlier patterns took "
                f"all of them); names look like {_short(known[:4], 160)}"
            )
