"""What a line of a record says, written and read strictly.

JSON has no infinity and no NaN: they are ``"inf"``, ``"-inf"``, ``"nan"``.
"""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from reprlib import Repr
from typing import TYPE_CHECKING, Any, Self, TypeVar

from gradclip.errors import ArgumentValueError

if TYPE_CHECKING:
    from gradclip.clipping import ClipStats

__all__ = ["FOLDER_SCHEMA", "SCHEMA", "GroupRecord", "StepRecord"]

SCHEMA = 1
"""Of a record that is one file."""

FOLDER_SCHEMA = 2
"""Of a record that is a folder."""

_DIGITS = 9
_TOO_LARGE = 2**63
_DEFAULTS = (None, False, 0)
_scan: Any = vars(json.JSONDecoder())["scan_once"]
short = Repr()
short.maxstring = short.maxother = short.maxlong = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRecord:
    """What one optimizer step did to some of the gradients; ``None`` is what was not measured.

    Attributes:
        norm_pre: The gradient norm before clipping.
        norm_post: The gradient norm after clipping.
        threshold: The norm that was allowed; infinite where nothing was bounded. Where there are
            several limits (by name pattern, by tensor), the one of what was scaled down most.
        coefficient: What the gradients were multiplied by; where there are several limits, the
            smallest one.
        clipped: Whether the gradients were scaled down.
        skipped: Whether the update was left out.
        nonfinite: How many gradient tensors held a NaN or an infinity.
    """

    norm_pre: float | None = None
    norm_post: float | None = None
    threshold: float | None = None
    coefficient: float | None = None
    clipped: bool = False
    skipped: bool = False
    nonfinite: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord(GroupRecord):
    """What one optimizer step did to all gradients; ``None`` is what was not measured.

    Attributes:
        step: The optimizer step, counted from 0.
        optimizer: Which one, where several are recorded together: counted from 0.
        loss: The loss of the step.
        lr: The learning rate of the step.
        elapsed_ms: Time since the previous step ended, or since the run began.
        reason: Why the step was skipped: "nonfinite", "overflow" (of a loss scale), "policy" (that
            asked for it), or "rank" (another one failed).
        groups: The same numbers for each name pattern or ``param_group``, where limits were given
            by these.
        new_policy: The policy in words, at the first step after another one was assigned.
    """

    step: int
    optimizer: int = 0
    loss: float | None = None
    lr: float | None = None
    elapsed_ms: float | None = None
    reason: str | None = None
    groups: Mapping[str, GroupRecord] = field(default_factory=dict, hash=False)
    new_policy: str | None = None

    @classmethod
    def from_stats(
        cls,
        step: int,
        stats: "ClipStats | None",
        *,
        loss: float | None = None,
        lr: float | None = None,
        elapsed_ms: float | None = None,
    ) -> Self:
        """Make the record of a step from what the clipper reported about it.

        Args:
            step: The optimizer step, counted from 0.
            stats: ``ClipResult.to_host()``, or None where nothing was clipped or measured.
            loss: The loss of the step.
            lr: The learning rate of the step.
            elapsed_ms: Time since the previous step ended.
        """
        if stats is None:
            return cls(step=step, loss=loss, lr=lr, elapsed_ms=elapsed_ms)
        return cls(
            step=step,
            loss=loss,
            lr=lr,
            elapsed_ms=elapsed_ms,
            reason=stats.skip_reason,
            groups={name: GroupRecord(**_measured(each)) for name, each in stats.groups.items()},
            new_policy=stats.new_policy,
            **_measured(stats),
        )


_Record = TypeVar("_Record", bound=GroupRecord)
FLOATS = ("norm_pre", "norm_post", "threshold", "coefficient")
TEXTS = ("reason", "new_policy")
FLAGS = ("clipped", "skipped")
STEP_FLOATS = (*FLOATS, "loss", "lr", "elapsed_ms")


def _measured(stats: "ClipStats") -> dict[str, Any]:
    return {each.name: getattr(stats, each.name) for each in fields(GroupRecord)}


# Reading


def parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """Return the object that a line is.

    Raises:
        ArgumentValueError: GC010, it is none.
    """
    try:
        text = line.decode()
        try:
            entry, end = _scan(text, 0)
        except StopIteration:
            end = -1
        if end != len(text):  # it begins or ends with a space, or with what is wrong
            entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        shown = line[:60].decode(errors="replace").strip()
        raise not_a_record(path, number, f"not JSON: {shown!r}") from error
    if not isinstance(entry, dict):
        raise not_a_record(path, number, f"not a JSON object: {short.repr(entry)}")
    return entry


def read_step(path: Path, number: int, entry: Mapping[str, Any]) -> StepRecord:
    """Make a record of what a line says; what it leaves out, or calls null, is as by default.

    Raises:
        ArgumentValueError: GC010, it says something that a field cannot be, or has no step.
    """
    try:
        return _read(StepRecord, entry)
    except ValueError as error:
        raise not_a_record(path, number, str(error)) from None


def _read(kind: type[_Record], entry: Mapping[str, Any]) -> _Record:
    values = {
        each.name: _value(each, entry[each.name])
        for each in fields(kind)
        if entry.get(each.name) is not None
    }
    if kind is StepRecord and "step" not in values:
        raise ValueError("it has no step")
    return kind(**values)


def _value(of: Field[Any], value: Any) -> Any:
    if of.type is bool:
        return as_flag(of.name, value)
    if of.type is int:
        return as_count(of.name, value)
    if of.name == "groups":
        return {pattern: _read(GroupRecord, each) for pattern, each in as_groups(value).items()}
    if of.name in TEXTS:
        return as_text(of.name, value)
    return as_number(of.name, value)


def as_flag(name: str, value: Any) -> bool:
    """Return true or false; a ValueError for anything else."""
    if isinstance(value, bool):
        return value
    raise _wrong(name, value, "true or false")


def as_count(name: str, value: Any) -> int:
    """Return a whole number that 64 bits hold; a ValueError for anything else."""
    if type(value) is int and 0 <= value < _TOO_LARGE:
        return value
    raise _wrong(name, value, "a whole number of 0 or more")


def as_number(name: str, value: Any) -> float:
    """Return a float; a ValueError for what is none."""
    if value in ("inf", "-inf", "nan") or isinstance(value, float):
        return float(value)
    if type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    raise _wrong(name, value, "a number that a float can hold")


def as_text(name: str, value: Any) -> str:
    """Return a text; a ValueError for anything else."""
    if isinstance(value, str):
        return value
    raise _wrong(name, value, "a text")


def as_groups(value: Any) -> dict[str, dict[str, Any]]:
    """Return numbers by pattern; a ValueError for anything else."""
    if isinstance(value, dict) and all(isinstance(each, dict) for each in value.values()):
        return value
    raise _wrong("groups", value, "numbers by pattern")


def _wrong(name: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{name} is {short.repr(value)}, not {expected}")


def not_a_record(path: Path, number: int, found: str) -> ArgumentValueError:
    """Say what is wrong, and where."""
    return ArgumentValueError(
        f"{path}:{number} is not part of a gradclip record: {found}.\n"
        "  A record is a folder that record= wrote, or a JSONL file of RunRecorder or RecordHook."
    )


# Writing


def step_line(record: StepRecord) -> str:
    """Return a line with all that is known of a step, as a record of one file has it."""
    entry = {"step": record.step, "loss": record.loss, **asdict(record)}
    for name in ("groups", "optimizer", *TEXTS):  # of most runs, and of most steps
        if not entry[name]:
            del entry[name]
    return line(entry)


def line(entry: Mapping[str, object]) -> str:
    """Write an object as a line."""
    return json.dumps(_plain(entry), allow_nan=False) + "\n"


def short_line(entry: Mapping[str, object]) -> str:
    """Write an object as a line, without what is as by default, floats in nine digits."""
    return json.dumps(_shortened(entry), allow_nan=False, separators=(",", ":")) + "\n"


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _shortened(entry: Mapping[str, object]) -> dict[str, object]:
    kept: dict[str, object] = {}
    for name, value in entry.items():
        if type(value) is float:
            kept[name] = float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else str(value)
        elif isinstance(value, Mapping):
            if value:
                kept[name] = {key: _shortened(each) for key, each in value.items()}
        elif name == "step" or value not in _DEFAULTS:
            kept[name] = value
    return kept
