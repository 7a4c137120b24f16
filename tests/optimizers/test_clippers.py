"""The clippers of other packages: ours do the same on finite norms, and not what theirs get wrong.

Each test skips where its package is not installed: ``make test-optimizers`` installs them all.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gradclip import AGCClip, GradientClipper, QuantileClip, ZScoreClip, presets, replay


def package(name):
    return pytest.importorskip(name, reason=f"needs {name}: make test-optimizers installs it")


def timm():
    """Return the file alone: to import timm takes torchvision, which it does not use."""
    found = PathFinder.find_spec("timm")
    if found is None:
        pytest.skip("needs timm: make test-optimizers installs it")
    place = Path(found.origin).parent / "utils" / "agc.py"
    spec = spec_from_file_location("agc_of_timm", place)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def zclip(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", None)  # it would be imported, which takes seconds
    return package("zclip.zclip").ZClip(max_grad_norm=None)


def calm(steps):
    """Norms of a run, around 100: torch's 1e-6 beside a norm is nothing then."""
    return 100 * np.exp(np.random.default_rng(0).normal(0, 0.2, steps))


def spiky():
    norms = calm(250)
    norms[[60, 61, 200]] *= [5, 40, 3]
    return norms


def model():
    return nn.ParameterDict({"a": nn.Parameter(torch.zeros(3)), "b": nn.Parameter(torch.zeros(2))})


def run(clip, norms, module=None):
    """Return what is left of each norm where a function clips the gradients of a module."""
    module = model() if module is None else module
    left = []
    for norm in norms:
        for weight, share in zip(module.parameters(), (0.6, 0.8), strict=True):
            weight.grad = torch.full_like(weight, float(norm) * share / weight.numel() ** 0.5)
        clip(module)
        grads = torch.cat([weight.grad.double() for weight in module.parameters()])
        left.append(float(grads.norm()))
    return np.array(left)


def ours(policy, norms):
    module = model()
    clipper = GradientClipper(module, policy)
    return run(lambda _: clipper.clip(), norms, module)


class TestParity:
    def test_zclip(self, zclip):
        norms = spiky()
        np.testing.assert_allclose(
            ours(presets.zclip_paper(), norms), run(zclip.step, norms), rtol=1e-6
        )

    def test_autoclip(self):
        """It learns a norm after it has clipped: what ours allow it allows one step later."""
        torchs = package("autoclip.torch")
        norms, module = spiky(), model()
        theirs = torchs.QuantileClip(
            module.parameters(), quantile=0.7, history_length=50, global_threshold=True
        )
        found = run(lambda _: theirs.step(), norms, module)
        limits = replay(norms, presets.autoclip(q=0.7, window=50)).thresholds.numpy()
        np.testing.assert_allclose(found[1:], np.minimum(norms[1:], limits[:-1]), rtol=1e-6)

    def test_quantiles_of_smartclip(self):
        smartclip = package("smartclip")
        theirs = smartclip.AutoClip(
            mode="percentile",
            percentile=70.0,
            history="window",
            window_size=50,
            warmup_steps=0,
            min_history=0,
        )
        norms = spiky()
        np.testing.assert_allclose(
            ours(QuantileClip(q=0.7, window=50, warmup=0), norms),
            run(lambda module: smartclip.apply(module, theirs), norms),
            rtol=1e-6,
        )

    def test_adagc(self):
        """Each moment is a gradient here, as it was clipped: ``betas`` begin with 0."""
        optimizers = package("pytorch_optimizer")
        torch.manual_seed(0)
        module = model().double()
        optimizer = optimizers.AdaGC(
            module.parameters(), lr=0.0, betas=(0.0, 0.999), warmup_steps=101, weight_decay=0.0
        )
        generator, seen, found = np.random.default_rng(3), [], []
        for scale in np.exp(generator.normal(0, 0.4, (250, 2))):
            for weight, size in zip(module.parameters(), scale, strict=True):
                weight.grad = torch.randn(weight.shape, dtype=weight.dtype) * float(size)
            seen.append([float(weight.grad.double().norm()) for weight in module.parameters()])
            optimizer.step()
            moments = [optimizer.state[weight]["exp_avg"] for weight in module.parameters()]
            found.append([float(each.double().norm()) for each in moments])
        expected = replay(seen, presets.adagc_paper())
        assert expected.clip_fraction > 0.3
        np.testing.assert_allclose(expected.norms_post, found, rtol=1e-6)

    @pytest.mark.parametrize("whose", ["pytorch_optimizer", "timm", "smartclip"])
    def test_agc(self, whose):
        """smartclip has one unit for each tensor, and leaves vectors alone."""
        theirs = timm() if whose == "timm" else package(whose)
        torch.manual_seed(0)
        module = nn.ModuleList([nn.Linear(5, 4), nn.Conv2d(3, 4, 3), nn.Conv3d(2, 3, 2)])
        grads = [torch.randn_like(p) * p.numel() ** -0.5 for p in module.parameters()]
        for weight, grad in zip(module.parameters(), grads, strict=True):
            weight.grad = grad.clone()
        if whose == "timm":
            theirs.adaptive_clip_grad(module.parameters(), clip_factor=0.1)
        elif whose == "smartclip":
            clipper = theirs.AGC(clipping=0.1, exclude_bias_bn=False)
            theirs.apply(module, clipper)
        else:
            for weight in module.parameters():
                weight.grad = theirs.optimizer.agc(weight.detach(), weight.grad, 1e-3, 0.1)
        expected = [weight.grad for weight in module.parameters()]
        for weight, grad in zip(module.parameters(), grads, strict=True):
            weight.grad = grad.clone()
        units = {"*": "tensor"} if whose == "smartclip" else {}
        assert GradientClipper(module, AGCClip(clip_factor=0.1, units=units)).clip().clipped
        for weight, wanted in zip(module.parameters(), expected, strict=True):
            torch.testing.assert_close(weight.grad, wanted, rtol=1e-6, atol=1e-9)


class TestFaults:
    """What a reference gets wrong, and the same policy of ours does not."""

    def test_zclip_has_no_limit_after_a_nan(self, zclip):
        norms = np.append(calm(50), [np.nan, 100.0, 1e5])
        assert run(zclip.step, norms)[-1] == pytest.approx(1e5)
        assert ours(presets.zclip_paper(), norms)[-1] < 200

    def test_zclip_makes_a_nan_of_an_infinity(self, zclip):
        norms = np.append(calm(50), [np.inf, 100.0])
        assert np.isnan(run(zclip.step, norms)[-2])
        left = ours(presets.zclip_paper(), norms)
        assert left[-2] == 0
        assert left[-1] == pytest.approx(100)

    def test_zclip_never_follows_a_level(self, zclip):
        norms = calm(250)
        norms[50:] *= 10
        assert run(zclip.step, norms)[-50:].max() < 300
        assert ours(ZScoreClip(), norms)[-50:].mean() > 800

    def test_autoclip_makes_nans_for_ever_after_one(self):
        torchs = package("autoclip.torch")
        norms, module = np.append(calm(50), [np.nan, 100.0, 100.0]), model()
        theirs = torchs.QuantileClip(module.parameters(), global_threshold=True)
        assert np.isnan(run(lambda _: theirs.step(), norms, module)[-3:]).all()
        assert (ours(QuantileClip(warmup=0), norms)[-2:] > 90).all()

    def test_smartclip_lets_repeated_spikes_through(self):
        smartclip = package("smartclip")
        norms = np.full(300, 0.2) * calm(300) / 100
        norms[200::10] = 20.0
        spikes = {
            name: run(lambda module, each=each: smartclip.apply(module, each), norms)[200::10]
            for name, each in {
                "auto": smartclip.AutoClip(),
                "zscore": smartclip.ZScoreClip(),
            }.items()
        }
        for name, left in spikes.items():
            assert left[-1] > 20 * 0.2, name
            assert left[-1] > 1.5 * left[0], name
        for policy in (ZScoreClip(), QuantileClip()):
            assert ours(policy, norms)[200::10].max() < 2 * 0.2

    def test_smartclip_makes_a_nan_step(self):
        smartclip = package("smartclip")
        norms = np.append(calm(200), np.nan)
        clipper = smartclip.AutoClip()
        assert np.isnan(run(lambda module: smartclip.apply(module, clipper), norms)[-1])
        assert ours(QuantileClip(), norms)[-1] == 0

    def test_adagc_freezes_a_tensor_that_had_no_gradient_once(self):
        optimizers = package("pytorch_optimizer")
        weight = nn.Parameter(torch.zeros(2))
        optimizer = optimizers.AdaGC(
            [weight], lr=0.0, betas=(0.0, 0.999), warmup_steps=11, weight_decay=0.0
        )
        norms = [[1.0], [0.0], *[[1.0]] * 200]
        for (norm,) in norms:
            weight.grad = torch.tensor([norm, 0.0])
            optimizer.step()
        assert float(optimizer.state[weight]["exp_avg"].norm()) < 1e-6
        policy = presets.adagc_paper().model_copy(update={"warmup": 10})
        assert replay(norms, policy).norms_post[-1] == pytest.approx(1.0)

    def test_timm_takes_the_inputs_of_a_transposed_convolution_for_its_units(self):
        theirs = timm()
        torch.manual_seed(0)
        layer = nn.ConvTranspose2d(3, 2, 1, bias=False)
        limits = 0.01 * layer.weight.detach().transpose(0, 1).flatten(1).norm(dim=1)
        given = torch.randn_like(layer.weight)
        layer.weight.grad = given.clone()
        theirs.adaptive_clip_grad(layer.parameters())
        found = layer.weight.grad.transpose(0, 1).flatten(1).norm(dim=1)
        assert not torch.allclose(found, limits, rtol=1e-2)
        layer.weight.grad = given.clone()
        GradientClipper(layer, AGCClip()).clip()
        torch.testing.assert_close(layer.weight.grad.transpose(0, 1).flatten(1).norm(dim=1), limits)

    def test_pytorch_optimizer_turns_the_gradient_of_a_convolution_over_one_dimension(self):
        """Its units are the places of a kernel there, and elsewhere filters."""
        theirs = package("pytorch_optimizer.optimizer")
        torch.manual_seed(0)
        layer = nn.Conv1d(3, 2, 4, bias=False)
        given = torch.randn_like(layer.weight)
        found = theirs.agc(layer.weight.detach(), given) / given
        assert not torch.allclose(found, found[:, :1, :1].expand_as(found), rtol=0.1)
        layer.weight.grad = given.clone()
        GradientClipper(layer, AGCClip()).clip()
        found = layer.weight.grad / given
        torch.testing.assert_close(found, found[:, :1, :1].expand_as(found))
