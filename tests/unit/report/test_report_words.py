"""The sentences of the report are true of the data, whatever these are."""

import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest

from gradclip.diagnostics.blame import blame, outstanding
from gradclip.diagnostics.known import known
from gradclip.diagnostics.record import GroupRecord, StepRecord
from gradclip.diagnostics.runs import Run, read_runs
from gradclip.diagnostics.summary import summarise
from gradclip.record.columns import Steps
from gradclip.record.reader import Norms
from gradclip.report.details import details
from gradclip.report.faults import faults_of
from gradclip.report.finding import Case, findings
from gradclip.report.tables import tiles

NAN = math.nan
NAMES = ["embed.weight", "h.0.a.weight", "h.0.b.weight", "h.1.a.weight"]


def said(records, parameters=None, **changes):
    """Return the finding, and what is said below it."""
    run = Run("run", records if isinstance(records, Steps) else Steps.of(records))
    return said_of(run, parameters, **changes)


def said_of(run, parameters=None, **changes):
    of = replace(known(run), **changes)
    if parameters is not None:
        steps, norms = parameters
        of = replace(of, parameters=Norms(np.array(steps), NAMES, np.array(norms, float)))
    steps = outstanding(of)
    case = Case(of, steps, blame(of, steps), summarise(run.steps).diverged_at)
    first, *then = findings(case)
    return first, " ".join(filter(None, [*then, details(case, faults_of(of))]))


def usual(count, *, limit=None, clipped=(), skipped=(), **more):
    """Return steps with norms around 1, and 5 where they are clipped."""
    of = random.Random(0)
    return [
        StepRecord(
            step=at,
            norm_pre=NAN if at in skipped else 5.0 if at in clipped else of.uniform(0.8, 1.2),
            threshold=limit,
            clipped=at in clipped,
            skipped=at in skipped,
            nonfinite=int(at in skipped),
            reason="nonfinite" if at in skipped else None,
            **more,
        )
        for at in range(count)
    ]


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        (usual(60, limit=10.0), "The limit of 10 never acted: the largest norm is 1.19."),
        (usual(60, limit=2.0, clipped=(3, 7)), "The limit of 2 clipped 2 of 60 steps."),
        (usual(60, limit=2.0, clipped=range(60)), "The limit of 2 sets the step size: it clipped "),
        (usual(60, limit=2.0, skipped=range(60)), "All 60 steps were skipped."),
        (usual(60, limit=2.0, skipped=range(40)), "40 of 60 steps were not made."),
        (usual(60, clipped=(3,)), "1 of 60 steps was clipped."),
        (usual(60), "No spikes: the median norm is "),
        (usual(12), "12 steps with norms from "),
        (usual(1), "One step, with a norm of 1.14."),
        ([StepRecord(step=0, norm_pre=0.0)] * 3, "Every gradient norm is 0, in 3 steps."),
        ([StepRecord(step=0)] * 3, "No gradient norm is known, of 3 steps."),
        (usual(60, loss=NAN), "The loss is not finite from step 0 on."),
        (
            [StepRecord(step=at, norm_pre=50.0 if at == 33 else 1 + at % 2) for at in range(40)],
            "1 spike of 50 in 40 steps.",
        ),
        (
            [StepRecord(step=at, norm_pre=50.0 if at < 3 else 1 + at % 2) for at in range(40)],
            "The norms start as high as 50 and settle at ",
        ),
        (
            [
                StepRecord(
                    step=at,
                    norm_pre=1.0,
                    clipped=at < 9,
                    threshold=2.0,
                    groups={name: GroupRecord(norm_pre=1.0, threshold=2.0) for name in "ab"},
                )
                for at in range(40)
            ],
            "The limits by group clipped 9 of 40 steps.",
        ),
    ],
)
def test_the_finding_without_norms_of_parameters(records, expected):
    assert said(records)[0].startswith(expected)


def test_a_layer_is_blamed_where_it_has_more_of_the_clipped_steps_than_of_the_others():
    records = usual(60, limit=2.0, clipped=(3, 7, 50))
    norms = [[1, 1, 1, 1]] * 60
    exploding = [[1, 1, 1, 3] if at in (3, 7, 50) else row for at, row in enumerate(norms)]
    assert said(records, (range(60), exploding))[0] == (
        "Layer 1 makes the spikes: 75 % of the squared norm in the 3 clipped steps."
    )
    assert said(records, (range(60), norms))[0] == (
        "Layer 0 has most of the norm: 50 % of its square in the 3 clipped steps, 50 % in the "
        "others."
    )
    larger = [[1, 3, 1, 2.8] if at in (3, 7, 50) else [1, 5, 1, 1] for at in range(60)]
    assert said(records, (range(60), larger))[0].startswith("Layer 0 has most of the norm: 53 %")
    level = [[4, 2, 3, 4]] * 60
    assert said(records, (range(60), level))[0] == (
        "No layer stands out in the 3 clipped steps: the most is 36 %, of embed."
    )
    some = [row for at, row in enumerate(exploding) if at != 7]
    assert (
        "75 % of the squared norm in 2 of the 3 clipped steps."
        in said(records, ([at for at in range(60) if at != 7], some))[0]
    )
    often = usual(60, limit=2.0, clipped=range(0, 60, 3))
    rows = [[1, 1, 1, 3] if at % 3 == 0 else [1, 1, 1, 1] for at in range(60)]
    assert said(often, (range(60), rows))[0].startswith("Layer 1 drives the clipping: ")
    always = usual(60, limit=2.0, clipped=range(60))
    first, then = said(always, (range(60), exploding))
    assert first == "The limit of 2 sets the step size: it clipped every step."
    assert "on average" in then


@pytest.mark.parametrize("clipped", [range(200), ()])
def test_spikes_are_told_from_the_norms_around_them_whatever_the_limit(clipped):
    """Late spikes of falling norms are below early norms, and below a limit that clips those."""
    spikes = (310, 390)
    records = [
        replace(each, norm_pre=2.0 if each.step in spikes else 10 * math.exp(-each.step / 60))
        for each in usual(400, limit=1.0 if clipped else None, clipped=clipped)
    ]
    norms = [[1, 1, 1, 7] if at in spikes else [1, 1, 1, 1] for at in range(400)]
    first = said(records, (range(400), norms))[0]
    assert first == "Layer 1 makes the spikes: 94 % of the squared norm in the 2 spikes."


def test_a_lost_run_names_the_layer_of_its_spikes_and_says_what_became_of_the_loss():
    records = [
        replace(each, loss=NAN if each.step >= 40 else 1.0, nonfinite=int(each.step >= 50))
        for each in usual(60)
    ]
    for at in (9, 20, 33):
        records[at] = replace(records[at], norm_pre=50.0)
    norms = [[1, 1, 1, 7] if at in (9, 20, 33) else [1, 1, 1, 1] for at in range(60)]
    first, then = said(records, (range(60), norms))
    assert re.fullmatch("Layer 1 makes the spikes: 94 % .* in the 3 spikes\\.", first)
    assert then.startswith("The loss is not finite from step 40 on. A spike is a norm above three")
    assert "three times what one in ten of the norms around it exceeds." in then
    without = said(records, (range(60), [[1, 1, 1, 1]] * 60))
    assert without[0] == "The loss is not finite from step 40 on."
    assert "The loss" not in without[1]
    skipped = [replace(each, skipped=each.step >= 25) for each in records]
    first, then = said(skipped, (range(60), norms))
    assert first.startswith("Layer 1 makes the spikes: ")
    assert "35 steps were skipped" in then


def test_norms_other_than_euclidean_have_no_shares_of_a_square():
    records = usual(60, limit=2.0, clipped=(3,))
    norms = range(60), [[1, 1, 1, 3]] * 60
    assert said(records, norms, is_euclidean=False)[0] == "The limit of 2 clipped 1 of 60 steps."


def test_skipped_steps_are_told_with_their_reason_and_layers():
    records = usual(60, limit=2.0, skipped=(5, 9))
    norms = [[1, 1, NAN, NAN] if at in (5, 9) else [1, 1, 1, 1] for at in range(60)]
    assert (
        "2 steps were skipped because a gradient was not finite, each time in layers 0 and 1."
        in (said(records, (range(60), norms))[1])
    )
    every = [[NAN] * 4 if at in (5, 9) else [1, 1, 1, 1] for at in range(60)]
    assert "not finite, in every layer." in said(records, (range(60), every))[1]
    made = [replace(each, skipped=False, reason=None) for each in records]
    assert (
        "In 2 steps a gradient was not finite, and the steps were made all the same."
        in (said(made)[1])
    )


def test_several_reasons_are_counted():
    records = [
        replace(each, reason="overflow") if each.step == 5 else each
        for each in usual(60, limit=2.0, skipped=(5, 9, 11))
    ]
    assert said(records)[1] == (
        "3 steps were skipped, 2 because a gradient was not finite and 1 because the loss scale "
        "was too large."
    )


def test_what_a_log_cannot_tell_is_said(tmp_path):
    path = tmp_path / "log.csv"
    rows = [
        f"{at},{0 if at == 20 else 'nan' if at == 40 else 1 + at % 3}" for at in range(0, 900, 10)
    ]
    path.write_text("\n".join(["step,grad_norm", *rows, ""]))
    (run,) = read_runs(path)
    first, then = said_of(run)
    assert first == "No spikes: the median norm is 2, the largest 3."
    assert then == (
        "1 norm of the log is not finite. There is one norm of every 10 steps, so spikes may be "
        "missing. 1 norm is exactly 0, and left out of these numbers. The log names no limit, so "
        "nothing is known of clipping."
    )
    assert "<small>not known</small>" in tiles(known(run))
    record = Run("run", Steps.of(usual(3)))  # it would have them
    assert "<small>none was seen</small>" in tiles(known(record))
