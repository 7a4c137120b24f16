"""What can be imported, and what importing it drags in."""

import subprocess
import sys

import pytest

import gradclip

ENGINE = [
    "AGCClip",
    "Advice",
    "ClipResult",
    "ClipStats",
    "EMAClip",
    "GradientClipper",
    "GuardClip",
    "NormClip",
    "ObserveClip",
    "Schedule",
    "QuantileClip",
    "Replay",
    "ValueClip",
    "ZScoreClip",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
    "presets",
    "replay",
    "suggest",
    "withhold",
]
HOOKS = [
    "GradientClippingHook",
    "GradientClippingHookConfig",
    "HookContext",
    "HookContextChannel",
    "OptimizerHook",
    "OptimizerHookConfig",
    "PipelineHookArgs",
    "PipelineHookChanelType",
    "PipelineHooks",
    "PipelineHooksConfig",
    "RemoveableHandle",
]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.smoke
def test_the_public_names_are_these():
    assert sorted(gradclip.__all__) == sorted(
        [*ENGINE, "__version__", "attach", "attached", "config", "errors"]
    )
    assert all(getattr(gradclip, name) is not None for name in gradclip.__all__)
    assert set(gradclip.__all__) <= set(dir(gradclip))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="clip_gard_norm_"):
        gradclip.clip_gard_norm_  # noqa: B018


@pytest.mark.parametrize("name", HOOKS)
def test_the_names_of_the_pipeline(name):
    from gradclip.pipeline import hooks  # noqa: PLC0415

    assert hasattr(hooks, name)


def test_the_trainer_and_the_names_of_the_page_that_is_re_imagined():
    from gradclip.pipeline import HookBasedTrainer, SimpleBatchProcessor  # noqa: PLC0415
    from gradclip.pipeline.hooks.grad_clip import (  # noqa: PLC0415
        GradientClippingHook,
        GradientClippingHookConfig,
    )
    from gradclip.pipeline.hooks.mixin import PipelineHooks  # noqa: PLC0415

    assert issubclass(GradientClippingHook, PipelineHooks)
    assert GradientClippingHook.InitFromConfig is True
    assert GradientClippingHookConfig.model_fields["class_type"].default is GradientClippingHook
    assert callable(HookBasedTrainer)
    assert callable(SimpleBatchProcessor.from_callable)


@pytest.mark.parametrize(
    "code",
    [
        "import gradclip",
        "import gradclip; gradclip.config.load; gradclip.errors.ConfigError; dir(gradclip)",
        "import gradclip.hook",
        "import gradclip.diagnostics",
    ],
)
def test_importing_is_light(code):
    heavy = "{'torch', 'numpy', 'accelerate', 'matplotlib', 'rich', 'typer'} & set(sys.modules)"
    result = run(f"{code}\nimport sys\nassert not {heavy}, {heavy}")
    assert result.returncode == 0, result.stderr


def test_the_engine_needs_no_extra():
    """torch, pydantic and pyyaml are enough for the engine and the hooks."""
    blocked = ["accelerate", "rich", "typer", "matplotlib", "tomli_w", "lightning", "transformers"]
    code = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import torch, gradclip
from gradclip.pipeline.hooks import GradientClippingHookConfig, PipelineHookArgs, PipelineHooks
weight = torch.nn.Parameter(torch.zeros(2))
optimizer = torch.optim.SGD([weight], lr=1.0)
hooks = PipelineHooks.from_hooks(GradientClippingHookConfig(clip_mode="norm", max_norm=1.0))
with hooks.begin("on_step", PipelineHookArgs(accelerator=None, optimizer=optimizer)) as arg:
    weight.grad = torch.tensor([3.0, 4.0])
assert abs(float(weight.grad.norm()) - 1) < 1e-5, weight.grad
assert gradclip.clip_grad_norm_([weight], 0.5) > 0.99
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
