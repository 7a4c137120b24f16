"""A state of common Python and NumPy kinds, as numbers, strings and tensors, and back.

Files of checkpoints are read without unpickling, which leaves few kinds. What is of another kind is
written as one of those, and where it was, and of which kind, is written beside it.
"""

import datetime as dt
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from gradclip.errors import ArgumentTypeError

__all__ = ["from_plain", "to_plain"]

_FACTORIES = {each.__name__: each for each in (int, float, str, list, dict, set, bool)}
_AS_THEY_ARE = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, torch.Size)
_CONTAINERS = (list, tuple, dict, OrderedDict)
_KEYS = (str, int, float, bool, bytes, type(None))


@dataclass(frozen=True)
class _Kind:
    """A kind that is written as another.

    Args:
        fits: Whether a value is of this kind.
        write: Returns what stands for it, perhaps with more that is to be written.
        read: Makes it of that.
    """

    fits: Callable[[Any], bool]
    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


def _numpy() -> Any:
    import numpy as np  # noqa: PLC0415 - only for states that hold such arrays

    return np


def _is_numpy(value: object, name: str) -> bool:
    # Of arrays no subclass: a mask, say, would be lost.
    kinds = type(value).__mro__ if name == "generic" else (type(value),)
    return type(value).__module__.split(".")[0] == "numpy" and any(
        each.__name__ == name for each in kinds
    )


def _write_array(array: Any) -> Any:
    if array.dtype.hasobject or array.dtype.kind == "V":
        raise ArgumentTypeError(f"is an array of {array.dtype}: expected numbers, strings or times")
    # As bytes: torch has not all of NumPy's kinds of numbers.
    data = torch.frombuffer(bytearray(array.tobytes() or b"\0"), dtype=torch.uint8)
    return {"dtype": array.dtype.str, "shape": list(array.shape), "bytes": data}


def _read_array(written: Mapping[str, Any]) -> Any:
    np = _numpy()
    dtype = np.dtype(written["dtype"])
    count = 1
    for size in written["shape"]:
        count *= size
    data = written["bytes"].numpy().tobytes()[: count * dtype.itemsize]
    return np.frombuffer(data, dtype).reshape(written["shape"]).copy()


def _write_defaults(value: Any) -> Any:
    factory = value.default_factory
    if factory is not None and factory not in _FACTORIES.values():
        raise ArgumentTypeError(
            f"is a defaultdict whose default is {factory!r}: expected one of "
            f"{', '.join(_FACTORIES)}"
        )
    return [None if factory is None else factory.__name__, dict(value)]


def _read_defaults(written: Any) -> Any:
    name, items = written
    return defaultdict(None if name is None else _FACTORIES[name], items)


_KINDS = {
    "numpy scalar": _Kind(
        lambda v: _is_numpy(v, "generic"),
        lambda v: _write_array(_numpy().asarray(v)),
        lambda w: _read_array(w)[()],
    ),
    "numpy array": _Kind(lambda v: _is_numpy(v, "ndarray"), _write_array, _read_array),
    "deque": _Kind(
        lambda v: type(v) is deque, lambda v: [v.maxlen, list(v)], lambda w: deque(w[1], w[0])
    ),
    "defaultdict": _Kind(lambda v: type(v) is defaultdict, _write_defaults, _read_defaults),
    "set": _Kind(lambda v: type(v) is set, list, set),
    "frozenset": _Kind(lambda v: type(v) is frozenset, list, frozenset),
    "path": _Kind(lambda v: isinstance(v, Path), str, Path),
    "timedelta": _Kind(
        lambda v: type(v) is dt.timedelta,
        lambda v: [v.days, v.seconds, v.microseconds],
        lambda w: dt.timedelta(*w),
    ),
    "datetime": _Kind(
        lambda v: type(v) is dt.datetime,
        lambda v: v.isoformat(),
        dt.datetime.fromisoformat,
    ),
    "tensor of requires_grad": _Kind(
        lambda v: isinstance(v, torch.Tensor) and v.requires_grad,
        lambda v: v.detach(),
        lambda w: w.requires_grad_(),
    ),
}
"""Kinds that are written as others, by the name that a file has for them."""


def to_plain(value: Any, what: str) -> dict[str, Any]:
    """Return a state as a file can hold it.

    Args:
        value: The state.
        what: What it is the state of, for the message.

    Raises:
        ArgumentTypeError: GC011, something in it has no plain form; the message says where.
    """
    kinds: list[tuple[tuple[int, ...], str]] = []
    return {"state": _written(value, what, (), kinds, frozenset()), "kinds": kinds}


def from_plain(written: Mapping[str, Any]) -> Any:
    """Return the state that ``to_plain`` was given."""
    return _read(written["state"], (), dict(written["kinds"]))


def _written(
    value: Any,
    what: str,
    place: tuple[int, ...],
    kinds: list[tuple[tuple[int, ...], str]],
    around: frozenset[int],
) -> Any:
    """Return what stands for a value, and note its kind.

    Args:
        value: A part of the state.
        what: The state, and the keys that lead to the value.
        place: The same keys, as numbers of entries: what a file can hold.
        kinds: Where a value of another kind is, and of which.
        around: By ``id``, what the value lies in.
    """
    if id(value) in around:
        raise ArgumentTypeError(f"{what} holds itself, so it cannot be part of a checkpoint")
    around |= {id(value)}
    name = next((name for name, kind in _KINDS.items() if kind.fits(value)), None)
    if name is not None:
        kinds.append((place, name))
        try:
            value = _KINDS[name].write(value)
        except ArgumentTypeError as error:
            raise ArgumentTypeError(f"{what} {error}") from None
    if isinstance(value, torch.Tensor):
        _check_readable(value, what)
        return value
    if type(value) in _AS_THEY_ARE:
        return value
    if type(value) not in _CONTAINERS:
        raise ArgumentTypeError(
            f"{what} is of type {type(value).__module__}.{type(value).__qualname__}, and "
            "checkpoints unpickle nothing: expected numbers, strings, tensors, arrays, paths, "
            "times, and lists, tuples, sets, deques and dictionaries of these"
        )
    keyed = isinstance(value, dict)
    parts = [
        _written(each, f"{what}[{key!r}]", (*place, number), kinds, around)
        for number, (key, each) in enumerate(value.items() if keyed else enumerate(value))
    ]
    if not keyed:
        return type(value)(parts)
    for key in value:
        if not all(type(k) in _KEYS for k in (key if type(key) is tuple else (key,))):
            raise ArgumentTypeError(f"{what} has the key {key!r}: expected strings or numbers")
    return type(value)(zip(value, parts, strict=True))


def _check_readable(tensor: torch.Tensor, what: str) -> None:
    """Refuse a tensor of another class, or with attributes, that no file gives back.

    Raises:
        ArgumentTypeError: GC011, it is one.
    """
    if type(tensor) is torch.Tensor and not vars(tensor):
        return
    file = BytesIO()
    try:
        torch.save(tensor, file)
        torch.load(BytesIO(file.getbuffer()), weights_only=True)
    except Exception as error:
        raise ArgumentTypeError(
            f"{what} is a tensor of type {type(tensor).__module__}.{type(tensor).__qualname__}, "
            f"with the attributes {sorted(vars(tensor))}, and checkpoints unpickle nothing: "
            "expected a torch.Tensor without attributes of its own, such as "
            "tensor.as_subclass(torch.Tensor).clone()"
        ) from error


def _read(written: Any, place: tuple[int, ...], kinds: Mapping[tuple[int, ...], str]) -> Any:
    value = written
    if type(written) in _CONTAINERS:
        keyed = isinstance(written, dict)
        parts = [
            _read(each, (*place, number), kinds)
            for number, each in enumerate(written.values() if keyed else written)
        ]
        value = type(written)(zip(written, parts, strict=True) if keyed else parts)
    name = kinds.get(place)
    return value if name is None else _KINDS[name].read(value)
