"""Files that were written for RoboOrchardLab load as gradclip's, and nothing of it is imported."""

import json
import re
import sys

import pytest

from gradclip.config import Config, dump, load, register
from gradclip.config.class_type import _registry, resolve
from gradclip.errors import ClassTypeError, ConfigError
from gradclip.pipeline.hooks import (
    GradientClippingHook,
    GradientClippingHookConfig,
    HookListConfig,
    OptimizerHook,
    OptimizerHookConfig,
    PipelineHooks,
    SaveCheckpoint,
    SaveCheckpointConfig,
    ValidationHookConfig,
)

LAB = "robo_orchard_lab.pipeline.hooks"
CLIP = GradientClippingHookConfig(clip_mode="norm", max_norm=1.0)


@pytest.fixture(autouse=True)
def _traps(tmp_path, monkeypatch):
    """Packages of its names that note that they were imported."""
    ran = tmp_path / "ran"
    for package in ("robo_orchard_lab", "robo_orchard_core"):
        (tmp_path / "traps" / package).mkdir(parents=True)
        trap = tmp_path / "traps" / package / "__init__.py"
        trap.write_text(f"open({str(ran)!r}, 'a').close()\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "traps")
    yield
    assert not ran.exists()
    assert not [name for name in sys.modules if name.startswith("robo_orchard_")]


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        (f"{LAB}.grad_clip:GradientClippingHook", GradientClippingHook),
        (f"{LAB}.grad_clip:GradientClippingHookConfig", GradientClippingHookConfig),
        (f"{LAB}.optimizer:OptimizerHook", OptimizerHook),
        (f"{LAB}.optimizer:OptimizerHookConfig", OptimizerHookConfig),
        (f"{LAB}.checkpoint:SaveCheckpoint", SaveCheckpoint),
        (f"{LAB}.checkpoint:SaveCheckpointConfig", SaveCheckpointConfig),
        (f"{LAB}.validation:ValidationHookConfig", ValidationHookConfig),
        (f"{LAB}.mixin:PipelineHooks", PipelineHooks),
        (f"{LAB}:GradientClippingHookConfig", GradientClippingHookConfig),  # re-exported there
    ],
)
@pytest.mark.parametrize("allow", [(), ("robo_orchard_lab",)])
def test_its_names_are_those_of_the_same_classes_here(name, ours, allow):
    assert resolve(name, allow) is ours


@pytest.mark.parametrize(
    ("name", "read_as"),
    [
        (f"{LAB}.memory:ClearCacheHook", "gradclip.pipeline.hooks.memory:ClearCacheHook"),
        (f"{LAB}.grad_clip:os.system", "gradclip.pipeline.hooks.grad_clip:os.system"),
        (f"{LAB}.optimizer:GradientClippingHook", "hooks.optimizer:GradientClippingHook"),
        (f"{LAB}.grad:GradientClippingHook", "gradclip.pipeline.hooks.grad:GradientClippingHook"),
        ("robo_orchard_lab.pipeline:HookBasedTrainer", "gradclip.pipeline:HookBasedTrainer"),
        ("robo_orchard_lab.pipeline.trainer:SimpleTrainer", "gradclip.pipeline.trainer"),
        ("robo_orchard_core.utils.hook:HookContext", "gradclip.hook:HookContext"),
        ("robo_orchard_core.utils.hook.x:HookContext", "gradclip.hook.x:HookContext"),
    ],
)
@pytest.mark.parametrize("allow", [(), ("robo_orchard_lab", "robo_orchard_core", "gradclip")])
def test_a_name_that_gradclip_has_no_class_for_is_refused(name, read_as, allow):
    with pytest.raises(ClassTypeError) as caught:
        resolve(name, allow)
    headline, *notes = str(caught.value).splitlines()
    assert headline == f"class_type '{name}' is not a configurable class"
    assert read_as in notes[-1]
    assert "nothing of RoboOrchardLab was imported" in notes[-1]


@pytest.mark.parametrize(
    "name",
    [
        "robo_orchard_lab.pipelines.hooks.grad_clip:GradientClippingHook",
        "robo_orchard_lab.dataset.robot:Dataset",
        "robo_orchard_core.utils.hooks:HookContext",
        "robo_orchard_core.utils.config:Config",
        "my.robo_orchard_lab.pipeline.hooks.grad_clip:GradientClippingHook",
    ],
)
def test_other_names_of_its_packages_mean_nothing(name):
    with pytest.raises(ClassTypeError, match="nothing was imported for it"):
        resolve(name)


def test_a_dot_in_place_of_the_colon_is_refused_as_everywhere():
    with pytest.raises(ClassTypeError, match="not of the form module:Class"):
        resolve(f"{LAB}.grad_clip.GradientClippingHook")


def test_what_the_program_itself_made_configurable_goes_first():
    theirs = type("GradientClippingHook", (), {"__module__": f"{LAB}.grad_clip"})
    register(theirs)
    try:
        assert resolve(f"{LAB}.grad_clip:GradientClippingHook") is theirs
    finally:
        del _registry[f"{LAB}.grad_clip:GradientClippingHook"]


# Its files name the configuration class in __config_type__; class_type may be there as well.

FILES = {
    "config_type.yaml": (
        f"__config_type__: {LAB}.grad_clip:GradientClippingHookConfig\n"
        "clip_mode: norm\nclip_value: null\nmax_norm: 1.0\nnorm_type: 2.0\n"
    ),
    "class_type.yml": f"class_type: {LAB}.grad_clip:GradientClippingHook\n"
    "clip_mode: norm\nmax_norm: 1\n",
    "both.json": f'{{"__config_type__": "{LAB}.grad_clip:GradientClippingHookConfig", '
    f'"class_type": "{LAB}.grad_clip:GradientClippingHook", "clip_mode": "norm", "max_norm": 1.0}}',
    "config_type.toml": f'__config_type__ = "{LAB}.grad_clip:GradientClippingHookConfig"\n'
    'clip_mode = "norm"\nmax_norm = 1.0\n',
    "null.toml": f'__config_type__ = "{LAB}.grad_clip:GradientClippingHookConfig"\n'
    'clip_mode = "norm"\nclip_value = "null"\nmax_norm = 1.0\n',
}


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_was_written_for_it_loads_and_is_written_as_ours(file, tmp_path):
    (tmp_path / file).write_text(FILES[file], encoding="utf-8")
    config = load(tmp_path / file)
    assert config == CLIP
    assert type(config()) is GradientClippingHook
    dump(config, tmp_path / file)
    assert "robo_orchard" not in (tmp_path / file).read_text(encoding="utf-8")
    assert "__config_type__" not in (tmp_path / file).read_text(encoding="utf-8")
    assert load(tmp_path / file) == CLIP


def test_its_configurations_may_stand_in_a_list_of_ours():
    text = (
        "class_type: gradclip.pipeline.hooks.mixin:PipelineHooks\n"
        "hooks:\n"
        f"- __config_type__: {LAB}.grad_clip:GradientClippingHookConfig\n"
        "  clip_mode: norm\n"
        "  max_norm: 1.0\n"
        f"- __config_type__: {LAB}.optimizer:OptimizerHookConfig\n"
        f"- class_type: {LAB}.checkpoint:SaveCheckpoint\n"
        "  save_root: runs/1\n"
    )
    assert Config.from_str(text, "yaml") == HookListConfig(
        hooks=(CLIP, OptimizerHookConfig(), SaveCheckpointConfig(save_root="runs/1"))
    )


def test_a_wrong_name_is_shown_in_its_place(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(f"clip_mode: norm\n__config_type__: {LAB}.grad_clip:GradientClipHook\n")
    with pytest.raises(ClassTypeError, match=re.escape(f"{path}:2:18")):
        load(path)


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ('"max_nrom": 1.0', ConfigError, "did you mean `max_norm`"),
        (f'"class_type": "{LAB}.optimizer:OptimizerHook"', ClassTypeError, "no subclass of"),
        ('"class_type": "os:system"', ClassTypeError, "nothing was imported"),
    ],
)
def test_the_rest_of_the_file_is_checked_as_ever(fields, error, says):
    head = f'"__config_type__": "{LAB}.grad_clip:GradientClippingHookConfig", "clip_mode": "norm"'
    with pytest.raises(error, match=says):
        Config.from_str(f'{{{head}, "max_norm": 1.0, {fields}}}')


class Adapted(GradientClippingHookConfig):
    """As the configuration for their trainer is."""


class Experiment(Config):
    """A user's own, with a field for one class."""

    grad_clip: Adapted


def test_the_key_may_stand_where_the_class_is_known():
    fields = {
        "__config_type__": f"{LAB}.grad_clip:GradientClippingHookConfig",
        "clip_mode": "norm",
        "max_norm": 1.0,
    }
    adapted = Adapted(clip_mode="norm", max_norm=1.0)
    assert Adapted.from_dict(fields) == adapted
    assert Adapted.from_str(json.dumps(fields)) == adapted
    assert Experiment.from_dict({"grad_clip": fields}).grad_clip == adapted
    other = {**fields, "__config_type__": f"{LAB}.optimizer:OptimizerHookConfig"}
    with pytest.raises(ValueError, match="is OptimizerHookConfig, and here a Adapted is expected"):
        Adapted.from_dict(other)


def test_a_text_null_is_none_in_its_toml_alone():
    class Named(Config):
        name: str | None = "x"

    assert Named.from_str('name = "null"\n', "toml").name == "null"


@pytest.mark.parametrize("name", ["os:system", "subprocess:Popen"])
def test_its_key_imports_nothing_either(name):
    with pytest.raises(ClassTypeError, match="nothing was imported"):
        Config.from_str(f'{{"__config_type__": "{name}"}}')


def test_another_kind_of_configuration_is_refused():
    with pytest.raises(
        ClassTypeError, match=r"__config_type__ .* is configured by OptimizerHookCo"
    ):
        GradientClippingHookConfig.from_str(
            f'{{"__config_type__": "{LAB}.optimizer:OptimizerHookConfig"}}'
        )
