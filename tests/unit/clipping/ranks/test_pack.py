"""The vector that ranks reduce: what is in it, and which numbers take part in which dimension."""

import pytest
import torch
import torch.distributed as dist

from gradclip.clipping.ranks.holding import Holding
from gradclip.clipping.ranks.pack import Pack, reduce_packs
from gradclip.clipping.ranks.share import Share

CPU = torch.device("cpu")
SPLIT = Holding(split=frozenset({0}), cuts={0: 0})
WHOLE = Holding(copies=2)
TENSORS = Share([SPLIT, WHOLE], [1, 1], [0, 0], "tensor")
GROUP = Share([SPLIT, WHOLE], [1, 1], [0, 0], "group")


class Doubling:
    """A dimension of two ranks, the other of which has the same numbers."""

    def __init__(self, size=2):
        self.size, self.seen = size, []

    def device(self, result_device):
        return result_device

    def all_reduce(self, values, operation):
        self.seen.append((values.clone(), operation))
        if operation == dist.ReduceOp.SUM:
            values *= 2

    def wait(self, work):
        assert work is None


def test_tables_come_back_as_they_went_in():
    pack = Pack([], [(TENSORS, 3), (GROUP, 1)], tail=2)
    tables = [torch.arange(6.0).double().view(2, 3), torch.tensor([[7.0]]).double()]
    vector = pack.join(tables, CPU, torch.tensor([8.0, 9.0]).double())
    assert vector.tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    *back, tail = pack.split(vector)
    assert [each.tolist() for each in back] == [each.tolist() for each in tables]
    assert tail.tolist() == [8, 9]


def test_after_an_error_zeros_of_the_same_length_travel():
    pack = Pack([], [(TENSORS, 3)], tail=1)
    vector = pack.nothing(CPU, but=torch.ones(1, dtype=torch.float64))
    assert vector.tolist() == [0.0] * 6 + [1.0]


def test_what_is_whole_on_every_rank_takes_no_part():
    """Each rank has all of the second tensor: a sum would count it twice. The tail always goes."""
    dimension = Doubling()
    pack = Pack([dimension], [(TENSORS, 2)], tail=1)
    vector = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).double()
    nothing = Pack([dimension], [])
    added, largest = reduce_packs([dimension], (pack, vector), (nothing, vector[:0]))
    assert added.tolist() == [2, 4, 3, 4, 10]
    assert len(largest) == 0
    ((sent, operation),) = dimension.seen
    assert (sent.tolist(), operation) == ([1, 2, 5], dist.ReduceOp.SUM)


def test_sums_and_maxima_go_side_by_side():
    dimension = Doubling()
    added = Pack([dimension], [(GROUP, 1)])
    largest = Pack([dimension], [(GROUP, 1)])
    one = torch.ones(1, dtype=torch.float64)
    sums, maxima = reduce_packs([dimension], (added, one), (largest, one.clone()))
    assert (sums.tolist(), maxima.tolist()) == ([2.0], [1.0])
    assert [operation for _, operation in dimension.seen] == [dist.ReduceOp.SUM, dist.ReduceOp.MAX]


def test_a_dimension_of_one_rank_and_a_pack_of_nothing_send_nothing():
    alone, pair = Doubling(size=1), Doubling()
    local = Share([WHOLE], [1], [0], "tensor")
    pack = Pack([alone, pair], [(local, 1)])
    vector = torch.ones(1, dtype=torch.float64)
    sums, _ = reduce_packs([alone, pair], (pack, vector), (Pack([], []), vector[:0]))
    assert sums.tolist() == [1.0]
    assert not alone.seen
    assert not pair.seen


class Grid:
    """Plays all ranks of a grid of two dimensions at once, whose packs compare copies."""

    def __init__(self, *copies):
        self.vectors, self.sizes = [], (2, 2)
        dimensions = [Doubling(size) for size in self.sizes]
        self.pack = Pack(dimensions, [(GROUP, 1)], compares=True)
        one = torch.ones(1, 1, dtype=torch.float64)
        self.vectors = [
            self.pack.join([one], CPU, copies=torch.tensor(each, dtype=torch.float64))
            for each in copies
        ]
        for number, pairs in enumerate((((0, 2), (1, 3)), ((0, 1), (2, 3)))):
            for vector in self.vectors:
                self.pack.before(number, vector)
            for first, second in pairs:
                both = self.vectors[first] + self.vectors[second]
                self.vectors[first], self.vectors[second] = both, both.clone()
            for vector in self.vectors:
                self.pack.after(number, vector)

    @property
    def differing(self):
        (told,) = {tuple(self.pack.differing(vector).tolist()) for vector in self.vectors}
        return [number > 0 for number in told]


def test_copies_that_are_alike_are_told_from_copies_that_differ():
    """Ranks 0 to 3 are a square. Every rank hears of a difference between two of them."""
    # What is copied along the first dimension differs along the second, and the other way round.
    assert Grid([3, 5], [4, 5], [3, 6], [4, 6]).differing == [False, False]
    assert Grid([3, 5], [4, 5], [3.1, 6], [4, 6]).differing == [True, False]
    assert Grid([3, 5], [4, 5], [3, 6], [4, 6.5]).differing == [False, True]
    assert Grid([3, 5], [4, 5], [3, 6], [5, 7]).differing == [True, True]


def test_rounding_is_no_difference():
    assert Grid([3, 5], [4, 5], [3.003, 6], [4, 6.006]).differing == [False, False]


@pytest.mark.parametrize("ranks", [2, 8, 64, 512, 4096])
def test_one_replica_that_is_off_by_one_per_cent_is_found_among_any_number(ranks):
    pack = Pack([Doubling(ranks)], [], compares=True)
    rounding = 1e-4 * torch.linspace(-1, 1, ranks, dtype=torch.float64)
    for off, is_found in ((1.011, True), (0.989, True), (1.001, False), (1.0, False)):
        copies = 0.1 * (1 + (rounding if off == 1.0 else 0 * rounding))
        copies[0] *= off
        added = torch.zeros(pack.size, dtype=torch.float64)
        for each in copies:
            vector = pack.join([], CPU, copies=each[None])
            pack.before(0, vector)
            added += vector
        pack.after(0, added)
        assert bool(pack.differing(added)) is is_found, off


def test_a_nan_or_an_infinity_is_no_difference_by_itself():
    for bad in (float("nan"), float("inf")):
        assert Grid([bad, 5], [4, 5], [3, 6], [4, 6]).differing == [False, False]
