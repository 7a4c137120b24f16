from math import inf, nan
from typing import Literal

import pytest
import torch
from pydantic import ValidationError

from gradclip import (
    AGCClip,
    EMAClip,
    GuardClip,
    NormClip,
    ObserveClip,
    QuantileClip,
    Schedule,
    ValueClip,
    ZScoreClip,
)
from gradclip.config import dump, load
from gradclip.errors import ConfigError
from gradclip.pipeline.hooks import (
    GradientClippingHook,
    GradientClippingHookConfig,
    PipelineHookArgs,
    PipelineHooksConfig,
)


def norm(**fields):
    return GradientClippingHookConfig(clip_mode="norm", **fields)


def test_it_is_built_and_called_as_in_the_original():
    config = GradientClippingHookConfig(clip_mode="norm", max_norm=0.5, norm_type=1.0)
    assert isinstance(config, PipelineHooksConfig)
    assert config.class_type is GradientClippingHook
    hook = config()
    assert isinstance(hook, GradientClippingHook)
    assert (hook.clip_mode, hook.clip_value, hook.max_norm, hook.norm_type) == (
        "norm",
        None,
        0.5,
        1.0,
    )


def test_a_clip_value_beside_clip_mode_norm_is_ignored_as_in_the_original():
    config = norm(max_norm=1.0, clip_value=3.0)
    assert config().clip_value == 3.0
    assert config.as_policy() == NormClip(max_norm=1.0)


def test_overrides_by_keyword_are_checked():
    assert norm(max_norm=1.0)(max_norm=2.0).max_norm == 2.0
    with pytest.raises(ValidationError):
        norm(max_norm=1.0)(max_norm=-2.0)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (2, 2.0),
        ("inf", inf),
        (ObserveClip(norm_type=inf), ObserveClip(norm_type=inf)),
        ({"clip_mode": "value", "clip_value": 0.1}, ValueClip(clip_value=0.1)),
        (
            {"*.bias": None, "*": 1.0, "h*": NormClip(max_norm=2.0)},
            {"*.bias": None, "*": 1.0, "h*": NormClip(max_norm=2.0)},
        ),
        ({"a": "none", "*": 1.0}, {"a": None, "*": 1.0}),
        ({"scope": 2.0, "*": 1.0}, {"scope": 2.0, "*": 1.0}),  # a parameter called like a field
        ({"clip_mode": "zscore", "z": 2.5}, ZScoreClip(z=2.5)),
        (
            {"q": {"clip_mode": "quantile", "q": 0.5}, "*": {"clip_mode": "ema"}},
            {"q": QuantileClip(q=0.5), "*": EMAClip()},
        ),
    ],
)
def test_a_policy_takes_the_place_of_the_mode(policy, expected):
    config = GradientClippingHookConfig(policy=policy)
    assert config.as_policy() == expected
    assert config().clip_mode is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "nothing says how to clip"),
        ({"norm_type": 1.0}, "nothing says how to clip"),
        ({"clip_mode": "norm"}, "max_norm must be specified"),
        ({"clip_mode": "norm", "clip_value": 1.0}, "max_norm must be specified"),
        ({"clip_mode": "value"}, "clip_value must be specified"),
        ({"clip_mode": "value", "max_norm": 1.0}, "clip_value must be specified"),
        ({"policy": 1.0, "clip_mode": "norm"}, "so does clip_mode"),
        ({"policy": 1.0, "max_norm": 1.0}, "so does max_norm"),
        ({"policy": 1.0, "norm_type": 1.0}, "so does norm_type"),
        ({"clip_mode": "norm", "max_nrom": 1.0}, "did you mean `max_norm`"),
        ({"clip_mode": "norms", "max_norm": 1.0}, "norm"),
        ({"clip_mode": "norm", "max_norm": nan}, ">= 0"),
        ({"clip_mode": "norm", "max_norm": -1.0}, ">= 0"),
        ({"clip_mode": "norm", "max_norm": True}, "max_norm"),
        ({"clip_mode": "norm", "max_norm": "1.0"}, "max_norm"),
        ({"clip_mode": "norm", "max_norm": 1.0, "norm_type": 0}, "> 0"),
        ({"clip_mode": "norm", "max_norm": 1.0, "norm_type": nan}, "> 0"),
        ({"clip_mode": "norm", "max_norm": 1.0, "nonfinite": "zero"}, "nonfinite"),
        ({"clip_mode": "norm", "max_norm": 1.0, "max_consecutive_skips": -1}, "max_cons"),
        ({"clip_mode": "norm", "max_norm": 1.0, "max_consecutive_skips": 2.5}, "max_cons"),
        ({"policy": {"*": -1.0}}, ">= 0"),
        ({"policy": []}, "empty list"),
        ({"policy": {"*": "none"}}, "bounds nothing"),
        (
            {"policy": EMAClip(on_spike="skip"), "max_consecutive_skips": 2},
            "below the max_spikes=3",
        ),
        ({"policy": {"clip_mode": "adam"}}, "policy"),
        ({"policy": {"clip_mode": "agc", "eps": 0.0}}, "greater than 0"),
        ({"policy": {"clip_mode": "agc", "units": {"w": "row"}}}, "'tensor'"),
        ({"policy": {"clip_mode": "norm", "max_norm": 1.0, "scope": "unit"}}, "'tensor'"),
        ({"policy": {"clip_mode": "norm", "max_norm": {"points": []}}}, "points is empty"),
        ({"policy": {"clip_mode": "norm", "max_norm": {"points": [[0, -1.0]]}}}, ">= 0"),
        (
            {"policy": {"clip_mode": "norm", "max_norm": {"points": [[5, 1.0], [5, 2.0]]}}},
            "the step 5 behind the step 5",
        ),
        (
            {
                "policy": {
                    "clip_mode": "norm",
                    "max_norm": {"points": [[0, "inf"], [5, 2.0]], "shape": "linear"},
                }
            },
            'use shape="constant"',
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_in_our_words(fields, said):
    with pytest.raises(ValidationError) as caught:
        GradientClippingHookConfig(**fields)
    assert said in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("format_", ["yaml", "toml", "json"])
@pytest.mark.parametrize(
    "config",
    [
        norm(max_norm=1.0),
        norm(max_norm=inf, norm_type=inf, clip_value=0.5, nonfinite="raise"),
        GradientClippingHookConfig(clip_mode="value", clip_value=0.25),
        GradientClippingHookConfig(policy=1.0, max_consecutive_skips=0),
        GradientClippingHookConfig(policy=inf),
        GradientClippingHookConfig(policy=ObserveClip()),
        GradientClippingHookConfig(policy=ZScoreClip(cap=inf, on_spike="skip")),
        GradientClippingHookConfig(policy={"z": EMAClip(warmup_max_norm=1.0), "*": ZScoreClip()}),
        GradientClippingHookConfig(policy={"*.bias": None, "*": ValueClip(clip_value=inf)}),
        GradientClippingHookConfig(policy=[0.5, None, ValueClip(clip_value=inf)]),
        GradientClippingHookConfig(policy=NormClip(max_norm=inf, scope="tensor", skip_above=9.0)),
        GradientClippingHookConfig(
            policy={
                "h.*": NormClip(max_norm=Schedule(points=((0, inf), (10, 1.0)))),
                "e.*": AGCClip(clip_factor=0.1, units={"e.w": 2, "*": "tensor"}),
                "*": GuardClip(),
            }
        ),
    ],
    ids=str,
)
def test_it_goes_through_a_file_and_back(tmp_path, config, format_):
    """The original's to_str() raises for every format."""
    path = tmp_path / f"clip.{format_}"
    dump(config, path)
    assert load(path) == config
    assert type(config).from_str(config.to_str(format_), format_) == config


def test_a_file_cannot_name_another_module():
    """The original imports whatever a file names."""
    with pytest.raises(ConfigError, match="os:system"):
        GradientClippingHookConfig.from_str('{"class_type": "os:system", "policy": 1.0}')


class DoubleNorm(NormClip):
    """A policy from outside the package, with a mode of its own."""

    clip_mode: Literal["double-norm"] = "double-norm"


@pytest.mark.parametrize("suffix", ["yaml", "toml", "json"])
@pytest.mark.parametrize("by_pattern", [False, True])
def test_a_policy_of_ones_own_goes_through_a_file_and_clips(tmp_path, suffix, by_pattern):
    policy = DoubleNorm(max_norm=0.5)
    config = GradientClippingHookConfig(policy={"*": policy} if by_pattern else policy)
    path = tmp_path / f"config.{suffix}"
    dump(config, path)
    again = load(path)
    assert again == config
    found = again.policy["*"] if by_pattern else again.policy
    assert type(found) is DoubleNorm
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    arg = PipelineHookArgs(
        optimizer=torch.optim.SGD([("weight", weight)], lr=1.0),
    )
    with again().begin("on_step", arg):
        pass
    torch.testing.assert_close(weight.grad, torch.tensor([0.3, 0.4]))


@pytest.mark.parametrize("text", ["{max_norm: 1.0}", "{'*': {max_norm: 1.0}}"])
def test_a_policy_that_does_not_say_its_kind_is_told_so_once(tmp_path, text):
    path = tmp_path / "config.yaml"
    name = f"{GradientClippingHook.__module__}:GradientClippingHook"
    path.write_text(f"class_type: {name}\npolicy: {text}\n")
    with pytest.raises(ConfigError, match="has no `clip_mode`") as caught:
        load(path)
    assert str(caught.value).count("error[") == 1
