"""The steps of a record as columns: a million of them in a hundred megabytes.

Each column is an ``array.array``, which ``numpy.asarray`` reads without a copy.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from math import nan
from typing import Any, Self, overload

from gradclip.record.schema import (
    FLAGS,
    FLOATS,
    STEP_FLOATS,
    TEXTS,
    GroupRecord,
    StepRecord,
    as_count,
    as_flag,
    as_groups,
    as_number,
    as_text,
)

__all__ = ["Steps"]


class _Columns:
    """Columns of a group: floats, flags, and how many tensors were not finite."""

    def __init__(self, floats: Sequence[str]) -> None:
        self.floats = {name: array("d") for name in floats}
        self.flags = {name: array("b") for name in FLAGS}
        self.nonfinite = array("q")
        self.absent = {name: bytearray() for name in floats}
        """1 where a number was not measured, as far as that ever was."""
        self._each_float, self._each_flag = list(self.floats.items()), list(self.flags.items())

    def add(self, entry: Mapping[str, Any]) -> None:
        get = entry.get
        for name, values in self._each_float:
            value = get(name)
            if type(value) is float:
                values.append(value)
            elif value is None:
                absent = self.absent[name]
                absent.extend(bytes(len(values) - len(absent)))
                absent.append(1)
                values.append(nan)
            else:
                values.append(as_number(name, value))
        for name, flags in self._each_flag:
            flag = get(name)
            flags.append(0 if flag is None else as_flag(name, flag))
        count = get("nonfinite")
        self.nonfinite.append(0 if count is None else as_count("nonfinite", count))

    def values(self, at: int) -> dict[str, Any]:
        found: dict[str, Any] = {
            name: None if self.is_absent(name, at) else values[at]
            for name, values in self.floats.items()
        }
        found.update((name, bool(flags[at])) for name, flags in self.flags.items())
        return {**found, "nonfinite": self.nonfinite[at]}

    def is_absent(self, name: str, at: int) -> bool:
        absent = self.absent[name]
        return at < len(absent) and absent[at] == 1


class Steps(Sequence[StepRecord]):
    """Steps, in the order in which they were written; each is made when it is asked for.

    Attributes:
        step: Which step each line has; ``array("q")``, as ``optimizer``.
        optimizer: Of which optimizer.

    >>> steps = Steps.of([StepRecord(step=0, norm_pre=2.0), StepRecord(step=1)])
    >>> steps.column("norm_pre")
    array('d', [2.0, nan])
    >>> steps[1].norm_pre is None
    True
    """

    def __init__(self) -> None:
        self.step, self.optimizer = array("q"), array("q")
        self._columns = _Columns(STEP_FLOATS)
        self._texts: dict[str, dict[int, str]] = {name: {} for name in TEXTS}
        self._groups: dict[str, tuple[array[int], _Columns]] = {}

    @classmethod
    def of(cls, records: Iterable[StepRecord]) -> Self:
        """Return some records as columns."""
        steps = cls()
        for record in records:
            entry = {each.name: getattr(record, each.name) for each in fields(record)}
            groups = {
                pattern: {each.name: getattr(group, each.name) for each in fields(group)}
                for pattern, group in record.groups.items()
            }
            steps.add({**entry, "groups": groups})
        return steps

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add what a line says.

        Raises:
            ValueError: It says something that a field cannot be, or has no step.
        """
        step = entry.get("step")
        if step is None:
            raise ValueError("it has no step")
        at = len(self.step)
        self.step.append(as_count("step", step))
        number = entry.get("optimizer")
        self.optimizer.append(0 if number is None else as_count("optimizer", number))
        self._columns.add(entry)
        for name in TEXTS:
            if (text := entry.get(name)) is not None:
                self._texts[name][at] = as_text(name, text)
        if groups := entry.get("groups"):
            for pattern, of_group in as_groups(groups).items():
                if pattern not in self._groups:
                    self._groups[pattern] = array("q"), _Columns(FLOATS)
                rows, columns = self._groups[pattern]
                rows.append(at)
                columns.add(of_group)

    def column(self, name: str) -> "array[float] | array[int]":
        """Return a field of all steps; NaN is in the place of a float that was not measured."""
        if name in {"step", "optimizer"}:
            return self.step if name == "step" else self.optimizer
        if name == "nonfinite":
            return self._columns.nonfinite
        return self._columns.flags.get(name) or self._columns.floats[name]

    def of_group(self, pattern: str, name: str) -> "tuple[list[int], array[float]]":
        """Return a float of a pattern at each step that has it, and before it these steps."""
        rows, columns = self._groups[pattern]
        return [self.step[row] for row in rows], columns.floats[name]

    @property
    def patterns(self) -> list[str]:
        """The name patterns that have numbers of their own, in the order of their first ones."""
        return list(self._groups)

    def text(self, name: str) -> dict[int, str]:
        """Return a text by the positions of those steps that have one."""
        return dict(self._texts[name])

    def measured(self, name: str) -> list[int]:
        """Return the positions of those steps at which a float was measured."""
        absent = self._columns.absent[name]
        return [at for at in range(len(self)) if at >= len(absent) or not absent[at]]

    def __len__(self) -> int:
        return len(self.step)

    @overload
    def __getitem__(self, at: int) -> StepRecord: ...
    @overload
    def __getitem__(self, at: slice) -> list[StepRecord]: ...
    def __getitem__(self, at: int | slice) -> StepRecord | list[StepRecord]:
        if isinstance(at, slice):
            return [self[each] for each in range(*at.indices(len(self)))]
        at = range(len(self))[at]
        groups = {}
        for pattern, (rows, columns) in self._groups.items():
            place = bisect_left(rows, at)
            if place < len(rows) and rows[place] == at:
                groups[pattern] = GroupRecord(**columns.values(place))
        return StepRecord(
            step=self.step[at],
            optimizer=self.optimizer[at],
            groups=groups,
            reason=self._texts["reason"].get(at),
            new_policy=self._texts["new_policy"].get(at),
            **self._columns.values(at),
        )

    def __repr__(self) -> str:
        return f"<Steps: {len(self)}>"
