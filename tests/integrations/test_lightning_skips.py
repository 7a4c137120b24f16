"""Lightning's Trainer: no step on a NaN, with a loss scaler or without, fused or not."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning_runs import (
    BATCHES,
    CLOSE,
    LIMIT,
    QUIET,
    SAME,
    Keep,
    Net,
    adamw,
    fit,
    fused_adamw,
    fused_momentum,
    half,
    momentum,
    same,
    steps,
    weights,
    zeros_for_none,
)

from gradclip.errors import NonFiniteGradientError, TooManySkipsError
from gradclip.integrations.lightning import GradientClippingCallback
from pairwise import pairwise

pytestmark = QUIET


# Fused optimizers under a loss scaler: Lightning#15501, #21435.


def test_lightning_refuses_a_fused_optimizer_under_a_scaler():
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(Net(fused_adamw), plugins=[half()], gradient_clip_val=LIMIT)


@pytest.mark.parametrize(("fused", "plain"), [(fused_adamw, adamw), (fused_momentum, momentum)])
def test_a_fused_optimizer_under_a_scaler_ends_where_a_plain_one_clipped_by_lightning_does(
    fused, plain
):
    ours, reference = Net(fused), Net(plain)
    clipping = GradientClippingCallback(LIMIT)
    keep = Keep(clipping)
    fit(ours, clipping, keep, plugins=[half()])
    fit(reference, plugins=[half()], gradient_clip_val=LIMIT)
    assert ours.losses == pytest.approx(reference.losses, **CLOSE)
    torch.testing.assert_close(weights(ours), weights(reference), **SAME)
    # Unscaled: 1024 times as much would be there otherwise.
    assert all(LIMIT < each.norm_pre < 100 and each.clipped for each in keep.results)


@pytest.mark.parametrize("make", [adamw, fused_adamw, momentum, fused_momentum])
@pytest.mark.parametrize("when", [0, 3])
def test_an_overflow_skips_the_step_and_halves_the_scale(make, when):
    """A clipped zero must not hide the infinity from the scaler, which would step and not halve."""
    plugin = half()
    clipping = GradientClippingCallback(LIMIT, max_consecutive_skips=0)  # it is the scaler's affair
    keep = Keep(clipping)
    fit(Net(make, broken={when: torch.inf}), clipping, keep, plugins=[plugin])
    assert [each.skipped for each in keep.results] == [n == when for n in range(BATCHES)]
    unchanged = [
        same(before[0], after[0]) for before, after in zip(keep.before, keep.after, strict=True)
    ]
    assert unchanged == [n == when for n in range(BATCHES)]
    assert same(steps(keep.before[when]), steps(keep.after[when]))
    assert plugin.scaler.get_scale() == 512.0
    assert all(torch.isfinite(each).all() for each in keep.after[-1][0].values())


def test_overflows_count_once_the_scale_cannot_fall():
    broken = dict.fromkeys(range(BATCHES), torch.inf)
    clipping = GradientClippingCallback(LIMIT, max_consecutive_skips=1)
    keep = Keep(clipping)
    with pytest.raises(TooManySkipsError, match="max_consecutive_skips=1"):
        fit(Net(fused_adamw, broken=broken), clipping, keep, plugins=[half(scale=4.0)])
    # At 4 and 2 the scaler answers; of the next two, at 1, the second is one too many.
    assert len(keep.results) == 3


class Absent(Net):
    """Has no loss for some batches."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx in (1, 3) else super().training_step(batch)


@pytest.mark.parametrize("make", [adamw, fused_adamw])
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`")
def test_a_batch_without_a_loss_is_no_step_under_a_scaler(make, window):
    model, clipping = Absent(make), GradientClippingCallback(LIMIT)
    keep = Keep(clipping)
    fit(model, clipping, keep, plugins=[half()], accumulate_grad_batches=window)
    stepped = [
        not same(before[0], after[0]) for before, after in zip(keep.before, keep.after, strict=True)
    ]
    wanted = (0, 2, 4, 5, 6, 7) if window == 1 else (5, 7)
    assert stepped == [n in wanted for n in range(BATCHES)]
    assert clipping.clippers[0].step == len(wanted)


# Skipped steps.


def test_lightning_spreads_a_nan_to_all_weights():
    model = Net(broken={3: torch.nan})
    fit(model, gradient_clip_val=LIMIT)
    assert all(each.isnan().all() for each in weights(model).values())


@pairwise(
    make=[adamw, fused_adamw, momentum, fused_momentum, zeros_for_none],
    value=[torch.nan, -torch.inf],
    when=[0, 3],
)
def test_a_nan_changes_neither_weights_nor_moments(make, value, when):
    model, clipping = Net(make, broken={when: value}), GradientClippingCallback(LIMIT)
    keep = Keep(clipping)
    fit(model, clipping, keep)
    assert [each.skipped for each in keep.results] == [n == when for n in range(BATCHES)]
    for number, (before, after) in enumerate(zip(keep.before, keep.after, strict=True)):
        assert same(before[0], after[0]) == (number == when)
        assert same(before[1], after[1]) == (number == when)


class GivenBack(Callback):
    """Counts the batches after which nothing withholds what comes next."""

    batches = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += getattr(trainer.optimizers[0], "found_inf", None) is None


@pytest.mark.parametrize("plugins", [[], [half()]], ids=["float32", "scaler"])
def test_where_no_verdict_is_read_a_fused_step_is_withheld_on_the_device(monkeypatch, plugins):
    """As on a GPU: verdicts stay tensors, and found_inf tells the optimizer, and is taken back."""
    from gradclip.clipping import flags  # noqa: PLC0415
    from gradclip.clipping.kernels import foreach  # noqa: PLC0415
    from gradclip.clipping.step.nonfinite import SkipCounter  # noqa: PLC0415
    from gradclip.integrations.loss_scaling import OverflowWatch  # noqa: PLC0415

    monkeypatch.setattr(foreach, "_on_cpu", lambda batch: False)
    monkeypatch.setattr(flags, "host_waits_for", lambda device: True)
    monkeypatch.setattr(SkipCounter, "record", lambda self, *flags, expected: False)
    monkeypatch.setattr(OverflowWatch, "settle", lambda self, skipped: None)
    clipping = GradientClippingCallback(LIMIT)
    keep = Keep(clipping)
    given_back = GivenBack()
    fit(Net(fused_adamw, broken={3: torch.nan}), clipping, keep, given_back, plugins=plugins)
    assert isinstance(clipping.last.withheld, torch.Tensor)
    assert [each.skipped for each in keep.results] == [n == 3 for n in range(BATCHES)]
    for number, (before, after) in enumerate(zip(keep.before, keep.after, strict=True)):
        assert same(before, after) == (number == 3)
    assert given_back.batches == BATCHES


def test_a_nan_raises_where_it_is_asked_to():
    model = Net(broken={2: torch.nan})
    clipping = GradientClippingCallback(LIMIT, nonfinite="raise")
    keep = Keep(clipping)
    with pytest.raises(NonFiniteGradientError, match=r"up\.weight .* NaN: 1 .*Inf: 0"):
        fit(model, clipping, keep)
    assert same(weights(model), keep.before[-1][0])
    assert len(keep.before) == 3


def test_too_many_skips_raise():
    broken = dict.fromkeys(range(2, BATCHES), torch.nan)
    clipping = GradientClippingCallback(LIMIT, max_consecutive_skips=2)
    keep = Keep(clipping)
    with pytest.raises(TooManySkipsError, match="max_consecutive_skips=2"):
        fit(Net(broken=broken), clipping, keep)
    assert len(keep.results) == 4
