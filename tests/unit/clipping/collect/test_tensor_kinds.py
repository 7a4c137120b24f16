"""Tensors that are none of torch's plain ones, and defaults that make plain ones something else."""

import ast
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import masked_tensor
from torch.testing._internal.two_tensor import TwoTensor

import gradclip
import oracle
from gradclip import (
    GradientClipper,
    NormClip,
    ValueClip,
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)
from gradclip.errors import UnsupportedGradientError


def two():
    return TwoTensor(torch.ones(3), torch.ones(3))


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
def masked():
    return masked_tensor(torch.ones(3), torch.tensor([True, False, True]))


def fake():
    with FakeTensorMode():
        return torch.ones(3)


KINDS = {"TwoTensor": two, "MaskedTensor": masked, "FakeTensor": fake}
TAKERS = {
    "clip_grad_norm_": lambda ps: clip_grad_norm_(ps, 0.1),
    "clip_grad_value_": lambda ps: clip_grad_value_(ps, 0.1),
    "clip_grads_with_norm_": lambda ps: clip_grads_with_norm_(ps, 0.1, 5.0),
    "GradientClipper": lambda ps: GradientClipper(ps, 0.1).clip(),
    "reference": lambda ps: GradientClipper(ps, 0.1, backend="reference").clip(),
}


def parameter_with(gradient):
    """A parameter that has it: torch does not let a plain one have some of these."""

    class Given(torch.nn.Parameter):
        grad = gradient

    return Given(torch.zeros(3))


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("kind", KINDS)
def test_wrappers_are_refused_by_name(kind, taker):
    """They ended in errors of torch, or of the wrapper."""
    plain = oracle.parameter(oracle.randn(4))
    before = oracle.look([plain])
    with pytest.raises(UnsupportedGradientError, match=rf"parameters\[1\].*{kind}"):
        TAKERS[taker]([plain, parameter_with(KINDS[kind]())])
    oracle.assert_untouched([plain], before)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
@pytest.mark.parametrize("kind", KINDS)
def test_wrappers_have_no_total_norm(kind):
    with pytest.raises(UnsupportedGradientError, match=rf"tensors\[1\].*{kind}"):
        get_total_norm([torch.ones(2), KINDS[kind]()])


def test_a_model_of_fake_tensors_is_refused():
    with FakeTensorMode():
        model = torch.nn.Linear(3, 2)
        model(torch.ones(1, 3)).sum().backward()
        with pytest.raises(UnsupportedGradientError, match=r"weight.*FakeTensor"):
            GradientClipper(model, 1.0).clip()


def test_a_parameter_as_a_gradient_is_plain():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    assert float(clip_grad_norm_([weight], 1.0)) == 5.0
    assert oracle.norm([weight.grad]) <= 1.0


@pytest.mark.parametrize("backend", ["foreach", "reference"])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, float("inf")])
def test_a_default_device_of_meta_changes_nothing(p, backend):
    """Large models are made on the meta device; it was NotImplementedError."""
    shapes = [(3, 4), (5, 2), (5, 2), (5, 2), (5, 2), (300, 300)]
    params = oracle.parameters(*(oracle.randn(*shape, seed=i) for i, shape in enumerate(shapes)))
    named = [(f"w{i}", p) for i, p in enumerate(params)]
    truth = oracle.norm(oracle.gradients(params), p)
    with torch.device("meta"):
        clipper = GradientClipper(named, NormClip(max_norm=truth / 2, norm_type=p), backend=backend)
        result = clipper.clip()
        assert oracle.relative(float(result.norm_pre), truth) <= 1e-6
        assert not result.to_host().skipped
        GradientClipper(named, {"w0": 0.5, "*": ValueClip(clip_value=0.1)}, backend=backend).clip()
        clip_grad_value_(params, 0.05)
        clip_grads_with_norm_(params, 0.01, 1.0)
        params[0].grad[0] = float("nan")
        assert GradientClipper(named, 1.0, backend=backend).clip().to_host().skipped
    assert not params[0].grad.any()


NAMES = ["arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "ones", "tensor"]
FACTORIES = {f"torch.{name}" for name in [*NAMES, "scalar_tensor", "zeros"]}


def test_the_engine_says_where_each_tensor_is_made():
    """Otherwise ``torch.set_default_device`` would decide it."""
    missing = []
    for file in (Path(gradclip.__file__).parent / "clipping").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) not in FACTORIES:
                continue
            if "device" not in {keyword.arg for keyword in node.keywords}:
                missing.append(f"{file.name}:{node.lineno}")
    assert missing == []
