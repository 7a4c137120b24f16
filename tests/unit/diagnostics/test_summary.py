import math
from dataclasses import replace

import pytest

from gradclip.diagnostics import GroupRecord, StepRecord, finding, summarise
from gradclip.diagnostics.summary import compact, decimal
from gradclip.errors import ArgumentValueError


def run(losses, norms, threshold=1.0):
    return [
        StepRecord(
            step=step,
            loss=loss,
            norm_pre=norm,
            threshold=threshold,
            clipped=norm > threshold,
            nonfinite=0 if math.isfinite(norm) else 2,
        )
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True))
    ]


def test_a_summary_counts_and_has_the_median_of_the_end():
    losses = [9.0] * 50 + [1.0] * 24 + [1e308] + [2.0] * 25
    summary = summarise(run(losses, [float(norm) for norm in range(100)], threshold=79.0))

    assert (summary.steps, summary.clipped, summary.nonfinite) == (100, 20, 0)
    assert summary.final_loss == 2.0
    assert (summary.norm_p99, summary.norm_max) == (98.0, 99.0)
    assert summary.threshold == 79.0
    assert summary.diverged_at is None


def test_a_diverged_run_ends_where_its_loss_stopped_being_a_number():
    summary = summarise(run([3.0, math.inf, 2.0, math.nan, math.nan], [1.0, 2.0, 3.0, 4.0, 5.0]))

    assert summary.diverged_at == 3
    assert math.isnan(summary.final_loss)
    assert summary.ending == "NaN from step 3"


def test_one_overflow_on_the_way_is_not_the_end():
    summary = summarise(run([3.0, math.inf, 2.0], [1.0, 1.0, 1.0]))

    assert summary.diverged_at is None
    assert summary.final_loss == 2.5


def test_a_norm_that_is_no_number_counts_as_the_largest():
    summary = summarise(run([1.0] * 3, [0.5, math.nan, 0.25]))

    assert (summary.nonfinite, summary.norm_max) == (1, math.inf)


@pytest.mark.smoke
def test_the_finding_is_one_line():
    clipped = run([1.5] * 50, [2.0] * 10 + [0.5] * 40)
    unclipped = run([2.25] * 50, [0.5] * 50, threshold=math.inf)
    diverged = run([2.25, *[math.inf] * 49], [0.5] * 50, threshold=math.inf)

    assert finding(clipped) == "clipped 10 of 50 steps (20 %) at max_norm 1.0: loss 1.50"
    assert finding(clipped, unclipped).endswith(": loss 1.50; without: 2.25")
    assert finding(clipped, diverged).endswith(": loss 1.50; without: inf from step 1")
    assert finding(unclipped) == "clipped 0 of 50 steps (0 %): loss 2.25"


@pytest.mark.parametrize(
    ("clipped", "steps", "loss", "words"),
    [
        (5, 560, 0.5, "clipped 5 of 560 steps (1 %) at max_norm 1.0: loss 0.500"),
        (1, 560, 123.0, "clipped 1 of 560 steps (0.2 %) at max_norm 1.0: loss 123"),
        (2, 3, 1234.0, "clipped 2 of 3 steps (67 %) at max_norm 1.0: loss 1.23e3"),
        (0, 3, None, "clipped 0 of 3 steps (0 %) at max_norm 1.0"),
    ],
)
def test_a_few_steps_are_no_share_of_0_and_a_loss_has_three_digits(clipped, steps, loss, words):
    norms = [2.0] * clipped + [0.5] * (steps - clipped)
    assert finding(run([loss] * steps, norms)) == words


def test_a_log_that_names_no_limit_tells_nothing_of_clipping():
    steps = [replace(step, threshold=None) for step in run([1.0] * 3, [0.5, 0.25, 0.75])]
    assert summarise(steps).clipped is None
    assert finding(steps, counted="logged steps") == "3 logged steps, p99 norm 0.75: loss 1.00"


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"head.*": 0.5}, " at max_norm 0.5 (head.*):"),
        ({"head.*": 0.5, "*": 1.0}, " at max_norm 0.5 (head.*), 1.0 (*):"),
        ({"head.*": math.inf, "*": 1.0}, " at max_norm 1.0 (*):"),
        ({"head.*": math.inf, "*": None}, " steps (100 %):"),
        (dict.fromkeys("abcd", 1.0), " at 4 limits:"),
    ],
)
def test_every_limit_of_several_is_named(limits, words):
    """``threshold`` is that of the group which was scaled down most, and another at each step."""
    groups = {name: GroupRecord(threshold=limit) for name, limit in limits.items()}
    records = [replace(record, groups=groups) for record in run([1.5] * 5, [2.0] * 5, 0.25)]

    assert words in finding(records)
    assert summarise(records).thresholds == {
        name: math.inf if limit is None else limit for name, limit in limits.items()
    }
    assert summarise(records).threshold == 0.25


def test_the_mean_of_the_largest_losses_does_not_overflow():
    for loss in (1.7e308, -1.7e308):
        summary = summarise(run([loss] * 60, [1.0] * 60))
        assert summary.final_loss == loss
        assert summary.ending == f"{loss:.2e}".replace("+", "")


def test_a_run_without_losses_has_no_final_loss():
    summary = summarise([StepRecord(step=0, norm_pre=1.0)])

    assert summary.final_loss is None
    assert summary.ending == "not recorded"


def test_no_step_is_no_run():
    with pytest.raises(ArgumentValueError, match="record is empty"):
        summarise([])


def test_numbers_are_short():
    assert [compact(value) for value in (0.57, 12.1, 5800.0, 1e4, 2e-7, 1e12, math.inf)] == [
        "0.57",
        "12.1",
        "5.8e3",
        "1e4",
        "2e-7",
        "1e12",
        "inf",
    ]
    assert [decimal(value) for value in (1.0, 0.10000000149, 25.0)] == ["1.0", "0.1", "25.0"]
