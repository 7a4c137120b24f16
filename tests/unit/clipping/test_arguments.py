"""The keywords that every way in takes: all of them, the same, and what a mistake is told."""

from importlib import import_module

import pytest
import torch
from torch import nn

import gradclip
from gradclip.clipping.arguments import ClipOptions
from gradclip.clipping.policies import BUILT_IN
from gradclip.errors import ArgumentTypeError, ArgumentValueError, ConfigError, DoubleClippingError
from gradclip.integrations.accelerate import AcceleratorClipper
from gradclip.integrations.deepspeed import lower
from gradclip.pipeline.hooks import GradientClippingHookConfig


class Accelerator:
    """As much of one as a clipper asks for."""

    sync_gradients = True
    distributed_type = "NO"
    scaler = None


def transformers(policy=None, **options):
    pytest.importorskip("transformers")
    return import_module("gradclip.integrations.transformers").GradientClippingCallback(
        policy, **options
    )


def lightning(policy=None, **options):
    pytest.importorskip("lightning")
    return import_module("gradclip.integrations.lightning").GradientClippingCallback(
        policy, **options
    )


def optimizer():
    return torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)


WAYS = {
    "GradientClipper": lambda *a, **k: gradclip.GradientClipper(nn.Linear(2, 1), *a, **k),
    "gradclip.attach": lambda *a, **k: gradclip.attach(optimizer(), *a, **k),
    "AcceleratorClipper": lambda *a, **k: AcceleratorClipper(Accelerator(), optimizer(), *a, **k),
    "transformers": transformers,
    "lightning": lightning,
}
VALUES = {
    "max_norm": 1.0,
    "nonfinite": "raise",
    "max_consecutive_skips": 3,
    "partitioned": None,
    "duplicated": None,
    "record": "runs/1",
    "backend": "reference",
}


def test_there_is_a_value_for_each_keyword():
    assert VALUES.keys() == ClipOptions.__annotations__.keys()


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_takes_every_keyword(way):
    made = WAYS[way](**VALUES)
    engine = getattr(getattr(made, "clipper", made), "_engine", None)
    if engine is not None:
        (policy,) = engine.policies.values()
        assert policy == gradclip.NormClip(max_norm=1.0)
        assert engine._judge.skips.limit == 3


def test_the_hook_has_a_field_for_every_keyword():
    assert ClipOptions.__annotations__.keys() <= GradientClippingHookConfig.model_fields.keys()
    given = {name: value for name, value in VALUES.items() if name != "max_norm"}
    config = GradientClippingHookConfig(clip_mode="norm", max_norm=1.0, **given)
    assert config.options(None) == given


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        (
            (),
            {"max_nrom": 1.0},
            ArgumentTypeError,
            "unexpected keyword 'max_nrom'. Did you mean max_norm",
        ),
        ((1.0,), {"nonfinit": "skip"}, ArgumentTypeError, "Did you mean nonfinite"),
        ((1.0,), {"colour": 1}, ArgumentTypeError, "it takes max_norm, nonfinite, "),
        ((1.0,), {"max_norm": 1.0}, ArgumentTypeError, "both a policy .* and max_norm=1.0"),
        ((), {}, ArgumentTypeError, "policy is None, and there is no max_norm"),
        ((), {"max_norm": -1.0}, ArgumentValueError, "expected a number >= 0"),
        ((), {"max_norm": 1.0, "nonfinite": "ignore"}, ArgumentValueError, "'skip', 'raise' or"),
        ((), {"max_norm": 1.0, "backend": "numpy"}, ArgumentValueError, "is unknown"),
    ],
)
def test_mistakes_are_told_before_there_is_anything_to_clip(
    way, arguments, keywords, error, message
):
    with pytest.raises(error, match=message):
        WAYS[way](*arguments, **keywords)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 10**400])
def test_a_scale_is_a_positive_number(scale):
    clipper = gradclip.GradientClipper(nn.Linear(2, 1), 1.0)
    with pytest.raises(ArgumentValueError, match=r"grad_scale=.*expected a positive finite number"):
        clipper.clip(grad_scale=scale)


def test_deepspeed_takes_a_max_norm_too():
    config = {"zero_optimization": {"stage": 1}}
    lower(config, max_norm=0.5)
    assert config["gradient_clipping"] == 0.5
    with pytest.raises(ArgumentTypeError, match="lower got both"):
        lower(config, 0.5, max_norm=0.5)
    with pytest.raises(ArgumentTypeError, match="there is no max_norm"):
        lower(config)


OTHERS = {
    "scope": "tensor",
    "norm_type": 1.0,
    "skip_above": 2.0,
    "clip_value": 1.0,
    "clip_factor": 0.1,
    "eps": 0.1,
    "units": {"experts.*": 2},
    "max_norm": gradclip.Schedule(points=((0, 1.0), (10, 0.5))),
    "cap": 2.0,
    "warmup": 10,
    "on_spike": "skip",
    "max_spikes": 5,
    "q": 0.5,
    "window": 500,
    "z": 3.0,
    "decay": 0.9,
    "target": "mean",
    "feedback": "raw",
    "ratio": 3.0,
    "warmup_max_norm": 1.0,
    "start": "smallest",
}
NEEDED = {"max_norm": 1.0, "clip_value": 1.0}
"""What a policy cannot be made without."""


def every_other_field():
    for policy in BUILT_IN:
        for name in sorted(policy.model_fields.keys() - {"clip_mode"}):
            yield pytest.param(policy, name, id=f"{policy.__name__}.{name}")


@pytest.mark.parametrize(("policy", "field"), list(every_other_field()))
def test_deepspeed_refuses_every_other_field_by_name(policy, field):
    """A field that a policy gets later is listed here, or this fails."""
    needed = {name: NEEDED[name] for name in NEEDED.keys() & policy.model_fields.keys()}
    given = policy(**{**needed, field: OTHERS[field]})
    with pytest.raises(DoubleClippingError, match=rf"\b{field} ?="):
        lower({"zero_optimization": {"stage": 1}}, given)


class TestProcessGroups:
    """A configuration names the dimensions of the accelerator's mesh."""

    class Mesh:
        mesh_dim_names = ("dp", "ep")

        def get_group(self, name):
            return f"the group of {name}"

    class Meshed(Accelerator):
        torch_device_mesh = None

    def config(self, **groups):
        return GradientClippingHookConfig(clip_mode="norm", max_norm=1.0, **groups)

    def test_names_become_groups(self):
        accelerator = self.Meshed()
        accelerator.torch_device_mesh = self.Mesh()
        config = self.config(partitioned={"experts.*": "ep", "*": ["dp", "ep"]})
        options = config.options(accelerator)
        assert options["partitioned"] == {
            "experts.*": ["the group of ep"],
            "*": ["the group of dp", "the group of ep"],
        }
        assert options["duplicated"] is None

    @pytest.mark.parametrize("accelerator", [None, Accelerator(), Meshed()])
    def test_an_unknown_name_is_refused(self, accelerator):
        with pytest.raises(ArgumentValueError, match=r"partitioned\['\*'\] names .* 'ep'.*none"):
            self.config(partitioned={"*": "ep"}).options(accelerator)

    def test_names_go_through_a_file(self, tmp_path):
        config = self.config(partitioned={"experts.*": "ep"}, duplicated={"tied": ["dp", "ep"]})
        for suffix in ("yaml", "toml", "json"):
            path = tmp_path / f"config.{suffix}"
            gradclip.config.dump(config, path)
            assert gradclip.config.load(path) == config

    def test_a_process_group_does_not(self, tmp_path):
        config = self.config(partitioned={"*": object()})
        with pytest.raises(ConfigError, match="no file can hold it"):
            gradclip.config.dump(config, tmp_path / "config.yaml")
        assert not (tmp_path / "config.yaml").exists()
