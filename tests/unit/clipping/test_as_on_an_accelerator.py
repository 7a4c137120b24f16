"""The path on which nothing is read: verdicts and coefficients stay tensors.

A CPU runs it when it is told not to look; the answers must be those of the path that looks.
"""

from contextlib import contextmanager
from math import inf, nan

import fake_device
import pytest
import torch

from gradclip import (
    AGCClip,
    EMAClip,
    GradientClipper,
    GuardClip,
    NormClip,
    ObserveClip,
    QuantileClip,
    Schedule,
    ValueClip,
    ZScoreClip,
)
from gradclip.clipping import flags
from gradclip.clipping.kernels import foreach
from gradclip.clipping.step.nonfinite import SkipCounter
from pairwise import pairwise
from processes import alone

GRADIENTS = {
    "within": [[0.3, 0.4], [0.1, -0.2]],
    "beyond": [[3.0, 4.0], [-12.0, 0.5]],
    "nan": [[nan, 4.0], [1.0, 2.0]],
    "infinite": [[1.0, 4.0], [inf, 2.0]],
    "both": [[inf, 2.0], [nan, 1.0]],
}
POLICIES = {
    "norm": 1.0,
    "norm inf": NormClip(max_norm=1.0, norm_type=inf),
    "norm 3": NormClip(max_norm=1.0, norm_type=3.0),
    "zero": 0.0,
    "value": ValueClip(clip_value=0.25),
    "observe": ObserveClip(),
    "guard": GuardClip(),
    "agc": {"a": AGCClip(), "b": AGCClip(clip_factor=1e-4)},
    "tensors": NormClip(max_norm=1.0, scope="tensor"),
    "schedule": NormClip(max_norm=Schedule(points=((0, 1.0), (4, 0.5)), shape="linear")),
    "skips": NormClip(max_norm=inf, skip_above=4.0),
    "skips above tensors": NormClip(max_norm=1.0, scope="tensor", skip_above=4.0),
    "patterns": {"a": 1.0, "b": ValueClip(clip_value=0.25)},
    "value first": {"a": ValueClip(clip_value=5.0), "b": 1.0},
    "to zero": {"a": ValueClip(clip_value=0.0), "b": 1.0},
    "adaptive": {"a": ZScoreClip(cap=0.5), "b": EMAClip(warmup_max_norm=0.1)},
    "quantile": QuantileClip(warmup=0, cap=0.5, on_spike="skip"),
    "orders": {"a": NormClip(max_norm=1.0, norm_type=1.0), "b": NormClip(max_norm=0.5)},
}


@contextmanager
def unseen():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foreach, "_on_cpu", lambda batch: False)
        patch.setattr(flags, "host_waits_for", lambda device: True)
        patch.setattr(SkipCounter, "record", lambda self, *flags, expected: False)
        yield


def test_nothing_is_read_and_no_devices_are_mixed():
    """A device without memory raises where the host reads, or a tensor of another device comes."""
    assert alone(fake_device.main) == []


def clipped(gradients, policy, nonfinite, dtype, grad_scale, backend="foreach"):
    pairs = []
    for name, values in zip("ab", gradients, strict=True):
        weight = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
        weight.grad = torch.tensor(values, dtype=dtype)
        pairs.append((name, weight))
    clipper = GradientClipper(pairs, policy, nonfinite=nonfinite, backend=backend)
    result = clipper.clip(grad_scale)
    return [weight.grad for _, weight in pairs], result


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])  # with every policy and gradients
@pairwise(
    gradients=GRADIENTS,
    policy=POLICIES,
    dtype=[torch.float32, torch.float64, torch.bfloat16],
    backend=["foreach", "triton"],
)
def test_it_answers_as_the_path_that_looks(gradients, policy, nonfinite, dtype, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    for grad_scale in (None, 4.0):
        with unseen():
            unlooked, result = clipped(gradients, policy, nonfinite, dtype, grad_scale, backend)
        looked, expected = clipped(gradients, policy, nonfinite, dtype, grad_scale)
        # Triton's interpreter cuts bfloat16 off where a GPU rounds it.
        cut = backend == "triton" and dtype is torch.bfloat16
        rtol = torch.finfo(dtype).eps if cut else 1e-6
        check_equal(unlooked, result.to_host(), looked, expected.to_host(), rtol)


def check_equal(unlooked, ours, looked, wanted, rtol):
    for gradient, other in zip(unlooked, looked, strict=True):
        torch.testing.assert_close(gradient, other, rtol=rtol, atol=0, equal_nan=True)
    assert (ours.skipped, ours.nonfinite) == (wanted.skipped, wanted.nonfinite)
    if not wanted.nonfinite:
        assert ours.clipped == wanted.clipped
    for name in ("norm_pre", "norm_post", "coefficient", "threshold"):
        assert getattr(ours, name) == pytest.approx(getattr(wanted, name), rel=1e-6, nan_ok=True)
