"""Wrappers of optimizers: which are looked through, and which are optimizers of their own."""

import inspect
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

from gradclip.errors import ArgumentTypeError, ArgumentValueError

_TRANSPARENT = {
    "accelerate": "optimizer",
    "lightning": "optimizer",
    "lightning_fabric": "optimizer",
    "pytorch_lightning": "optimizer",
    # It writes the gradients anew before the step, so what is clipped is what it wraps.
    "opacus": "original_optimizer",
}
"""Packages whose wrappers have nothing to step of their own, and where they keep the optimizer."""


def wrapped(optimizer: Any) -> Any:
    """Return what a wrapper of Accelerate, Fabric, Lightning or opacus wraps; None for others.

    A Lookahead, say, wraps an optimizer too, and has weights of its own to step. Only where the
    ``step`` of a wrapper cannot be replaced there is no choice but to look behind it.
    """
    packages = (kind.__module__.partition(".")[0] for kind in type(optimizer).__mro__)
    known = (_TRANSPARENT[package] for package in packages if package in _TRANSPARENT)
    attribute = next(known, "" if is_replaceable(optimizer) else "optimizer")
    inner = getattr(optimizer, attribute, None)
    return inner if hasattr(inner, "param_groups") else None


def is_replaceable(optimizer: Any) -> bool:
    """Return whether the ``step`` of an object can be replaced, on this object alone."""
    step = inspect.getattr_static(type(optimizer), "step", None)
    has_place = type(optimizer).__dictoffset__ and type(optimizer).__weakrefoffset__
    return bool(has_place) and not hasattr(step, "__set__")


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer whose step is held: behind all wrappers that are looked through."""
    while (inner := wrapped(optimizer)) is not None:
        optimizer = inner
    return optimizer


def check_steps_once(optimizer: Any, label: str) -> None:
    """Refuse an optimizer of whose step one clip can not be the whole.

    Args:
        optimizer: A torch optimizer, without wrappers.
        label: What would clip, for the error.

    Raises:
        ArgumentTypeError: GC011, it computes gradients within its step, or steps in two halves.
        ArgumentValueError: GC010, it steps parameters that are not in its ``param_groups``.
    """
    name = type(optimizer).__name__
    if _computes_gradients(optimizer):
        raise ArgumentTypeError(
            f"{name} computes gradients inside step(closure), after {label} has clipped: call "
            "GradientClipper.clip() at the end of the closure instead"
        )
    if hasattr(optimizer, "fused_backward"):
        raise ArgumentTypeError(
            f"{name} updates parameters inside fused_backward(), gradient by gradient, so that "
            f"{label} would never see them. Use the limit that it has itself, if it has one."
        )
    if hasattr(optimizer, "first_step"):
        raise ArgumentTypeError(
            f"{name} steps in two halves, first_step() and second_step(), and {label} clips before "
            "step(): it would not clip at all. Call GradientClipper.clip() before each half, or "
            "give the optimizer that makes the second half (base_optimizer)."
        )
    known = {id(parameter) for parameter in _parameters(optimizer)}
    for where, inner in _inner(optimizer):
        names = [
            described(inner, group, index)
            for group in inner.param_groups
            for index, parameter in enumerate(group["params"])
            if id(parameter) not in known
        ]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""  # noqa: PLR2004
            raise ArgumentValueError(
                f"{name}.{where} steps parameters that are not in {name}.param_groups: "
                f"{', '.join(names[:3])}{more}. {label} would neither clip them nor keep them from "
                f"stepping on a NaN. Give it each inner optimizer, or add these parameters to "
                f"{name}.param_groups. Nothing was changed."
            )


def _computes_gradients(optimizer: Any) -> bool:
    """Return whether a step needs a closure, or has one of its own that is set before."""
    closure = arguments_of(getattr(type(optimizer), "step", None)).get("closure")
    must = closure is not None and closure.default is closure.empty
    return must or hasattr(optimizer, "set_closure")


def arguments_of(step: Any) -> Mapping[str, inspect.Parameter]:
    """Return the arguments that a step takes, by name; none where they cannot be found out."""
    try:
        return inspect.signature(step).parameters
    except (TypeError, ValueError):
        return {}


def described(optimizer: Any, group: dict[str, Any], index: int) -> str:
    """Return the name of a parameter, or its shape and group where it has no name."""
    names = group.get("param_names")
    if names:
        return str(names[index])
    number = next(n for n, each in enumerate(optimizer.param_groups) if each is group)
    return f"parameter {index} of group {number}, of shape {tuple(group['params'][index].shape)}"


def _parameters(optimizer: Any) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _inner(optimizer: Any) -> Iterator[tuple[str, Any]]:
    """Yield the optimizers that one steps, of those that it has in its attributes.

    It steps one with which it shares a parameter, and one that is in an attribute which its
    ``step`` reads. Any other is a neighbour, such as the second optimizer of a GAN.
    """
    known = {id(parameter) for parameter in _parameters(optimizer)}
    kept = list(_kept(optimizer))
    read = _names_in_step(type(optimizer)) if kept else None
    for name, inner in kept:
        shares = any(id(parameter) in known for parameter in _parameters(inner))
        if shares or read is None or name in read:
            yield name, inner


def _names_in_step(kind: type) -> set[str] | None:
    """Return every name and text in the code of ``step``, and of the functions that it names.

    None where the code of a ``step`` cannot be read.
    """
    names = {"step"}
    waiting = _methods(kind, "step")
    if any(not isinstance(each, FunctionType) for each in waiting):
        return None
    while waiting:
        function = waiting.pop()
        if not isinstance(function, FunctionType) or function.__module__.startswith("torch."):
            continue
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            codes += [each for each in code.co_consts if isinstance(each, CodeType)]
            found = {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))} - names
            names |= found
            for name in found:
                waiting += [*_methods(kind, name), function.__globals__.get(name)]
    return names


def _methods(kind: type, name: str) -> list[Any]:
    """Return the functions of a name in a class and its bases, without their decorators."""
    found = [vars(each)[name] for each in kind.__mro__ if name in vars(each)]
    plain = [getattr(each, "fget", None) or getattr(each, "__func__", each) for each in found]
    return [inspect.unwrap(each) for each in plain]


def _kept(optimizer: Any) -> Iterator[tuple[str, Any]]:
    """Yield the optimizers that one has in its attributes, and in lists and mappings of them."""
    attributes = getattr(optimizer, "__dict__", {})
    waiting = [(n, v) for n, v in attributes.items() if n not in ("state", "param_groups")]
    seen = set[int]()
    while waiting:
        name, value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.optim.Optimizer):
            yield name, value
        elif isinstance(value, list | tuple | dict):
            values = value.values() if isinstance(value, dict) else value
            waiting += [(name, each) for each in values]
