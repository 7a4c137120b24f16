"""The short way of a GPU answers as the ordinary way does."""

from math import inf, nan

import pytest
import torch
from fused_models import made, regain

from gradclip import GradientClipper, GuardClip, NormClip, ObserveClip, ValueClip
from gradclip.clipping.short.results import FusedResult
from gradclip.errors import NonFiniteGradientError, TooManySkipsError
from pairwise import pairwise

pytest.importorskip("gradclip.clipping.kernels.triton_fused")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


POLICIES = {
    "skip above": NormClip(max_norm=1.0, skip_above=10.0),
    "guard": GuardClip(),
    "skips alone": NormClip(max_norm=inf, skip_above=2.0),
    "one pattern skips": {"w0": NormClip(max_norm=1.0, skip_above=2.0), "*": 1.0},
    "norm": 1.0,
    "within": 1e9,
    "zero": 0.0,
    "unbounded": inf,
    "p = inf": NormClip(max_norm=1.0, norm_type=inf),
    "p = 1": NormClip(max_norm=1.0, norm_type=1.0),
    "observe": ObserveClip(),
    "value": ValueClip(clip_value=0.5),
    "value zero": ValueClip(clip_value=0.0),
    "value unbounded": ValueClip(clip_value=inf),
    "one pattern": {"*": 1.0},
    "two norms": {"w0": 1.0, "*": 2.0},
    "interleaved": {"w[02]": 1.0, "*": 1e9},
    "norm and observer": {"w0": 1.0, "*": ObserveClip()},
    "norm and value": {"w0": 1.0, "*": ValueClip(clip_value=0.5)},
    "two values": {"w0": ValueClip(clip_value=0.2), "*": ValueClip(clip_value=0.5)},
}
EXTREME = 2.0**-640
"""Norms that are divided by it have no squares in float64."""
SPIKES = {"finite": 0.0, "nan": nan, "inf": inf}


class Limits(list):
    """Notes what each step was held against."""

    def add(self, numbers):
        self.append(numbers.threshold)


def second_clip(policy, nonfinite, spike, grad_scale, backend):
    """Clip twice: the second time takes the short way, if there is one."""
    pairs = made()
    clipper = GradientClipper(pairs, policy, nonfinite=nonfinite, backend=backend)
    limits = Limits()
    clipper.step_log.follow(limits)
    clipper.clip(grad_scale)
    regain(pairs, seed=1, spike=spike)
    try:
        result = clipper.clip(grad_scale)
    except NonFiniteGradientError as error:
        result, said = None, str(error)
    else:
        said = result.to_host()
    counted = repr(clipper.stats), repr(limits)
    return result, said, [weight.grad for _, weight in pairs], counted


def numbers(stats):
    if isinstance(stats, str):
        return stats
    flags_of = stats.clipped, stats.skipped, stats.nonfinite, stats.skip_reason, stats.scope_names
    values = stats.norm_pre, stats.norm_post, stats.threshold, stats.coefficient, *stats.norms_S
    near = [pytest.approx(value, rel=1e-6, nan_ok=True) for value in values]
    return flags_of, near, {name: numbers(each) for name, each in stats.groups.items()}


@pairwise(
    policy=POLICIES,
    nonfinite=["skip", "propagate", "raise"],
    spike=SPIKES,
    grad_scale=[None, 4.0, EXTREME],
)
def test_it_answers_as_the_ordinary_way(policy, nonfinite, spike, grad_scale):
    result, ours, gradients, stats = second_clip(policy, nonfinite, spike, grad_scale, "triton")
    _, wanted, theirs, counted = second_clip(policy, nonfinite, spike, grad_scale, "reference")
    policies = list(policy.values()) if isinstance(policy, dict) else [policy]
    clamps = [each for each in policies if isinstance(each, ValueClip) and each.clip_value < inf]
    first = nonfinite == "raise" or (isinstance(policy, dict) and nonfinite == "propagate")
    ordinary = bool(clamps) and (grad_scale is not None or first)
    ordinary |= grad_scale == EXTREME
    assert result is None or isinstance(result, FusedResult) is not ordinary
    assert numbers(ours) == numbers(wanted)
    assert stats == counted
    for ours_T, theirs_T in zip(gradients, theirs, strict=True):
        # Triton's interpreter cuts half precision off where a GPU rounds it.
        rtol = 2e-6 if ours_T.dtype is torch.float32 else torch.finfo(ours_T.dtype).eps
        torch.testing.assert_close(ours_T, theirs_T, rtol=rtol, atol=0, equal_nan=True)


def test_too_many_skips_of_a_policy_are_called_so():
    pairs = made()
    clipper = GradientClipper(
        pairs, NormClip(max_norm=1.0, skip_above=10.0), backend="triton", max_consecutive_skips=1
    )
    clipper.clip()
    regain(pairs, seed=1)
    with pytest.raises(TooManySkipsError, match="The policy asked to skip step 1"):
        clipper.clip()
