"""How often is measured: always at first, and then as often as takes a hundredth of the time."""

import pytest

from gradclip.observe.governor import Governor


def settled(governor, own, cost, *, pauses=0.0):
    """Make steps that take so many seconds, where measuring takes so many; the first takes 2 s."""
    governor.add(1.0, 2.0, measured=True)
    return after(governor, own, cost, pauses=pauses)


def after(governor, own, cost, *, pauses=0.0, steps=600):
    now = 1.0
    for step in range(steps):
        measured = governor.is_due(step)
        spent = cost if measured else 0.0
        now += own + spent + (pauses if step % 50 == 0 else 0.0)
        governor.add(now, spent, measured=measured)
    return governor.every


@pytest.mark.parametrize(
    ("own", "cost", "every"), [(0.1, 1e-4, 1), (0.01, 9e-4, 10), (0.01, 1e-2, 64), (1e-4, 8e-5, 4)]
)
def test_measuring_takes_about_a_hundredth(own, cost, every):
    assert settled(Governor(None), own, cost) == pytest.approx(every, abs=1)


def test_no_step_is_left_out_before_watching_has_taken_two_seconds():
    governor = Governor(None)
    assert after(governor, 1e-4, 1e-2, steps=190) == 1
    assert after(governor, 1e-4, 1e-2, steps=64) == 64


def test_evaluations_are_no_time_of_steps():
    assert settled(Governor(None), 0.01, 9e-4, pauses=30.0) == pytest.approx(10, abs=1)


def test_a_number_that_is_given_stays():
    governor = Governor(7)
    assert settled(governor, 0.01, 1.0) == 7
    assert [step for step in range(20) if governor.is_due(step)] == [0, 7, 14]
