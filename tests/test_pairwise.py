"""The choice of cases: every pair is in one, and with ALL_COMBINATIONS every combination is."""

from itertools import combinations, product

import pytest

from pairwise import chosen, pairwise


def pairs(cases):
    return {pair for case in cases for pair in combinations(enumerate(case), 2)}


@pytest.mark.parametrize(
    ("sizes", "most"), [((2, 2, 2), 4), ((9, 2, 4, 2), 36), ((5, 10, 3, 2), 50), ((3,) * 6, 18)]
)
def test_every_pair_is_in_a_case_and_cases_are_few(monkeypatch, sizes, most):
    monkeypatch.delenv("ALL_COMBINATIONS", raising=False)
    cases = chosen(*sizes)
    assert pairs(cases) == pairs(product(*map(range, sizes)))
    assert len(cases) == len(set(cases)) <= most


def test_every_combination_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("ALL_COMBINATIONS", "1")
    assert chosen(2, 3, 2) == list(product(range(2), range(3), range(2)))


def test_one_argument_has_all_its_values(monkeypatch):
    monkeypatch.delenv("ALL_COMBINATIONS", raising=False)
    assert chosen(3) == [(0,), (1,), (2,)]


@pytest.fixture
def doubled(request):
    return 2 * request.param


@pairwise("doubled", doubled=[1, 2], name={"one": 1.0, "two": 2.0}, kind=[int, "inf"])
def test_values_come_with_their_names(request, doubled, name, kind):
    assert doubled in (2, 4)
    words = ["", "one", "two"][int(name)], getattr(kind, "__name__", kind)
    assert request.node.name.endswith(f"[{doubled // 2}-{'-'.join(words)}]")
