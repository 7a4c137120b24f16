"""Adaptive gradient clipping against the formulas of its authors, written as they wrote them."""

import warnings
from math import inf

import numpy as np
import pytest
import torch
from torch import nn

from gradclip import AGCClip, GradientClipper, NormClip, attach
from gradclip.errors import ArgumentValueError

LAYERS = {
    "linear": lambda: nn.Linear(5, 3),
    "conv": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv3d": lambda: nn.Conv3d(2, 3, 2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
    "transposed in groups": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "embedding": lambda: nn.Embedding(7, 4),
    "layer norm": lambda: nn.LayerNorm((3, 4)),
    "batch norm": lambda: nn.BatchNorm2d(4),
    "normed": lambda: nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(4, 6, 3, groups=2)),
    "normed by output": lambda: nn.utils.parametrizations.weight_norm(
        nn.ConvTranspose1d(4, 6, 3, groups=2), dim=1
    ),
}


def by_output(layer, name, values):
    """Return what each output is computed from as a row: (units, ...)."""
    values = values.detach().double().numpy()
    if values.ndim <= 1 or isinstance(layer, nn.LayerNorm):
        return values.reshape(1, -1)
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d):
        parts = np.split(values, layer.groups if len(values) > 1 else 1, axis=0)
        outputs = [part[:, output] for part in parts for output in range(part.shape[1])]
        return np.stack([each.reshape(-1) for each in outputs])
    return values.reshape(len(values), -1)


def nfnets(weights, gradients, clipping=0.01, eps=1e-3):
    """deepmind-research, nfnets/agc_optax.py: one row for each unit."""
    weight_norm = np.sqrt(np.sum(weights**2, axis=1, keepdims=True))
    grad_norm = np.sqrt(np.sum(gradients**2, axis=1, keepdims=True))
    max_norm = np.maximum(weight_norm, eps) * clipping
    trigger = grad_norm < max_norm
    clipped = gradients * (max_norm / np.maximum(grad_norm, 1e-6))
    return np.where(trigger, gradients, clipped)


def optax(weights, gradients, clipping, eps):
    """optax.adaptive_grad_clip, whose unit is a column: the output dimension is the last one."""

    def unitwise_norm(columns):
        squared = np.sum(np.square(columns), axis=0, keepdims=True)
        return np.broadcast_to(np.sqrt(squared), columns.shape)

    columns, updates = weights.T, gradients.T
    g_norm, p_norm = unitwise_norm(updates), unitwise_norm(columns)
    max_norm = clipping * np.maximum(p_norm, eps)
    clipped = updates * (max_norm / np.maximum(g_norm, 1e-6))
    return np.where(g_norm < max_norm, updates, clipped).T


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("backend", ["foreach", "reference", "triton"])
@pytest.mark.parametrize("kind", LAYERS)
def test_it_is_the_published_rule(kind, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    for factor, eps in ((0.01, 1e-3), (0.3, 0.5), (1e-4, 1e-4)):  # the last: below the floor 1e-6
        torch.manual_seed(1)
        layer = LAYERS[kind]()
        before = {}
        for name, weight in layer.named_parameters():
            sizes = torch.logspace(-9, 1, weight.numel()).view_as(weight)
            weight.grad = torch.randn_like(weight) * sizes
            before[name] = weight.detach().clone(), weight.grad.clone()
        result = GradientClipper(
            layer, AGCClip(clip_factor=factor, eps=eps), backend=backend
        ).clip()
        assert result.clipped
        for name, weight in layer.named_parameters():
            rows = [by_output(layer, name, each) for each in before[name]]
            got = by_output(layer, name, weight.grad)
            for rule in (nfnets, optax):
                expected = rule(*rows, factor, eps)
                np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-15)
            assert torch.equal(weight, before[name][0])


def test_weights_that_begin_at_zero_can_grow():
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    attach(optimizer, AGCClip())
    for weight in layer.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert float(layer.weight.detach().norm()) == pytest.approx(0.1 * 1e-5 * 2**0.5, rel=1e-5)


def test_the_last_layer_has_a_limit_of_its_own():
    model = nn.ModuleDict({"body": nn.Linear(3, 2), "head": nn.Linear(2, 1)})
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    GradientClipper(model, {"head.*": NormClip(max_norm=1.0), "*": AGCClip()}).clip()
    head = torch.cat([weight.grad.flatten() for weight in model["head"].parameters()])
    assert float(head.norm()) == pytest.approx(1.0)
    limits = 0.01 * model["body"].weight.detach().norm(dim=1)
    torch.testing.assert_close(model["body"].weight.grad.norm(dim=1), limits)


@pytest.mark.parametrize("kind", [{"dtype": torch.int8}, {"device": "meta"}])
def test_frozen_weights_without_a_norm_are_left_out(kind):
    """As of a quantized model with adapters; a frozen weight of another kind counts as ever."""
    model = nn.ModuleDict({"base": nn.Linear(2, 3), "adapter": nn.Linear(3, 2)})
    base = torch.zeros(3, 2).to(**kind)
    model["base"].weight = nn.Parameter(base, requires_grad=False)
    for weight in model["adapter"].parameters():
        weight.grad = torch.ones_like(weight)
    model["adapter"].bias.requires_grad_(requires_grad=False)
    GradientClipper(model, AGCClip()).clip()
    for weight, dim in ((model["adapter"].weight, 1), (model["adapter"].bias, 0)):
        torch.testing.assert_close(weight.grad.norm(dim=dim), 0.01 * weight.detach().norm(dim=dim))


@pytest.mark.filterwarnings("ignore:.*skipped step")
@pytest.mark.parametrize("bad", [torch.nan, inf])
def test_only_a_gradient_can_forbid_a_step(bad):
    """A weight that nothing uses may be no number: it has the floor, or no limit."""
    layer = nn.Embedding(3, 2)
    with torch.no_grad():
        layer.weight[0] = bad
    layer.weight.grad = torch.ones(3, 2)
    clipper = GradientClipper(layer, AGCClip())
    assert not clipper.clip().skipped
    first = float(layer.weight.grad[0].norm())
    assert first == pytest.approx(2**0.5 if bad == inf else 1e-5)
    layer.weight.grad = torch.full((3, 2), bad)
    assert bool(clipper.clip().skipped)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(2, 3, 4))
        self.v = nn.Parameter(torch.randn(2, 4, 3))
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.table = nn.Parameter(torch.randn(3, 2))
        for weight in self.parameters():
            weight.grad = torch.ones_like(weight)


class TestUnits:
    @pytest.mark.parametrize("known", ["module", "pairs"])
    def test_what_no_layer_says_warns_once_and_names_it(self, known):
        model = Experts()
        given = model if known == "module" else list(model.named_parameters())
        with pytest.warns(UserWarning, match=r"^w, of shape \(2, 3, 4\) \(and 1 more\)") as caught:
            clipper = GradientClipper(given, AGCClip())
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            clipper.clip()
        assert "AGCClip(units={'w': 2})" in str(caught[0].message)
        assert model.w.grad.norm(dim=(1, 2)).tolist() == pytest.approx(
            (0.01 * model.w.detach().norm(dim=(1, 2))).tolist()
        )

    def test_what_is_said_is_followed_and_warns_of_nothing(self):
        model = Experts()
        policy = AGCClip(units={"w": 2, "v": "tensor", "t*": 1, "*": 0})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = GradientClipper(model, policy).clip()
        for name, dims in {"w": (0, 1), "v": (0, 1, 2), "token": (0, 2), "table": (0,)}.items():
            weight = getattr(model, name)
            limits = 0.01 * torch.linalg.vector_norm(weight.detach(), dim=dims)
            norms = torch.linalg.vector_norm(weight.grad, dim=dims)
            torch.testing.assert_close(norms, limits, msg=name)
        assert list(result.scope_names) == [
            *(f"w[{n}]" for n in range(4)), "v[0]", "token[0]", "table[0]", "table[1]"
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("units", "said"),
        [
            ({"w": 3}, r"units has 'w': 3, and w, of shape \(2, 3, 4\), has no dimension 3"),
            ({"expert.*": 2}, r"'expert\.\*' of units matches no parameter"),
        ],
    )
    def test_what_cannot_be_meant_is_refused_at_once(self, units, said):
        with pytest.raises(ArgumentValueError, match=said):
            GradientClipper(Experts(), AGCClip(units=units))
        with pytest.raises(ArgumentValueError, match=said):
            GradientClipper(Experts(), {"token": None, "*": AGCClip(units=units)})
