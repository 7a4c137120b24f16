"""One call is right on every layout: the norm and the gradients of one process."""

import math
from typing import Any

import layouts
import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

import oracle
from gradclip import GradientClipper, NormClip, ObserveClip, ValueClip
from gradclip.errors import NonFiniteGradientError
from pairwise import ALL_COMBINATIONS
from processes import together

ALL = {"one_process": 1, **dict.fromkeys(layouts.TWO, 2), **dict.fromkeys(layouts.FOUR, 4)}
POLICIES = {
    "norm 1": NormClip(max_norm=3.0, norm_type=1),
    "norm 2": NormClip(max_norm=1.5),
    "norm 2, above": NormClip(max_norm=1e6),
    "norm 3": NormClip(max_norm=0.5, norm_type=3),
    "norm inf": NormClip(max_norm=0.25, norm_type=math.inf),
    "observe": ObserveClip(),
    "value": ValueClip(clip_value=0.4),
    "value, above": ValueClip(clip_value=1e6),
}


def values_of(held: layouts.Held, seed: int) -> dict[str, torch.Tensor]:
    return {name: layouts.full(name, shape, seed) for name, shape in held.shapes.items()}


def expected(policy: Any, values: dict[str, torch.Tensor]) -> tuple[float, float]:
    """The norm and the coefficient of one process."""
    norm = oracle.norm(values.values(), policy.order)
    limit = policy.max_norm if isinstance(policy, NormClip) else math.inf
    return norm, min(1.0, limit / norm)


def go_through(rank: int, build: str) -> dict[str, Any]:
    held = getattr(layouts, build)(rank)
    said: dict[str, Any] = {}
    for name, policy in POLICIES.items():
        clipper = GradientClipper(held.source, policy, **held.options)
        for step in range(3 if ALL_COMBINATIONS else 2):
            values = values_of(held, step)
            held.fill(values)
            with CommDebugMode() as counted:
                result = clipper.clip()
            calls = sum(counted.get_comm_counts().values())
            norm, coefficient = expected(policy, values)
            where = f"{build}, {name}, step {step}: {result}"
            assert oracle.relative(result.norm_pre, norm) < 1e-6, where
            assert oracle.relative(result.coefficient, coefficient) < 1e-5, where
            assert not result.skipped
            for key, after in held.read().items() if step else ():  # it takes collectives
                wanted = values[key] * coefficient
                if isinstance(policy, ValueClip):
                    wanted = values[key].clamp(-policy.clip_value, policy.clip_value)
                torch.testing.assert_close(after, wanted, rtol=1e-5, atol=1e-7, msg=where)
            limit = getattr(policy, "clip_value", math.inf)
            clamped = {k: v.clamp(-limit, limit) for k, v in values.items()}
            left = (
                oracle.norm(clamped.values())
                if isinstance(policy, ValueClip)
                else norm * coefficient
            )
            assert oracle.relative(result.norm_post, left) < 1e-5, where
            assert bool(result.clipped) == (left < norm * (1 - 1e-6)), where
            maxima = policy.order not in (1.0, 2.0)
            if step and build != "partial":  # the first step agrees on Partial gradients
                assert calls == held.dimensions * (2 if maxima else 1), (where, calls)
            said[f"{name} {step}"] = (
                result.norm_pre.item().hex(),
                result.coefficient.item().hex(),
                result.norm_post.item().hex(),
                bool(result.clipped),
            )
    said.update(not_finite(rank, held))
    return said


def not_finite(rank: int, held: layouts.Held) -> dict[str, Any]:
    """Put a NaN or an infinity into one place, which is on one rank alone if it is sharded."""
    said: dict[str, Any] = {}
    key = "block.weight" if "block.weight" in held.shapes else "layers.0.weight"
    for bad in (math.nan, math.inf):
        for policy in (
            NormClip(max_norm=1.0),
            NormClip(max_norm=1.0, norm_type=math.inf),
            NormClip(max_norm=1.0, norm_type=1.5),
            ValueClip(clip_value=0.4),
        ):
            values = values_of(held, 5)
            values[key][-1, -1] = bad
            held.fill(values)
            skipping = GradientClipper(held.source, policy, **held.options)
            result = skipping.clip()
            passes = isinstance(policy, ValueClip) and bad == math.inf
            assert bool(result.skipped) is not passes, (policy, bad, result)
            if not passes:
                assert all(float(after.abs().max()) == 0 for after in held.read().values())
                assert int(result.nonfinite) >= 1
            held.fill(values)
            raising = GradientClipper(held.source, policy, nonfinite="raise", **held.options)
            if passes:
                raising.clip()
                continue
            at_fault = key.replace(".", "[._]") + " |_flat_param "
            with pytest.raises(NonFiniteGradientError, match=at_fault):
                raising.clip()
            said[f"{policy} {bad}"] = int(result.nonfinite)
            for name, after in held.read().items():
                assert torch.equal(after.nan_to_num(7.0), values[name].nan_to_num(7.0))
    return said


@pytest.mark.parametrize("layout", ALL)
def test_every_policy_on_every_layout(layout):
    said = together(go_through, ALL[layout], layout)
    assert all(each == said[0] for each in said)
