"""Mistakes of a loop that its norms give away, each said once; and no false alarm."""

import gc
import math
import re
import warnings

import pytest
import torch
from torch import nn

import gradclip
from gradclip import GradientClipper, NormClip, ObserveClip, ValueClip, attach, presets
from gradclip.clipping.step.loop import LoopWatch
from gradclip.record.ring import BATCH, FIRST, StepNumbers

LEFT = "Remove that call from the loop: torch.nn.utils.clip_grad_norm_"
SCALED = r"a GradScaler with the scale 65536 has unscaled nothing"


@pytest.fixture(autouse=True)
def no_other_scaler():
    """Scalers are looked for among all objects: those of other tests may wait for the collector."""
    gc.collect()


def said(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(each.message) for each in caught]


def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def backward(model, step, factor=30.0):
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    loss = (factor * model(inputs)).square().mean()
    loss.backward()


# torch's own call is left in the loop.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", ["attach", "clipper"])
def test_a_call_that_clips_first_is_named(way, dtype):
    model = module().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    clip = attach(optimizer, 1.0) if way == "attach" else GradientClipper(model, 1.0)

    def run():
        for step in range(FIRST + BATCH):
            inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).to(dtype)
            (30 * model(inputs)).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if way == "clipper":
                clip.clip()
            optimizer.step()
            optimizer.zero_grad()

    (warning,) = said(run)
    assert LEFT in warning
    assert warning.startswith("gradclip.attach" if way == "attach" else "GradientClipper")


def test_a_call_that_rarely_clips_is_named_later():
    watch = LoopWatch("it", owned=True)
    norms = [0.5, 0.7, 0.9, 0.6] * 30
    for step in (10, 20, 50, 60, 70):
        norms[step] = 0.9999995
    found = []
    for step, norm in enumerate(norms):
        watch.add(StepNumbers(step, norm, 1.0, False, False, False))
        found.append(bool(said(lambda: watch.speak(unscaled=False))))
    assert [step for step, each in enumerate(found) if each] == [70]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limit", [0.3, 1.0, 2.0, 8.0, 40.0])
def test_norms_that_something_else_bounds_are_no_sign(limit, seed):
    """Heavy tails around the limit, a slow drift through it, and many norms just below."""
    draw = torch.distributions.LogNormal(0.0, 0.7)
    torch.manual_seed(seed)
    drift = torch.linspace(2.0, 0.5, 3000) * limit
    noise = torch.randn(3000) * 0.02 + 0.95
    for norms in (draw.sample((3000,)), drift, noise * limit):
        watch = LoopWatch("it", owned=False)
        for step, norm in enumerate(norms.tolist()):
            watch.add(StepNumbers(step, norm, limit, norm > limit, False, False))
            watch.speak(unscaled=False)  # a warning is an error here


@pytest.mark.parametrize(
    "policy",
    [
        ObserveClip(),
        ValueClip(clip_value=0.1),
        {"0.*": 1.0, "*": 1.0},
        NormClip(max_norm=math.inf),
    ],
)
def test_what_has_not_one_limit_says_nothing(policy):
    model = module()
    clipper = GradientClipper(model, policy)

    def run():
        for step in range(FIRST + BATCH):
            backward(model, step)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            clipper.clip()
            model.zero_grad()

    assert said(run) == []


# A limit is stuck below the norms.


@pytest.mark.parametrize(("policy", "steps"), [(1.0, 100), (presets.zclip_paper(), 230)])
def test_a_limit_that_clips_nearly_every_step_is_named_once(policy, steps):
    """The paper's ZClip does not follow a level that rises for good."""
    weight = torch.nn.Parameter(torch.zeros(1))
    clipper = GradientClipper([weight], policy)

    def run():
        for step in range(steps + BATCH):
            usual = 10.0 + step % 5
            weight.grad = torch.tensor([usual if step < 60 else 10 * usual])
            clipper.clip()
            clipper.stats  # noqa: B018 - reads every step
        clipper.clip()

    (message,) = said(run)
    assert re.search(r"GradientClipper clipped \d+ of 100 steps in a row", message)


def test_a_limit_of_exceptions_is_not_named():
    watch = LoopWatch("it", owned=True)
    for step in range(400):
        watch.add(StepNumbers(step, 2.0, 1.0, step % 20 != 0, False, False))
    assert said(lambda: watch.speak(unscaled=False)) == []


# What only measures lets a NaN through.


@pytest.mark.parametrize(
    ("policy", "gradient", "warns"),
    [
        (ObserveClip(), math.nan, True),
        (NormClip(max_norm=math.inf), math.inf, True),
        ({"0": 1.0, "*": ObserveClip()}, math.nan, True),
        (ValueClip(clip_value=1.0), math.inf, False),
        (gradclip.GuardClip(), math.nan, False),
    ],
)
def test_a_nan_that_reached_the_weights_is_told_once(policy, gradient, warns):
    weights = [(str(n), nn.Parameter(torch.zeros(1))) for n in range(2)]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    handle = attach(optimizer, policy)

    def run():
        for step in range(BATCH + 8):
            for name, weight in weights:
                wrong = name == "1" and step in {3, 4}
                weight.grad = torch.tensor([gradient if wrong else 1.0])
            optimizer.step()
            handle.stats  # noqa: B018 - reads every step

    found = [each for each in said(run) if "the weights are probably NaN" in each]
    assert len(found) == warns
    assert all("at step 3" in each for each in found)


# A loop forgets scaler.unscale_.


def scaled_loop(scaler, unscale, *, factor=30.0, grad_scale=False):
    model = module()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    clipper = GradientClipper(model, 1.0)

    def run():
        for step in range(FIRST + 4):
            inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            scaler.scale((factor * model(inputs)).square().mean()).backward()
            if unscale:
                scaler.unscale_(optimizer)
            if step % 3 == 0:
                assert clipper.stats.steps == step
            clipper.clip(scaler.get_scale() if grad_scale else None)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    return run


def test_a_forgotten_unscale_is_said_once():
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    (warning,) = said(scaled_loop(scaler, unscale=False))
    assert "GradientClipper: each of the first 20 norms was more than 100 times the lim" in warning
    assert "a GradScaler with the scale 65536 has unscaled nothing" in warning
    assert "scaler.unscale_(optimizer)" in warning


@pytest.mark.parametrize(
    "loop",
    [
        {"unscale": True, "factor": 1e4},  # unscaled, and far beyond the limit all the same
        {"unscale": False, "grad_scale": True},
        {"unscale": False, "grad_scale": True, "factor": 1e4},
    ],
)
def test_a_loop_that_tells_the_scale_is_left_in_peace(loop):
    assert said(scaled_loop(torch.amp.GradScaler("cpu", init_scale=65536.0), **loop)) == []


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu", enabled=False)])
def test_large_norms_without_a_scaler_are_no_sign(scaler):
    """A log of a real training has norms from 4e4 to 4e6 at every step."""
    model = module()
    clipper = GradientClipper(model, 1.0)

    def run():
        for step in range(FIRST + 4):
            backward(model, step, factor=1e4)
            clipper.clip()
            model.zero_grad()

    assert said(run) == []
    assert clipper.stats.p50 > 1e4


# A limit of 0.


@pytest.mark.parametrize(
    "policy", [0, 0.0, NormClip(max_norm=0), ValueClip(clip_value=0), {"0.*": 0.0, "*": 1.0}]
)
def test_a_limit_of_zero_is_said_at_once(policy):
    """Megatron, transformers and Ultralytics mean not to clip by it."""
    (warning,) = said(lambda: GradientClipper(module(), policy))
    assert "GradientClipper: a limit of 0 sets every gradient to zero" in warning
    assert "max_norm=inf" in warning
    assert "None for a name pattern" in warning


@pytest.mark.parametrize("policy", [1.0, math.inf, ObserveClip(), {"0.*": None, "*": 1.0}])
def test_another_limit_is_not(policy):
    assert said(lambda: GradientClipper(module(), policy)) == []


def test_it_is_said_by_the_name_of_what_was_used():
    optimizer = torch.optim.SGD(module().parameters(), lr=0.1)
    (warning,) = said(lambda: gradclip.attach(optimizer, max_norm=0))
    assert warning.startswith("gradclip.attach: a limit of 0")
