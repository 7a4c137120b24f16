"""Numbers that come to the host some steps late: in order, each once, and never by waiting."""

import copy
import pickle

import pytest

from gradclip.record.ring import BATCH, FIRST, LAG, StepNumbers, StepRing


class Copied:
    def __init__(self, rows, waits):
        self.rows, self.waits = list(rows), waits

    def read(self):
        return [StepNumbers(row, float(row), 1.0, False, False, False) for row in self.rows]


class Told:
    def __init__(self):
        self.steps = []

    def add(self, numbers):
        self.steps.append(numbers.step)


def at_once(rows, waiting):
    return [Copied(rows, waits=False)]


def late(rows, waiting):
    return [Copied(rows, waits=True)]


def in_two(rows, waiting):
    return [Copied(rows[:1], waits=True), Copied(rows[1:], waits=True)]


@pytest.mark.parametrize(("way", "lag"), [(at_once, 0), (late, LAG), (in_two, LAG)])
def test_steps_are_read_together_and_none_is_lost(way, lag):
    told = Told()
    ring = StepRing(way, told)
    known = []
    for step in range(FIRST + 3 * BATCH + 7):
        ring.push(step, 1)
        known.append(len(told.steps))
    reads = [step for step in range(1, len(known)) if known[step] > known[step - 1]]
    assert reads == [FIRST - 1 + n * BATCH + lag for n in range(4)]
    ring.flush()
    assert told.steps == list(range(FIRST + 3 * BATCH + 7))
    ring.flush()
    assert len(told.steps) == FIRST + 3 * BATCH + 7


@pytest.mark.parametrize("way", [at_once, late])
def test_large_rows_are_not_kept_for_long(way):
    """A policy by unit has a norm for each of a million rows."""
    told = Told()
    ring = StepRing(way, told)
    for step in range(10):
        ring.push(step, 2_000_000)
    assert len(told.steps) >= 10 - LAG
    ring.flush()
    assert told.steps == list(range(10))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_has_read_what_was_on_its_way(way):
    told = Told()
    ring = StepRing(late, told)
    for step in range(3):
        ring.push(step, 1)
    other = way(ring)
    assert told.steps == [0, 1, 2]
    assert other.readers[0].steps == [0, 1, 2]
    other.push(3, 1)
    other.flush()
    assert other.readers[0].steps == [0, 1, 2, 3]
    assert told.steps == [0, 1, 2]
