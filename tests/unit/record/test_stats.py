"""Counts and quantiles of steps, and the line at the end of a run."""

import logging
import math
import sys
import threading

import numpy as np
import pytest

from gradclip.record.ring import StepNumbers, StepRing
from gradclip.record.stats import WINDOW, Stats, StepStats, together

NAN, INF = math.nan, math.inf


class Rows:
    waits = False

    def __init__(self, rows):
        self.rows = rows

    def read(self):
        return self.rows


def counted(*norms, start=0, limit=10.0, expected=False):
    stats = StepStats()
    for step, norm in enumerate(norms, start):
        skipped = not math.isfinite(norm)
        stats.add(StepNumbers(step, norm, limit, norm > limit and not skipped, skipped, expected))
    return stats


def test_no_step():
    stats = together([])
    assert (stats.steps, stats.clipped, stats.skipped, stats.nonfinite) == (0, 0, 0, 0)
    assert all(math.isnan(each) for each in (stats.p50, stats.p90, stats.p99, stats.max))
    assert repr(stats) == repr(Stats())


def test_it_is_shown_in_few_digits():
    shown = repr(together([counted(*[1 / 3] * 123_456, NAN)]))
    assert shown.startswith("Stats(steps=123457, clipped=0, skipped=1, nonfinite=1, p50=0.3333, ")
    assert repr(Stats(max=1e300)).endswith("p99=nan, max=1e+300, since=0)")


def test_quantiles_are_numpys_of_what_is_finite():
    norms = np.random.default_rng(3).lognormal(size=501)
    stats = together([counted(*norms, NAN, INF, NAN)])
    assert (stats.steps, stats.skipped, stats.nonfinite) == (504, 3, 3)
    assert stats.clipped == int((norms > 10).sum())
    for share, found in ((0.5, stats.p50), (0.9, stats.p90), (0.99, stats.p99), (1, stats.max)):
        assert found == pytest.approx(np.quantile(norms, share))
    assert stats.since == 0


def test_quantiles_cover_the_last_steps_and_counts_cover_all():
    stats = together([counted(*[100.0] * 5, *[1.0] * WINDOW)])
    assert (stats.steps, stats.clipped) == (WINDOW + 5, 5)
    assert (stats.max, stats.since) == (1.0, 5)


def test_of_several_optimizers_together():
    stats = together([counted(1.0, 3.0), counted(2.0, NAN, start=7), counted()])
    assert (stats.steps, stats.skipped, stats.p50, stats.since) == (4, 1, 2.0, 0)


def test_another_thread_may_ask_while_steps_are_made():
    stats, end = StepStats(), threading.Event()
    ring = StepRing(lambda rows, _: [Rows(rows)], stats)
    seen, errors = [], []

    def ask():
        try:
            while not end.is_set():
                ring.flush()
                seen.append(together([stats]))
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        for step in range(3000):
            ring.push(StepNumbers(step, 1.0, 0.5, True, False, False), 1)
    finally:
        sys.setswitchinterval(before)
        end.set()
        thread.join()
    ring.flush()
    assert errors == []
    assert all(each.steps == each.clipped for each in seen)
    assert together([stats]).steps == 3000


def test_it_begins_anew():
    stats = counted(1.0, NAN)
    stats.clear()
    assert vars(stats) == vars(StepStats())


@pytest.mark.parametrize(
    ("norms", "level", "said"),
    [
        ((1.0, 2.0), None, ""),
        ((1.0, NAN, 2.0), logging.WARNING, "1 of 3 steps were not made, the first was step 1"),
        ((NAN, INF, 2.0), logging.ERROR, "2 of 3 steps were not made, the first was step 0"),
    ],
)
def test_a_run_with_skipped_steps_says_so_at_its_end(caplog, norms, level, said):
    with caplog.at_level(logging.DEBUG, "gradclip"):
        counted(*norms).say_at_end("TheCallback")
    assert [record.levelno for record in caplog.records] == ([] if level is None else [level])
    assert said in caplog.text
    assert level is None or "TheCallback: " in caplog.text


def test_overflows_of_a_loss_scale_alone_are_no_news(caplog):
    with caplog.at_level(logging.DEBUG, "gradclip"):
        counted(INF, INF, 1.0, 1.0, 1.0, expected=True).say_at_end("TheCallback")
    assert not caplog.records
