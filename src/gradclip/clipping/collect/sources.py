"""Where parameters come from: found again at each call, since wrappers replace them."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from gradclip.errors import ArgumentTypeError, ArgumentValueError

_WRAPPERS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)

_PAIR = 2
_EXPECTED = "tensors, (name, tensor) pairs, an nn.Module or a torch Optimizer"
_GRADIENT = attrgetter("grad")
_PLAIN = {Tensor, nn.Parameter}

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

    def group_sizes(self) -> list[int] | None:
        """Return how many of the parameters each ``param_group`` has; None without an optimizer."""
        ...

    def gradients(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Return what is clipped of each parameter; None where there is nothing."""
        ...


class _HasGradients:
    """Parameters whose gradients are in ``.grad``, as almost all are."""

    def group_sizes(self) -> list[int] | None:
        """Return None: there is no optimizer."""
        return None

    def gradients(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the ``.grad`` of each parameter."""
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - of thousands of DTensors, it tells
            return list(map(_GRADIENT, parameters))


@dataclass(frozen=True)
class ListedParameters(_HasGradients):
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


class GivenGradients(ListedParameters):
    """Gradients that were listed themselves, and not the parameters that have them."""

    def gradients(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the tensors."""
        return list(parameters)


@dataclass(frozen=True)
class ModuleParameters(_HasGradients):
    """The parameters that a module has at the step_tag it is asked."""

    module: nn.Module

    def tensors(self) -> list[Tensor]:
        """Return ``parameters()``."""
        return list(self.module.parameters())

    def names(self) -> Names:
        """Return their names without the prefixes that wrappers add."""
        return [clean_name(name) for name, _ in self.module.named_parameters()]

    all_names = names


@dataclass(frozen=True)
class OptimizerParameters(_HasGradients):
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
            or getattr(self.optimizer, "defaults", {}).get("gradient_release", False)  # of optimi
            or any(hasattr(tensor, "_in_backward_optimizers") for tensor in self.tensors())
        ):
            raise ArgumentValueError(
                "these parameters are stepped inside the backward pass, tensor by tensor, before a "
                "norm of all gradients is known, so nothing can be clipped by it. Step after "
                "backward(): without _apply_optimizer_in_backward, overlap_with_ddp=True, "
                "gradient_release=True, or a layer-wise optimizer of transformers. No gradient was "
                "changed."
            )

    def tensors(self) -> list[Tensor]:
        """Return the parameters of all groups, in order."""
        return [tensor for group in self.optimizer.param_groups for tensor in group["params"]]

    def group_sizes(self) -> list[int] | None:
        """Return how many parameters each of its groups has."""
        return [len(group["params"]) for group in self.optimizer.param_groups]

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


def as_source(params: object, argument: str = "parameters") -> ParameterSource:
    """Turn what a caller gave as parameters into a source.

    Args:
        params: A tensor, an iterable of tensors or (name, tensor) pairs, a module, an optimizer
            (anything with ``param_groups``), or a source.
        argument: What the caller's function calls it, for an error.

    Raises:
        ArgumentTypeError: GC011, for anything else.
        ArgumentValueError: GC010, for a generator that was already exhausted.
    """
    if type(params) is list:
        return _listed(params, argument)
    if isinstance(params, ListedParameters | ModuleParameters | OptimizerParameters):
        return params
    if isinstance(params, nn.Module):
        return ModuleParameters(params)
    if hasattr(params, "param_groups"):
        return OptimizerParameters(params)  # type: ignore[arg-type]
    return _listed(as_sequence(params, argument, _EXPECTED), argument)


def _listed(items: Sequence[object], argument: str) -> ListedParameters:
    kinds = set(map(type, items))
    if kinds <= _PLAIN or all(issubclass(kind, Tensor) for kind in kinds):
        return ListedParameters(list(items))  # type: ignore[arg-type]
    tensors: list[Tensor] = []
    names: Names = []
    for number, item in enumerate(items):
        name: str | None = None
        tensor = item
        if isinstance(item, tuple) and len(item) == _PAIR and isinstance(item[0], str):
            name, tensor = item
        if not isinstance(tensor, Tensor):
            raise ArgumentTypeError(
                f"{argument}[{number}] is a {type(item).__name__}: expected a tensor or a "
                f"(name, tensor) pair, seen {short(item)}"
            )
        tensors.append(tensor)
        names.append(None if name is None else clean_name(name))
    return ListedParameters(tensors, names)


def as_sequence(tensors: object, argument: str, expected: str = "tensors") -> Sequence[object]:
    """Read a tensor, or an iterable of whatever, once.

    Args:
        tensors: What a caller gave.
        argument: What the caller's function calls it, for an error.
        expected: What that function takes, for an error.

    Raises:
        ArgumentTypeError: GC011, if it is no iterable.
        ArgumentValueError: GC010, for a finished generator, which would pass for an empty list.
    """
    if isinstance(tensors, Tensor):
        return (tensors,)
    if inspect.isgenerator(tensors) and inspect.getgeneratorstate(tensors) == inspect.GEN_CLOSED:
        raise ArgumentValueError(
            f"{argument} is a generator that was already exhausted, so there is nothing in it. "
            "Pass a fresh one, such as model.parameters(), or a list."
        )
    if isinstance(tensors, str | bytes | Mapping) or not isinstance(tensors, Iterable):
        raise ArgumentTypeError(
            f"{argument} is a {type(tensors).__name__}: expected {expected}, seen {short(tensors)}"
        )
    return tuple(tensors)


def short(value: object, limit: int = 80) -> str:
    """Return what is shown of a value in an error."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
