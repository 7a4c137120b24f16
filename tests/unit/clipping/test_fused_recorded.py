"""A record on the short way of a GPU: its numbers, and what a device does for it."""

import sys
from math import nan

import pytest
from fused_models import made, regain
from test_fused import launched, operations  # noqa: F401 - a fixture

from gradclip import GradientClipper, GuardClip, NormClip, ObserveClip, ValueClip
from gradclip.clipping.short.results import FusedResult
from gradclip.diagnostics import read_norms, read_record
from gradclip.record.ring import FIRST

pytest.importorskip("gradclip.clipping.kernels.triton_fused")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

POLICIES = {
    "norm": 1.0,
    "inf": NormClip(max_norm=0.5, norm_type=float("inf")),
    "observe": ObserveClip(),
    "value": ValueClip(clip_value=0.5),
    "guard": GuardClip(),
    "skips": NormClip(max_norm=1.0, skip_above=30.0),
    "patterns": {"w0": 1.0, "w1": ValueClip(clip_value=0.5), "*": 3.0},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("scale", [None, 4.0])
def test_a_record_says_what_the_results_say(policy, scale, tmp_path):
    pairs, results, norms = made(), [], []
    clipper = GradientClipper(pairs, POLICIES[policy], backend="triton", record=tmp_path)
    order = float("inf") if policy == "inf" else 2.0
    for seed, spike in enumerate((0.0, 50.0, nan, 0.0, 9.0)):
        regain(pairs, seed=seed, spike=spike)
        if seed == 3:
            pairs[2][1].grad = None
        grads = [weight.grad for _, weight in pairs]
        norms.append([0.0 if g is None else float(g.double().norm(order)) for g in grads])
        results.append(clipper.clip(scale))
    clipper.close()
    fused = [isinstance(each, FusedResult) for each in results]
    assert any(fused) or (policy, scale) != ("norm", None)
    for record, result in zip(read_record(tmp_path), results, strict=True):
        stats = result.to_host()
        assert record.reason == stats.skip_reason
        for found, wanted in (
            (record, stats),
            *((record.groups[n], g) for n, g in stats.groups.items()),
        ):
            for name in (
                "norm_pre",
                "norm_post",
                "threshold",
                "coefficient",
                "clipped",
                "nonfinite",
            ):
                value = getattr(wanted, name)
                assert getattr(found, name) == pytest.approx(value, rel=1e-5, nan_ok=True), name
    for found, wanted in zip(read_norms(tmp_path).norms, norms, strict=True):
        expected = [norm / (scale or 1.0) for norm in wanted]
        assert list(found) == pytest.approx(expected, rel=5e-3, nan_ok=True)


def test_a_device_does_nothing_more_at_a_step(launched, tmp_path):  # noqa: F811
    found = {}
    for folder in (None, tmp_path):
        clipper = GradientClipper(made(), 1.0, backend="triton", record=folder)
        for _ in range(3):
            clipper.clip()
        found[folder] = [
            [each for each in operations(launched, clipper.clip) if each != "unsqueeze"]
            for _ in range(FIRST + 2)
        ]
        assert isinstance(clipper.last, FusedResult)
    plain, recorded = found.values()
    more = [step + 3 for step in range(len(plain)) if recorded[step] != plain[step]]
    assert more == [FIRST - 1]
    together = recorded[FIRST - 4]  # all steps up to here: copied, and read some steps later
    assert {"item", "_local_scalar_dense"}.isdisjoint(together)


def test_a_step_makes_few_calls_of_python_more(launched, tmp_path):  # noqa: F811
    calls = []
    for folder in (None, tmp_path):
        clipper = GradientClipper(made(), 1.0, backend="triton", record=folder)
        for _ in range(3):
            clipper.clip()
        called = []
        sys.setprofile(lambda frame, event, _: event == "call" and called.append(frame))  # noqa: B023
        try:
            clipper.clip()
        finally:
            sys.setprofile(None)
        calls.append(len(called))
    assert calls[1] - calls[0] <= 40
