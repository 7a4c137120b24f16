"""transformers.Trainer on two processes: under DDP it clips; DeepSpeed is lowered and observed."""

import importlib.util

import pytest
import torch
from transformers_ranks import RANKS, STEPS, Broken, Ordered, lowered, on_ddp, refusals, trainer_for
from transformers_runs import LIMIT

from processes import together

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="make test-integrations installs it"
)


def on_two(function, *args):
    """Run a function on two ranks, and return what it returned: the same on both."""
    first, second = together(function, RANKS, *args, env={"DS_ACCELERATOR": "cpu"})
    assert repr(first) == repr(second)
    return first


def by_one(folder):
    trainer, keep = trainer_for(Ordered, folder)
    trainer.train()
    return trainer, keep


def check_equal(results, weights, logged, folder):
    trainer, keep = by_one(folder)
    wanted = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(results) == len(keep.results) == STEPS
    for have, want in zip(results, keep.results, strict=True):
        assert have.norm_pre == pytest.approx(float(want.norm_pre), rel=1e-5)
        assert have.norm_post == pytest.approx(float(want.norm_post), rel=3e-5)
        assert have.clipped
    for have, want in zip(weights, keep.weights, strict=True):
        for name, weight in want.items():
            torch.testing.assert_close(have[name], weight, rtol=1e-5, atol=1e-6)
    for have, want in zip(logged, wanted, strict=True):
        for name in ("loss", "grad_norm", "gradclip/norm_pre", "gradclip/clip_fraction"):
            assert have[name] == pytest.approx(want[name], rel=1e-5)


def test_two_ranks_of_ddp_end_where_one_process_ends(tmp_path):
    results, weights, _, logged = on_two(on_ddp, str(tmp_path))
    check_equal(results, weights, logged, tmp_path)


@needs_deepspeed
def test_deepspeed_is_lowered_and_observed(tmp_path):
    settings = [("auto", 0.0), (None, LIMIT)]
    for results, weights, _, logged in on_two(lowered, str(tmp_path), Ordered, settings):
        check_equal(results, weights, logged, tmp_path)


@needs_deepspeed
def test_deepspeed_skips_a_nan_and_the_callback_says_so(tmp_path):
    ((results, weights, rates, logged),) = on_two(lowered, str(tmp_path), Broken, [("auto", 0.0)])

    assert [result.skipped for result in results] == [n == 2 for n in range(STEPS)]
    assert [entry["gradclip/skipped"] for entry in logged] == [int(n == 2) for n in range(STEPS)]
    for name, weight in weights[2].items():
        assert torch.equal(weight, weights[1][name])
        assert not torch.equal(weight, weights[3][name])
    assert rates[0] > rates[1] == rates[2] > rates[3]


@needs_deepspeed
def test_deepspeed_is_refused_before_the_first_step(tmp_path):
    absent, other, by_value, by_name, propagate, alone = on_two(refusals, str(tmp_path))

    assert "DeepSpeed  gradient_clipping = 1.0\n" in absent
    assert "DeepSpeed  gradient_clipping = 0.25\n" in other
    for text in (absent, other):
        assert "gradclip   max_norm          = 0.5\n" in text
    assert "ValueClip" in by_value
    assert "none by name" in by_name
    assert 'nonfinite = "propagate"' in propagate
    assert "class ClippedTrainer(ClippingTrainerMixin, Trainer): pass" in alone
    for text in (absent, other, by_value, by_name, propagate, alone):
        assert text.endswith("No parameters were changed.")
