"""Whether sums over one dimension after another count every part once: decided from outlines."""

import pytest

from gradclip.clipping.ranks.coverage import (
    Outline,
    compact,
    connected,
    each_counts_once,
    taken_for_copies,
)

NONE = frozenset()


def outline(dimensions, parts):
    return Outline(tuple(dimensions), parts, NONE)


def part(name, *position):
    return position, 1, name


def grid(rows, columns, split):
    """A grid of ranks; ``split`` says over which of its two dimensions the parameters are split."""
    outlines = {}
    for rank in range(rows * columns):
        row, column = divmod(rank, columns)
        dimensions = [
            range(column, rows * columns, columns),
            range(row * columns, (row + 1) * columns),
        ]
        position = [
            number for number, is_split in zip((row, column), split, strict=True) if is_split
        ]
        copies = (1 if split[0] else rows) * (1 if split[1] else columns)
        outlines[rank] = outline(dimensions, {part(7, *position): copies})
    return outlines


@pytest.mark.parametrize("split", [(True, True), (True, False), (False, True), (False, False)])
def test_a_grid_counts_every_part_once(split):
    assert each_counts_once(grid(2, 3, split))


def test_a_wrong_weight_shows():
    outlines = grid(2, 3, (True, False))
    first = outlines[0]
    wrong = {each: weight + 1 for each, weight in first.parts.items()}
    outlines[0] = outline(first.dimensions, wrong)
    assert not each_counts_once(outlines)


def test_groups_that_overlap_are_no_grid():
    """Ranks 0 and 1 add up, then 1 and 2: rank 0 never hears of rank 2."""
    outlines = {
        0: outline([(0, 1)], {part(1, 0): 1}),
        1: outline([(0, 1), (1, 2)], {part(2, 0): 1}),
        2: outline([(1, 2)], {part(3, 0): 1}),
    }
    assert not each_counts_once(outlines)


def test_ranks_that_would_wait_for_each_other_are_no_grid():
    outlines = {
        0: outline([(0, 1), (0, 2)], {part(1): 1}),
        1: outline([(1, 2), (0, 1)], {part(2): 1}),
        2: outline([(0, 2), (1, 2)], {part(3): 1}),
    }
    assert not each_counts_once(outlines)


def test_two_grids_over_the_same_ranks_count_once():
    """Experts over pairs that lie across the pairs of the rest."""
    everyone = range(4)
    outlines = {
        rank: outline([everyone], {part("dense"): 4, part(f"expert{rank}", rank): 1})
        for rank in range(4)
    }
    assert each_counts_once(outlines)


def test_ranks_are_connected_if_all_that_they_reduce_with_are_known():
    outlines = {0: outline([(0, 1)], {}), 1: outline([(0, 1)], {})}
    assert connected(outlines)
    del outlines[1]
    assert not connected(outlines)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ((0, 1, 2), range(3)),
        ((1, 3, 5), range(1, 6, 2)),
        ((4,), range(4, 5)),
        ((0, 1, 3), (0, 1, 3)),
    ],
)
def test_ranks_are_told_as_a_range_where_they_are_one(ranks, expected):
    told = compact(ranks)
    assert type(told) is type(expected)
    assert tuple(told) == ranks


def declared(*groups, copies=1):
    """Outlines of ranks in groups of ``partitioned``, which have one name for what they hold."""
    outlines = {}
    for rank in sorted({rank for group in groups for rank in group}):
        mine = [group for group in groups if rank in group]
        held = part(7, *(group.index(rank) // copies for group in mine))
        apart = {held: (copies, tuple(mine))}
        outlines[rank] = Outline(tuple(mine), {held: 1}, NONE, apart=apart)
    return outlines


@pytest.mark.parametrize(
    ("groups", "mistaken"),
    [
        ([(0, 1), (2, 3)], []),
        ([(0, 1), (2, 3), (0, 2), (1, 3)], []),
        ([(0, 3), (1, 2), (0, 1), (3, 2)], []),
        ([(0, 1), (1, 2)], []),
        ([(0, 1), (1, 2), (2, 3)], [1, 2]),
        ([(0, 1, 2), (2, 3, 4)], [1, 3]),
    ],
)
def test_ranks_of_overlapping_groups_are_not_taken_for_copies(groups, mistaken):
    assert taken_for_copies(declared(*groups)) == mistaken


def test_declared_copies_are_none_of_them():
    assert taken_for_copies(declared((0, 1, 2, 3), copies=2)) == []
    assert taken_for_copies(declared((0, 1, 2, 3, 4, 5), copies=3)) == []
