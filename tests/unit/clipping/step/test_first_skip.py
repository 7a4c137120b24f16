"""The first step that is skipped is said, once; and what an error calls the one who clips."""

import math
import warnings

import pytest
import torch
from torch import nn

import gradclip
from documented_policies import documented
from gradclip import GradientClipper, ObserveClip, ValueClip, attach
from gradclip.errors import NonFiniteGradientError, TooManySkipsError
from gradclip.record.ring import LAG

NAN, INF = math.nan, math.inf


@pytest.fixture(params=["read", "unread"])
def lag(request):
    """As on the CPU, and as on an accelerator: how many steps late a skip is known."""
    if request.param == "read":
        return 0
    request.getfixturevalue("unread")
    return LAG


def pairs(*names):
    return [(name, nn.Parameter(torch.zeros(3))) for name in names]


def fill(named, bad=None, at=()):
    for name, parameter in named:
        parameter.grad = torch.ones(3)
        if name in at:
            parameter.grad[1] = bad


def warned(named, policy, steps, lacking=""):
    """Clip, and return what was said at which step.

    Args:
        named: The parameters.
        policy: The limit.
        steps: Of each step, what is wrong and where.
        lacking: Parameters that have no gradient.
    """
    clipper = GradientClipper(named, policy)
    said = []
    for number, (bad, at) in enumerate(steps):
        fill(named, bad, at)
        for name, parameter in named:
            if name in lacking:
                parameter.grad = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            clipper.clip()
        said += [(number, str(each.message)) for each in caught]
    return said


FINE = (None, ())


def test_the_first_skip_is_said_once(lag):
    steps = [FINE, FINE, (NAN, "bc"), FINE, (INF, "a"), *[FINE] * LAG]
    ((at, said),) = warned(pairs("a", "b", "c"), 1.0, steps)
    assert at == 2 + lag
    assert said.startswith("GradientClipper skipped step 2: the gradients of b and 1 other hold a ")
    assert "gradclip.withhold(optimizer, result.skipped)" in said
    assert 'nonfinite="raise"' in said


def test_a_parameter_without_a_gradient_moves_no_name(lag):
    ((_, said),) = warned(pairs("a", "b", "c"), 1.0, [(NAN, "c"), *[FINE] * lag], lacking="a")
    assert "the gradient of c holds" in said


def test_where_all_have_it_the_data_comes_first(lag):
    ((_, said),) = warned(pairs("a", "b", "c"), 1.0, [(NAN, "abc"), *[FINE] * lag])
    assert "the gradients of a and all 2 others hold a NaN or an infinity." in said
    assert said.index("the data") < said.index("the learning rate")


def test_only_what_is_clipped_is_at_fault(lag):
    """What is only measured may hold anything; clamping bounds an infinity, and no NaN."""
    policy = {"a": ObserveClip(), "*": ValueClip(clip_value=0.5)}
    steps = [(NAN, "a"), (INF, "b"), *[FINE] * LAG]
    assert warned(pairs("a", "b", "c"), policy, steps) == []
    ((_, said),) = warned(pairs("a", "b", "c"), policy, [(NAN, "ac"), *[FINE] * LAG])
    assert "the gradient of c holds" in said


def test_a_policys_skip_is_said_to_be_one(lag):
    policy = documented()["SpikeSkip"](max_norm=1.0, skip_above=5.0)
    steps = [FINE, (100.0, "b"), *[FINE] * LAG]
    ((_, said),) = warned(pairs("a", "b"), policy, steps)
    assert said.startswith("GradientClipper skipped step 1: the policy asked to, and every ")


def test_an_overflow_that_a_scaler_answers_for_is_not_said(lag):
    named = pairs("a")
    clipper = GradientClipper(named, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2 + lag):
            fill(named, INF, "a")
            clipper.clip(overflow_expected=True)
    assert clipper.stats.skipped == 2 + lag


def test_where_none_is_tolerated_there_is_the_error_alone(lag):
    named = pairs("a")
    clipper = GradientClipper(named, 1.0, max_consecutive_skips=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(lag):
            fill(named, NAN, "a")
            clipper.clip()
        fill(named, NAN, "a")
        with pytest.raises(TooManySkipsError):
            clipper.clip()


@pytest.mark.parametrize("nonfinite", ["propagate", "raise"])
def test_where_nothing_is_skipped_nothing_is_said(nonfinite):
    named = pairs("a")
    clipper = GradientClipper(named, 1.0, nonfinite=nonfinite)
    fill(named, NAN, "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if nonfinite == "raise":
            with pytest.raises(NonFiniteGradientError):
                clipper.clip()
        else:
            clipper.clip()


def test_a_run_of_nothing_but_nan_does_not_end_without_a_word():
    module = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    attach(optimizer, 1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            (module(torch.ones(1, 2)) * NAN).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    (said,) = caught
    assert str(said.message).startswith("gradclip.attach skipped step 0: the gradients of ")
    assert "The optimizer does not make this step." in str(said.message)
    assert said.filename == __file__  # the line of the user's loop


def test_an_error_names_what_was_used():
    """It spoke of GradientClipper to a user of an attachment."""
    module = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    attach(optimizer, 1.0, nonfinite="raise")
    (module(torch.ones(1, 2)) * NAN).sum().backward()
    with pytest.raises(NonFiniteGradientError, match=r'give nonfinite="skip" to gradclip\.attach'):
        optimizer.step()
    with pytest.raises(NonFiniteGradientError, match=r"clip with gradclip\.GradientClipper,"):
        gradclip.clip_grad_norm_(module.parameters(), 1.0, error_if_nonfinite=True)


def test_without_names_it_says_how_to_have_them():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.full((2,), torch.nan)
    with pytest.warns(UserWarning, match=r"of parameters\[0\] .*; made of model\.named_parameters"):
        GradientClipper([weight], 1.0).clip()
