"""What is written into a DeepSpeed configuration, and what is refused: without DeepSpeed."""

import math
import subprocess
import sys

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from gradclip import NormClip, ObserveClip, ValueClip
from gradclip.clipping import Policy
from gradclip.errors import ArgumentTypeError, ArgumentValueError, DoubleClippingError
from gradclip.integrations.deepspeed import lower
from gradclip.pipeline.hooks import GradientClippingHookConfig


def config(**more):
    return {"zero_optimization": {"stage": 2}, **more}


@pytest.mark.parametrize(
    ("policy", "limit"),
    [
        (0.5, 0.5),
        (2, 2.0),
        (NormClip(max_norm=0.5), 0.5),
        ({"*": 0.5}, 0.5),
        (math.inf, 0.0),
        (NormClip(max_norm=math.inf), 0.0),
        (ObserveClip(), 0.0),
        (GradientClippingHookConfig(clip_mode="norm", max_norm=0.5, nonfinite="raise"), 0.5),
        (GradientClippingHookConfig(policy=ObserveClip()), 0.0),
    ],
)
@pytest.mark.parametrize("before", [{}, {"gradient_clipping": "auto"}, {"gradient_clipping": None}])
def test_the_limit_is_written(policy, limit, before):
    target = config(**before)
    lower(target, policy)
    assert target == config(gradient_clipping=limit)
    lower(target, policy)  # the same limit is no rival
    assert target == config(gradient_clipping=limit)


@pytest.mark.smoke
@pytest.mark.parametrize("rival", [1.0, 1, 0, 0.0, 0.50001, True, "0.5"])
def test_another_limit_is_refused(rival):
    target = config(gradient_clipping=rival)
    with pytest.raises(DoubleClippingError) as caught:
        lower(target, 0.5)
    assert target == config(gradient_clipping=rival)
    text = str(caught.value)
    assert f"DeepSpeed  gradient_clipping = {rival!r}\n" in text
    assert "gradclip   max_norm          = 0.5\n" in text
    assert "lower(accelerator, 0.5)   # sets gradient_clipping to 0.5\n" in text
    assert f"keep DeepSpeed's {rival!r}\n" in text
    assert text.endswith("No parameters were changed.")


def test_a_limit_that_was_lowered_stays():
    hook = GradientClippingHookConfig(clip_mode="norm", max_norm=0.5)()
    hook.lower_into(config())
    for name, value in (("max_norm", 0.25), ("policy", 0.25)):
        with pytest.raises(DoubleClippingError, match=r"0\.25.*assigned.*\n.*once"):
            setattr(hook, name, value)
    assert hook.max_norm == 0.5


def test_a_limit_beside_observing_is_refused():
    with pytest.raises(DoubleClippingError, match=r"lower\(accelerator, gradclip\.ObserveClip"):
        lower(config(gradient_clipping=1.0), ObserveClip())


class HalfClip(Policy):
    clip_mode: str = "half"

    def decide(self, seen, state):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("policy", "word"),
    [
        (ValueClip(clip_value=0.5), "ValueClip"),
        (HalfClip(), "HalfClip"),
        (NormClip(max_norm=1.0, norm_type=1), "norm_type = 1.0"),
        (NormClip(max_norm=1.0, norm_type=math.inf), "norm_type = inf"),
        (ObserveClip(norm_type=3), "norm_type = 3.0"),
        ({"*.bias": None, "*": 1.0}, "none by name"),
        ({"head.*": 1.0}, "none by name"),
        (0, "0 means that nothing is clipped"),
        (GradientClippingHookConfig(clip_mode="value", clip_value=0.5), "ValueClip"),
        (GradientClippingHookConfig(policy=1.0, nonfinite="propagate"), "propagate"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(policy, word):
    target = config()
    with pytest.raises(DoubleClippingError, match=word) as caught:
        lower(target, policy)
    assert target == config()
    assert str(caught.value).endswith("No parameters were changed.")


@pytest.mark.parametrize(
    ("target", "word"),
    [
        ({}, "stage = 0"),
        ({"zero_optimization": {}}, "stage = 0"),
        ({"zero_optimization": {"stage": 0}}, "stage = 0"),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, "compute_grad_norm"),
        (config(bf16={"enabled": True, "check_grad_overflow": False}), "check_grad_overflow"),
        (config(optimizer={"type": "Muon", "params": {"lr": 0.1}}), "Muon"),
    ],
)
@pytest.mark.parametrize("policy", [0.5, ObserveClip()])
def test_where_deepspeed_would_not_tell_it_is_refused(target, word, policy):
    before = dict(target)
    with pytest.raises(DoubleClippingError, match=word):
        lower(target, policy)
    assert target == before


@pytest.mark.parametrize(
    "more",
    [
        {"bf16": {"enabled": True}},
        {"bf16": {"enabled": False, "check_grad_overflow": False}},
        {
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": True, "check_grad_overflow": False},
        },
        {"optimizer": {"type": "AdamW"}},
    ],
)
def test_what_is_close_to_it_is_not_refused(more):
    target = config(**more)
    lower(target, 0.5)
    assert target["gradient_clipping"] == 0.5


def test_an_accelerator_without_deepspeed_is_refused():
    try:
        with pytest.raises(ArgumentValueError, match="not for DeepSpeed"):
            lower(Accelerator(cpu=True), 0.5)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.mark.parametrize("target", [None, 0.5, "ds_config.json"])
def test_what_is_no_target_is_refused(target):
    with pytest.raises(ArgumentTypeError, match="expected an accelerate"):
        lower(target, 0.5)


def test_importing_it_imports_no_framework():
    code = (
        "import sys, gradclip.integrations.deepspeed as d\n"
        "d.lower({'zero_optimization': {'stage': 1}}, 0.5)\n"
        "assert d.engine_of(None, object()) is None\n"
        "assert not {'deepspeed', 'accelerate'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
