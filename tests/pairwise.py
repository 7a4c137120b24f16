"""Cases for a test whose arguments do not depend on each other: every pair of values, in few cases.

With the environment variable ``ALL_COMBINATIONS`` set, every combination of all values instead.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest

ALL_COMBINATIONS = bool(os.environ.get("ALL_COMBINATIONS"))


def chosen(*kinds: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Choose cases, one value of each kind, so that every two values of two kinds meet.

    Each case is the one that has the most pairs that no case before it has: the choice is the
    same in every run.
    """
    if ALL_COMBINATIONS:
        return list(product(*kinds))
    every = list(product(*(range(len(kind)) for kind in kinds)))
    size = min(2, len(kinds))
    pairs = {case: set(combinations(enumerate(case), size)) for case in every}
    missing, cases = set().union(*pairs.values()), []
    while missing:
        cases.append(max(every, key=lambda case: len(pairs[case] & missing)))
        missing -= pairs[cases[-1]]
    return [
        tuple(kind[place] for kind, place in zip(kinds, case, strict=True))
        for case in sorted(cases)
    ]


def pairwise(*fixtures: str, **values: Iterable[Any] | Mapping[str, Any]) -> pytest.MarkDecorator:
    """Parametrize a test so that every two values of two arguments meet in at least one case.

    Args:
        fixtures: The arguments that are fixtures, which take their value as ``request.param``.
        values: The values of each argument; a mapping gives them names.
    """
    named = [
        tuple(each.items() if isinstance(each, Mapping) else ((name_of(v), v) for v in each))
        for each in values.values()
    ]
    cases = [
        pytest.param(*(value for _, value in case), id="-".join(name for name, _ in case))
        for case in chosen(*named)
    ]
    return pytest.mark.parametrize(tuple(values), cases, indirect=list(fixtures))


def name_of(value: Any) -> str:
    """Say a value in the name of a case."""
    return getattr(value, "__name__", str(value))
