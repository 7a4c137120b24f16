"""The choice of cases: every pair is in one, and with ALL_COMBINATIONS every combination is."""

from itertools import combinations, product

import pytest

import pairwise as pairwise_module
from pairwise import chosen, pairwise


def pairs(cases):
    return {pair for case in cases for pair in combinations(enumerate(case), 2)}


@pytest.mark.parametrize(
    ("sizes", "most"), [((2, 2, 2), 4), ((9, 2, 4, 2), 36), ((5, 10, 3, 2), 50), ((3,) * 6, 18)]
)
def test_every_pair_is_in_a_case_and_cases_are_few(monkeypatch, sizes, most):
    monkeypatch.setattr(pairwise_module, "ALL_COMBINATIONS", False)
    kinds = [range(size) for size in sizes]
    cases = chosen(*kinds)
    assert pairs(cases) == pairs(product(*kinds))
    assert len(cases) == len(set(cases)) <= most


def test_every_combination_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(pairwise_module, "ALL_COMBINATIONS", True)
    assert chosen("ab", "cde", "fg") == list(product("ab", "cde", "fg"))


def test_one_argument_has_all_its_values(monkeypatch):
    monkeypatch.setattr(pairwise_module, "ALL_COMBINATIONS", False)
    assert chosen("abc") == [("a",), ("b",), ("c",)]


@pytest.fixture
def doubled(request):
    return 2 * request.param


@pairwise("doubled", doubled=[1, 2], name={"one": 1.0, "two": 2.0}, kind=[int, "inf"])
def test_values_come_with_their_names(request, doubled, name, kind):
    assert doubled in (2, 4)
    words = ["", "one", "two"][int(name)], getattr(kind, "__name__", kind)
    assert request.node.name.endswith(f"[{doubled // 2}-{'-'.join(words)}]")
