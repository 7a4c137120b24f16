"""How much of a pattern's norms a rank counts, and in which sums its scopes take part."""

from types import SimpleNamespace

import pytest
import torch

from gradclip.clipping.ranks.holding import Holding
from gradclip.clipping.ranks.share import Share

# Dimension 0 splits the first parameter along its rows, dimension 1 the second along its columns;
# the third is whole on every rank, the fourth is another one on each rank of dimension 0.
HOLDINGS = [
    Holding(split=frozenset({0}), cuts={0: 0}, copies=2, copied=frozenset({1})),
    Holding(split=frozenset({1}), cuts={1: 1}, copies=2, copied=frozenset({0})),
    Holding(copies=4, copied=frozenset({0, 1})),
    Holding(split=frozenset({0}), declared=frozenset({0}), copies=2, compared=False),
]
ROWS = [3, 4, 1, 2]


def share(scope):
    rows = ROWS if scope == "unit" else [1] * 4
    return Share(HOLDINGS, rows, [0, 0, None, 0], scope)


def test_copies_are_counted_in_part():
    assert share("group").weights == [0.5, 0.5, 0.25, 0.5]


@pytest.mark.parametrize(("scope", "scopes"), [("group", 1), ("tensor", 4), ("unit", 10)])
def test_scopes_are_the_same_at_every_step(scope, scopes):
    assert share(scope).scopes == scopes


def test_all_parameters_together_take_part_everywhere():
    assert [share("group").is_local(dimension) for dimension in (0, 1)] == [[False], [False]]


def test_a_tensor_takes_part_where_it_is_split():
    assert share("tensor").is_local(0) == [False, True, True, True]
    assert share("tensor").is_local(1) == [True, False, True, True]


def test_a_unit_takes_part_where_its_elements_are_split():
    """Whole rows on different ranks are units of their own; columns are parts of one unit."""
    assert share("unit").is_local(0) == [True] * 10
    assert share("unit").is_local(1) == [True] * 3 + [False] * 4 + [True] * 3


def test_units_of_another_dimension_are_whole_where_that_is_cut():
    holding = Holding(split=frozenset({0}), cuts={0: 1}, copies=1)
    assert Share([holding], [2], [1], "unit").is_local(0) == [True, True]
    assert Share([holding], [2], [0], "unit").is_local(0) == [False, False]


def test_a_vector_that_is_cut_is_one_unit_of_all_ranks():
    holding = Holding(split=frozenset({0}), cuts={0: 0}, copies=1)
    assert Share([holding], [1], [None], "unit").is_local(0) == [False]


def test_as_one_scope_it_takes_part_everywhere():
    one = share("unit").as_group()
    assert (one.scopes, one.is_local(0)) == (1, [False])
    assert one.weights == share("unit").weights


PRESENT = [True, False, True, True]


def test_tensors_are_counted_in_parts_as_large_as_their_copies():
    flags = torch.tensor([True, True, False])
    assert float(share("tensor").presence(PRESENT).count(flags)) == 0.5 + 0.25
    assert float(share("tensor").presence(None).count(torch.ones(4))) == 1.75


def test_copies_are_summed_for_each_dimension():
    presence = share("tensor").presence(PRESENT)
    assert presence.sums_of_copies(torch.tensor([1.0, 10.0, 100.0]).double()).tolist() == [10, 11]
    alone = share("tensor").presence([True, False, False, True])
    assert alone.sums_of_copies(torch.tensor([1.0, 100.0]).double()).tolist() == [0, 1]
    nothing = share("tensor").presence([False, False, False, True])
    assert nothing.sums_of_copies(torch.ones(1).double()) is None


def test_copies_are_named_with_the_sums_of_their_rows():
    presence = share("unit").presence(PRESENT)
    rows = [1.0, 2.0, 3.0, 10.0, 100.0, 200.0]
    assert presence.copies("abcd", rows) == {("a", ()): 6.0, ("b", ()): 0, ("c", ()): 10.0}


def test_checksums_are_of_what_ranks_compare():
    presence = share("group").presence(PRESENT)
    assert (presence.whole, presence.split) == (bytes([True]), bytes([True, False]))


def test_missing_gradients_are_named_where_another_rank_may_have_them():
    group = SimpleNamespace(names=["a", "b", "c", "d"])
    assert share("group").presence([True, False, False, False]).missing_of(group) == ["b", "c"]
    assert share("group").presence(None).missing_of(group) == []


def test_what_follows_from_a_choice_is_kept():
    one = share("group")
    assert one.presence(PRESENT) is one.presence(list(PRESENT))
    for number in range(20):  # and forgotten, so that it does not grow
        one.presence([bool(number >> bit & 1) for bit in range(4)])
    assert len(one._known) <= 8
