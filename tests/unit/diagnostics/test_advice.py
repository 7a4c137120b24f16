"""The rule on norms that were made up: each class, refusal and warning once."""

import re

import numpy as np
import pytest
import torch

import gradclip
from gradclip import EMAClip, NormClip, ZScoreClip
from gradclip.diagnostics.norm_statistics import round_up
from gradclip.diagnostics.policy_table import replayed
from gradclip.errors import ArgumentTypeError, ArgumentValueError
from gradclip.report.tables import advice as in_the_report


def scattered(count=600, sigma=0.4, seed=0):
    return np.exp(sigma * np.random.default_rng(seed).standard_normal(count))


FALLING = scattered() * np.geomspace(2, 0.5, 600)
KINDS = {
    "GUARD": (scattered(), "guard", NormClip(max_norm=3.4)),
    "BROAD": (scattered(sigma=1.2), "guard", None),
    "FALLEN_AWAY": (scattered() * np.repeat([1.0, 0.05], 300), "guard", EMAClip),
    "STEADY": (scattered(), "regularise", NormClip(max_norm=1.7)),
    "NARROW": (scattered(sigma=0.05), "regularise", NormClip(max_norm=2.2)),
    "FALLING": (FALLING, "regularise", ZScoreClip),
    "RISING": (FALLING[::-1], "regularise", ZScoreClip),
    "FEW": (scattered(29), "guard", None),
    "EVENTS_ONLY": (scattered(), "guard", None),
    "PLATEAU": (np.minimum(scattered(), 1.2), "guard", None),
    "COLLAPSED": (scattered() * np.repeat([1.0, 0.003], 300), "guard", None),
    "FEW_FOR_REGULARISE": (scattered(99), "regularise", None),
}


@pytest.fixture(autouse=True)
def _without_the_table(monkeypatch):
    """To replay every policy takes long; the tests of the command do."""
    monkeypatch.setattr("gradclip.diagnostics.advice.table", lambda *_, **__: [])


REFUSALS = {"FEW", "EVENTS_ONLY", "PLATEAU", "COLLAPSED", "FEW_FOR_REGULARISE"}


@pytest.mark.smoke
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_run(kind):
    norms, intent, expected = KINDS[kind]
    steps = np.full(len(norms), np.nan) if kind == "EVENTS_ONLY" else None
    advice = gradclip.suggest(norms, intent=intent, steps=steps)

    assert advice.kind == kind
    assert (advice.policy is None) == (kind in REFUSALS)
    assert advice.reason in str(advice)
    if isinstance(expected, NormClip):
        assert advice.policy == expected
    elif expected is not None:
        assert isinstance(advice.policy, expected)
        assert 0 < advice.policy.cap < 10
        assert advice.policy.scope == "group"
    if advice.policy is not None:
        assert advice.clip_fraction == pytest.approx(np.mean(advice.clip_fraction_by_third), 1e-2)
        assert 0 < advice.lr_factor <= 1


def test_a_few_huge_norms_at_the_start_are_no_collapse():
    norms = scattered()
    norms[:3] = [1e3, 1e5, 1e3]
    assert gradclip.suggest(norms, losses=norms).kind == "GUARD"


def test_the_policy_goes_where_policies_go():
    advice = gradclip.suggest(scattered())
    weight = torch.nn.Parameter(torch.zeros(4))
    handle = gradclip.attach(torch.optim.SGD([weight]), advice.policy)
    handle.remove()
    assert advice.line == "gradclip.attach(optimizer, 3.4)"
    assert repr(advice) == "Advice(GUARD: NormClip(max_norm=3.4))"
    assert gradclip.suggest(torch.from_numpy(scattered())).policy == advice.policy


def test_zeros_and_what_is_no_number_are_counted_and_left_out():
    norms = scattered()
    among = np.insert(norms, [0, 5, 9], [0.0, np.nan, np.inf])
    advice = gradclip.suggest(among)
    assert advice.policy == gradclip.suggest(norms).policy
    assert (advice.points, advice.zeros, advice.nonfinite) == (603, 1, 2)


def test_warm_up_is_cut_off_and_offered_a_schedule():
    norms = np.concatenate([20 * scattered(40), scattered()])
    plain, warmed = gradclip.suggest(scattered()), gradclip.suggest(norms)
    assert warmed.policy.max_norm == pytest.approx(plain.policy.max_norm, 0.1)
    (warning,) = (each for each in warmed.warnings if each.code == "WARM_UP")
    assert "Schedule(points=((0" in warning.text
    schedule = eval(warning.text.partition("as they are: ")[2].rstrip("."))
    assert schedule.max_norm.points[1][1] == warmed.policy.max_norm

    # What a fixed limit clips at the beginning is not to be expected later.
    limit = warmed.policy.max_norm
    assert warmed.clip_fraction > 0.06
    assert warmed.clip_fraction_settled == pytest.approx(np.mean(norms[40:] > limit), abs=0.002)

    # A rate that rises says so, too: without it the first norms are like the others.
    rates = np.minimum(np.arange(600) / 100, 1.0)
    usual = scattered()
    assert gradclip.suggest(usual, rates=rates).p50 == np.median(usual[98:])


def after(norms, changed):
    return np.where(np.arange(len(norms)) < 400, norms, changed)


@pytest.mark.parametrize(
    ("norms", "seen"),
    [
        (after(scattered(), np.nan), "NaN or infinite from step 400 to the end (200 of 600)"),
        (after(scattered(), 1e5 * scattered(seed=1)), "rise from step 400 on, from 1."),
    ],
)
def test_a_run_that_was_lost_is_told_first_and_the_advice_is_of_the_part_before(norms, seen):
    advice = gradclip.suggest(norms, losses=after(np.linspace(2, 1, 600), np.nan))
    before = gradclip.suggest(scattered()[:400])
    assert advice.policy == before.policy
    assert advice.clip_fraction == before.clip_fraction
    assert (advice.points, len(advice.warnings)) == (600, 1)

    told = str(advice)
    assert told.startswith("warning LOST: This run was lost: its norms ")
    assert seen in told
    assert "(gradclip.attach(optimizer, 1.0) does both), run again, and ask again. What" in told
    assert "of the part before step 400 alone.\n" in told
    assert "ask again of the run that was clipped" in told
    assert not gradclip.suggest(norms[:400]).warnings
    clipped = str(gradclip.suggest(norms, limit=0.9))
    assert "The limit of 0.9 did not keep this run: lower the learning rate, too." in clipped

    # A run that was lost from the beginning has no part before; one that learned was not lost.
    assert "LOST" in str(gradclip.suggest(np.full(40, np.nan)))
    if seen.startswith("rise"):
        assert "LOST" not in str(gradclip.suggest(norms, losses=np.linspace(2, 1, 600)))


def test_norms_that_fell_since_the_run_has_learned_have_a_next_step():
    norms = scattered() * np.geomspace(1, 1e-3, 600)
    learned = gradclip.suggest(norms, losses=np.geomspace(2, 0.01, 600))
    assert learned.kind == "COLLAPSED"
    assert "The loss fell with it, from 1.98 to 0.0169: the run has learned." in learned.reason
    assert 'gradclip.attach(optimizer, gradclip.EMAClip(ratio=2, scope="group"))' in learned.reason
    limit = float(re.search(r"Of this run that is (\S+):", learned.reason)[1])
    assert f"cap={limit}" in learned.reason
    assert np.median(norms[:60]) < limit < 2 * norms[:60].max()  # it guards the beginning
    stuck = gradclip.suggest(norms, losses=np.full(600, 2.0)).reason
    assert "The loss did not: its median is 2 in the steps 0 to 119 and 2 in" in stuck


def test_a_loss_that_was_higher_anywhere_at_the_beginning_has_fallen():
    losses = np.full(600, 0.03)
    advice = gradclip.suggest(scattered(), losses=losses, rates=np.ones(600))
    (warning,) = advice.warnings
    assert warning.overturns
    page = in_the_report(advice)
    assert page.index("The loss does not fall") < page.index("attach(optimizer")
    assert "its median is 0.03 in the steps 0 to 119 and 0.03 in the steps 480 to" in warning.text
    losses[:30] = 600
    assert gradclip.suggest(scattered(), losses=losses, rates=np.ones(600)).warnings == ()


@pytest.mark.parametrize(
    ("code", "changed"),
    [
        ("SPACING", {"steps": np.arange(600) * 10}),
        ("COARSE", {"norms": np.round(scattered(), 1)}),
        ("ZEROS", {"norms": np.where(np.arange(600) % 10, scattered(), 0)}),
        ("NONFINITE", {"norms": np.where(np.arange(600) % 99, scattered(), np.nan)}),
        ("LOST", {"norms": np.where(np.arange(600) < 580, scattered(), np.nan)}),
        ("SCALE", {"norms": 1e5 * scattered(), "losses": np.linspace(2, 1, 600)}),
        ("LOSS", {"losses": np.full(600, 2.0)}),
        ("DRIFT", {"norms": scattered() * np.geomspace(2, 0.5, 600)}),
        ("LIMIT_SETS_STEP", {"limit": 0.5}),
        ("LIMIT_IDLE", {"limit": 50.0}),
    ],
)
def test_each_warning(code, changed):
    sound = {"norms": scattered(), "losses": np.linspace(2, 1, 600), "rates": np.ones(600)}
    assert gradclip.suggest(**sound).warnings == ()
    assert code in {each.code for each in gradclip.suggest(**{**sound, **changed}).warnings}


def test_a_fixed_limit_is_replayed_as_the_clipper_does_it():
    norms = scattered(300)
    told = replayed(norms, NormClip(max_norm=1.2), 1.0)
    run = gradclip.replay(norms, 1.2)
    assert told.clip_fraction == pytest.approx(run.clip_fraction)
    assert told.lr_factor == pytest.approx(run.lr_factor, 1e-6)


def test_a_limit_is_rounded_up_and_not_finer_than_the_log():
    assert [round_up(x) for x in (0.8, 1.234, 160.0, 5.1e-9)] == [0.8, 1.3, 160.0, 5.1e-9]
    norms = np.round(scattered(sigma=0.2) / 20, 2)  # 0.03 to 0.08
    limit = gradclip.suggest(norms, intent="regularise").policy.max_norm
    assert limit == round(limit, 2)


def test_norms_that_no_float_can_double_are_no_norms():
    assert gradclip.suggest(np.full(50, 1.7e308)).kind == "FEW"
    assert gradclip.suggest(1e140 * scattered()).policy.max_norm > 1e140


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (ArgumentTypeError, "norms is a str", {"norms": "norms"}),
        (ArgumentValueError, r"norms has the shape \(2, 1\)", {"norms": [[1], [2]]}),
        (ArgumentValueError, "below 0 at 1", {"norms": [1, -1]}),
        (ArgumentValueError, "losses has 1 numbers, and norms has 2", {"losses": [1]}),
        (ArgumentValueError, "steps goes back", {"steps": [2, 1]}),
        (ArgumentValueError, "intent is 'gaurd'", {"intent": "gaurd"}),
        (ArgumentValueError, "limit is ", {"limit": -1}),
    ],
)
def test_what_cannot_be_meant_is_an_error(error, message, given):
    with pytest.raises(error, match=message):
        gradclip.suggest(**{"norms": [1, 2], **given})
