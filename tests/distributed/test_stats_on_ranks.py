"""Steps that several ranks clip together: counted alike, and the first skip is said."""

import math
import warnings

import layouts
import pytest

from gradclip import GradientClipper
from gradclip.clipping import flags
from gradclip.clipping.kernels import device, foreach
from gradclip.record.ring import LAG
from processes import together


class OnCpu:
    """Numbers that are on the host, and wait all the same."""

    def __init__(self, values):
        self._values = values.clone()

    def read(self):
        return self._values.reshape(-1).tolist()


def told(rank, late):
    """Clip some steps, of which one has a NaN in the part of the last rank."""
    if late:
        foreach._on_cpu = lambda batch: False
        flags.host_waits_for = lambda device: True
        device.HostCopy = OnCpu
    held = layouts.tp(rank)
    clipper = GradientClipper(held.source, 1.0)
    said = []
    for step in range(3 + LAG):
        values = {n: layouts.full(n, s, 3) for n, s in held.shapes.items()}
        if step == 1:
            values["block.weight"][-1, -1] = math.nan
        held.fill(values)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            clipper.clip()
        said += [(step, str(each.message)) for each in caught]
    return said, clipper.stats


@pytest.mark.parametrize("late", [False, True])
def test_the_first_rank_speaks_and_the_one_at_fault(late):
    (first, mine), (last, theirs) = together(told, 2, late)
    assert mine == theirs
    assert (mine.steps, mine.skipped, mine.nonfinite) == (3 + LAG, 1, 1)
    ((at, said),) = first
    assert at == 1 + LAG * late
    assert "skipped step 1: another rank found a NaN or an infinity, or failed" in said
    ((at, said),) = last
    assert at == 1 + LAG * late
    assert "skipped step 1: the gradient of block.weight holds a NaN or an infinity" in said
