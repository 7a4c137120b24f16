"""The keywords that every way in takes, and their checks: the kind first, then the range."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from math import inf, isfinite
from numbers import Real
from os import PathLike
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

import torch
from torch import Tensor

from gradclip.config import as_ceiling
from gradclip.errors import ArgumentTypeError, ArgumentValueError

if TYPE_CHECKING:
    from gradclip.clipping.ranks.dimension import GroupLike

Nonfinite: TypeAlias = Literal["skip", "raise", "propagate"]


class HasPolicy:
    """What has a ``policy`` to assign: to assign any other argument would change nothing."""


class _ReadOnce:
    """Stands for an argument that was read once, and is no attribute: nobody would see it change.

    Args:
        name: What it is called.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, kind: type | None = None) -> object:
        raise AttributeError(self._name)

    def __set__(self, instance: object, value: object) -> None:
        raise ArgumentValueError(
            f"to assign {self._name} would change nothing: the limit of this "
            f"{type(instance).__name__} is changed by policy, such as policy = 0.5, and its other "
            "arguments only where it is made. Nothing was changed."
        )


class ClipOptions(TypedDict, total=False):
    """The keywords of ``GradientClipper``; every way in takes all of them.

    Attributes:
        max_norm: The limit of the norm of all gradients together, in place of a policy.
        nonfinite: What to do when a gradient that would be clipped holds a NaN or an infinity:
            "skip" zeroes the gradients and sets ``ClipResult.skipped``; "raise" raises and changes
            nothing, also where gradients are only measured (reads one number per step);
            "propagate" reports the non-finite norm and changes nothing.
        max_consecutive_skips: Skipped steps in a row that are tolerated.
        partitioned: Process groups by name pattern, for parameters of which each rank of the group
            has different ones: ``{"*": pp_group}`` for the stages of a pipeline, ``{"experts.*":
            ep_group}`` for experts placed by hand. What DTensor and FSDP split tells itself. A
            value is a process group, a ``DeviceMesh``, several of these, or None on ranks that are
            in none.
        duplicated: Likewise, for a parameter of which several ranks among those have a copy, as
            stages have that tie weights: it is counted once.
        record: A folder that every step is written to, as ``docs/reference/records.md`` says; the
            one of an earlier run is gone on with after ``load_state_dict``.
        backend: "auto" (the fastest of each device), "foreach", "triton" (CUDA), or "reference"
            (float64, slow, for comparison).
    """

    max_norm: float
    nonfinite: Nonfinite
    max_consecutive_skips: int
    partitioned: "Mapping[str, GroupLike] | None"
    duplicated: "Mapping[str, GroupLike] | None"
    record: "str | PathLike[str] | None"
    backend: str


for _name in (*ClipOptions.__annotations__, "clip_value", "norm_type", "clip_mode"):
    setattr(HasPolicy, _name, _ReadOnce(_name))


@dataclass(frozen=True)
class Options:
    """The same keywords, each with a value; ``max_norm`` has become a policy."""

    nonfinite: Nonfinite = "skip"
    max_consecutive_skips: int = 25
    partitioned: "Mapping[str, GroupLike] | None" = None
    duplicated: "Mapping[str, GroupLike] | None" = None
    record: "str | PathLike[str] | None" = None
    backend: str = "auto"

    @property
    def in_words(self) -> str:
        """What ranks have to have alike."""
        return f"nonfinite={self.nonfinite!r}, max_consecutive_skips={self.max_consecutive_skips}"

    def __post_init__(self) -> None:
        check_nonfinite(self.nonfinite)
        check_count(self.max_consecutive_skips)
        check_folder(self.record)

    @property
    def folder(self) -> Path | None:
        """Where the record goes, whatever folder the process works in later."""
        return None if self.record is None else Path(self.record).absolute()


def read_options(name: str, policy: object, given: Mapping[str, Any]) -> tuple[Any, Options]:
    """Return the policy and the options that a way in was given.

    Args:
        name: What was called, as an error says it.
        policy: Its policy; None where ``max_norm`` is among the keywords.
        given: Its keywords.

    Raises:
        ArgumentTypeError: GC011, for an unknown keyword, no policy, or two.
        ArgumentValueError: GC010, for a value out of range.
    """
    known = ClipOptions.__annotations__
    for keyword in given:
        if keyword not in known:
            near = get_close_matches(keyword, known, n=1)
            hint = f". Did you mean {near[0]}?" if near else f": it takes {', '.join(known)}"
            raise ArgumentTypeError(f"{name} got an unexpected keyword {keyword!r}{hint}")
    options = dict(given)
    max_norm = options.pop("max_norm", None)
    if max_norm is not None:
        max_norm = as_ceiling(max_norm, "max_norm")
    return one_policy(name, policy, max_norm), Options(**options)


def one_policy(name: str, policy: object, max_norm: float | None) -> Any:
    """Return a policy, or the ``max_norm`` that was given in its place.

    Raises:
        ArgumentTypeError: GC011, for none of them, or both.
    """
    if policy is None and max_norm is None:
        raise ArgumentTypeError(
            f"{name} was not told how to clip: policy is None, and there is no max_norm. Give a "
            "number or a policy, such as 1.0, max_norm=1.0 or ValueClip(clip_value=0.5)"
        )
    if policy is not None and max_norm is not None:
        raise ArgumentTypeError(
            f"{name} got both a policy ({policy!r}) and max_norm={max_norm!r}: give one of them"
        )
    return max_norm if policy is None else policy


def check_nonfinite(nonfinite: object) -> Nonfinite:
    """Check what to do about a NaN or an infinity."""
    if nonfinite in ("skip", "raise", "propagate"):
        return nonfinite
    raise (ArgumentValueError if isinstance(nonfinite, str) else ArgumentTypeError)(
        f"nonfinite={nonfinite!r}: expected 'skip', 'raise' or 'propagate'"
    )


def check_folder(record: object) -> None:
    """Check where a record goes; nothing is made there yet."""
    if record is None:
        return
    if not isinstance(record, str | PathLike):
        raise ArgumentTypeError(f"record={record!r}: expected a path, such as 'runs/1'")
    if not str(record) or "\0" in str(record):
        raise ArgumentValueError(f"record={str(record)!r}: expected a path, such as 'runs/1'")
    if Path(record).suffix == ".jsonl" or isfile(record):  # noqa: PTH113 - that of Path may raise
        raise ArgumentValueError(
            f"record={str(record)!r} is a file: expected a folder, such as 'runs/1'. A record in "
            "one file is written by RecordHookConfig(path=...) or gradclip.diagnostics.RunRecorder"
        )


def check_count(count: object) -> int:
    """Check how many skipped steps in a row are tolerated."""
    if isinstance(count, bool) or not isinstance(count, int):
        raise ArgumentTypeError(f"max_consecutive_skips={count!r}: expected an integer >= 0")
    if count < 0:
        raise ArgumentValueError(f"max_consecutive_skips={count}: expected an integer >= 0")
    return count


def check_grad_scale(scale: object) -> float | Tensor | None:
    """Check what gradients are still multiplied by; a tensor becomes 0-d float64."""
    if scale is None:
        return None
    if isinstance(scale, Tensor):
        check_one_number(scale)
        if scale.device.type != "cpu":
            return scale.detach().to(torch.float64).reshape(())  # reading it would wait
        scale = float(scale)
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise ArgumentTypeError(f"grad_scale={scale!r}: expected a positive number")
    try:
        number = float(scale)
    except OverflowError:  # an integer beyond float64
        number = inf
    if not (isfinite(number) and number > 0):
        shown = reprlib.repr(scale)
        raise ArgumentValueError(f"grad_scale={shown}: expected a positive finite number")
    return number


def check_one_number(scale: Tensor, name: str = "grad_scale") -> None:
    """Check as much of a tensor that is a number as a device does not have to be asked."""
    if scale.numel() != 1 or not scale.is_floating_point():
        raise ArgumentValueError(
            f"{name} is a tensor of shape {tuple(scale.shape)} and {scale.dtype}: expected "
            "one positive floating-point number"
        )
