"""The parameters of each name pattern: sorted once, and again only where they were replaced."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from operator import is_
from typing import Literal

from torch import Tensor
from torch.nn.modules.conv import _ConvTransposeNd

from gradclip.clipping.collect.shards import Shards, local_part
from gradclip.clipping.collect.sources import ParameterSource, short
from gradclip.errors import ArgumentValueError


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

    @cached_property
    def is_named(self) -> bool:
        """Whether every parameter has a name of its own, and not only a position."""
        known = self.source.names()
        return all(known[number] is not None for number in self.numbers)

    @cached_property
    def unit_dims(self) -> list[int]:
        """Which dimension of each parameter has its units: that of its outputs."""
        module = self.source.module
        transposed = {
            id(each._parameters.get("weight"))  # noqa: SLF001 - a parametrized weight would be computed
            for each in (() if module is None else module.modules())
            if isinstance(each, _ConvTransposeNd)
        }
        return [1 if id(parameter) in transposed else 0 for parameter in self.parameters]

    def rows(self, scope: Literal["group", "tensor", "unit"]) -> list[int]:
        """Return how many rows the local part of each parameter has: its units, or one."""
        if scope != "unit":
            return [1] * len(self.parameters)
        local = map(local_part, self.parameters)
        return [
            part.shape[dim] if part.dim() > 1 else 1
            for part, dim in zip(local, self.unit_dims, strict=True)
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
                    f"took all of them); names look like {short(known[:4], 160)}"
                )
