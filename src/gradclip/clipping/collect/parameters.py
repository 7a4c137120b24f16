"""The parameters of each name pattern: sorted once, and again only where they were replaced."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from operator import is_
from typing import Literal

from torch import Tensor

from gradclip.clipping.collect.shards import Shards, local_part
from gradclip.clipping.collect.sources import ParameterSource, short
from gradclip.clipping.collect.units import DeclaredUnits, Units, units_of, warn_of_unclear
from gradclip.errors import ArgumentValueError


@dataclass(eq=False)
class ParameterGroup:
    """The parameters that one policy bounds together.

    Args:
        pattern: What their names match, or which ``param_group`` they are: "group 0".
        parameters: Each once.
        numbers: Which of the source's they are.
        source: Where they were found.
        declared: What their units are, as far as a policy says it.
        may_be_empty: Whether it is no mistake that there are none.
    """

    pattern: str
    parameters: list[Tensor]
    numbers: list[int]
    source: ParameterSource
    declared: DeclaredUnits = field(default_factory=dict)
    may_be_empty: bool = False

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

    @cached_property
    def is_named(self) -> bool:
        """Whether every parameter has a name of its own, and not only a position."""
        known = self.source.names()
        return all(known[number] is not None for number in self.numbers)

    @cached_property
    def units(self) -> list[Units]:
        """What the units of each parameter are.

        Raises:
            ArgumentValueError: GC010, for a declared dimension that a parameter has not.
        """
        names = self.names if self.declared else None
        return units_of(self.parameters, names, self.source.module, self.declared)

    @property
    def unused_units(self) -> list[str]:
        """The patterns of declared units that match none of these parameters."""
        return [
            pattern
            for pattern in self.declared
            if not any(fnmatchcase(name, pattern) for name in self.names)
        ]

    def rows(self, scope: Literal["group", "tensor", "unit"]) -> list[int]:
        """Return how many rows the local part of each parameter has: its units, or one."""
        if scope != "unit":
            return [1] * len(self.parameters)
        local = map(local_part, self.parameters)
        return [units.rows(part) for units, part in zip(self.units, local, strict=True)]

    def warn_of_units(self) -> bool:
        """Warn if nothing says what the units of a parameter are; return whether it did."""
        named = self.names if any(p.dim() > 2 for p in self.parameters) else None  # noqa: PLR2004
        return named is not None and warn_of_unclear(
            self.parameters, named, self.source.module, self.declared
        )


class Parameters:
    """Parameters sorted by pattern; sorted anew only when the source gives other ones.

    Args:
        source: Where they are found.
        patterns: Name patterns (``fnmatch``), the first match wins; None for one group of all.
        units: The units that the policy of a pattern declares, if it does; without patterns
            that of "*".
        by_group: Whether the patterns are names of the ``param_groups``, in their order.
    """

    def __init__(
        self,
        source: ParameterSource,
        patterns: Sequence[str] | None,
        units: Mapping[str, DeclaredUnits] | None = None,
        *,
        by_group: bool = False,
    ) -> None:
        self._source = source
        self._patterns = patterns
        self._units = units or {}
        self._by_group = by_group
        self._sizes: list[int] | None = None
        self._seen: list[Tensor] = []
        self._groups: dict[str, ParameterGroup] = {}
        self.groups()

    def groups(self) -> dict[str, ParameterGroup]:
        """Return the groups by pattern, each parameter once.

        Raises:
            ArgumentValueError: GC010, for a parameter without a name, or one that no pattern
                matches, or another number of ``param_groups`` than there are policies.
        """
        current = self._source.tensors()
        sizes = self._source.group_sizes() if self._by_group else None
        unchanged = current is self._seen or (
            len(current) == len(self._seen) and all(map(is_, current, self._seen))
        )
        if not unchanged or sizes != self._sizes or not self._groups:
            self._groups = self._sort(current, sizes)
            self._seen, self._sizes = current, sizes
        return self._groups

    def _sort(self, parameters: list[Tensor], sizes: list[int] | None) -> dict[str, ParameterGroup]:
        backwards = range(len(parameters) - 1, -1, -1)
        first = dict(zip(map(id, reversed(parameters)), backwards, strict=True))
        numbers = sorted(first.values())
        chosen: dict[str, list[int]] = {pattern: [] for pattern in self._patterns or ("*",)}
        if self._patterns is None:
            chosen["*"] = numbers
        elif self._by_group:
            of_each = self._group_of_each(sizes)
            for number in numbers:
                chosen[of_each[number]].append(number)
        else:
            names = self._source.names()
            for number in numbers:
                pattern = self._pattern_of(names[number], number, parameters[number])
                chosen[pattern].append(number)
        return {
            pattern: ParameterGroup(
                pattern,
                [parameters[n] for n in some],
                some,
                self._source,
                self._units.get(pattern, {}),
                may_be_empty=self._by_group,
            )
            for pattern, some in chosen.items()
        }

    def _group_of_each(self, sizes: list[int] | None) -> list[str]:
        patterns = self._patterns or ()
        assert sizes is not None  # a list for anything but an optimizer was refused
        if len(sizes) != len(patterns):
            raise ArgumentValueError(
                f"policy is a list of {len(patterns)}, and the optimizer has {len(sizes)} "
                "param_groups: give an entry for each, None to leave its gradients alone. Where a "
                "group was added during the run, assign the longer list to policy. No gradient "
                "was changed."
            )
        pairs = zip(patterns, sizes, strict=True)
        return [pattern for pattern, size in pairs for _ in range(size)]

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
        for group in self._groups.values():
            for pattern in group.unused_units if group.parameters else ():
                raise ArgumentValueError(
                    f"the pattern {pattern!r} of units matches no parameter of this policy; names "
                    f"look like {short(group.names[:4], 160)}"
                )
        if not self._seen or all(group.parameters for group in self._groups.values()):
            return
        names = [name for name in self._source.all_names() if name is not None]
        for pattern in () if self._by_group else self._patterns or ():
            if not any(self._first_match(name) == pattern for name in names):
                known = [name for group in self._groups.values() for name in group.names]
                raise ArgumentValueError(
                    f"the pattern {pattern!r} of policy matches no parameter (or earlier patterns "
                    f"took all of them); names look like {short(known[:4], 160)}"
                )
