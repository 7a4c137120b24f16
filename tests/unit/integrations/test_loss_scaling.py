"""Unscaled once and never twice; an overflow is the loss scaler's while its scale can fall."""

import pytest
import torch

from gradclip.integrations.loss_scaling import OverflowWatch, Unscaling, begin_anew


def scaled(gradient=8.0, scale=4.0):
    """Return a scaler in use, an optimizer, and a parameter with a scaled gradient."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    weight = torch.nn.Parameter(torch.zeros(1))
    scaler.scale(weight.sum())
    weight.grad = torch.tensor([gradient])
    return scaler, torch.optim.SGD([weight], lr=1.0), weight


def test_it_unscales_each_step_once():
    scaler, optimizer, weight = scaled()
    unscale = Unscaling()
    for step in range(2):
        weight.grad = torch.tensor([8.0])
        unscale(scaler, optimizer)
        assert weight.grad.item() == 2.0
        scaler.step(optimizer)
        scaler.update()
        assert weight.item() == -2.0 * (step + 1)


def test_what_the_loop_unscaled_stays():
    scaler, optimizer, weight = scaled()
    scaler.unscale_(optimizer)
    Unscaling()(scaler, optimizer)
    assert weight.grad.item() == 2.0


def test_what_was_added_after_a_dropped_step_is_not_taken_for_unscaled():
    scaler, optimizer, weight = scaled()
    unscale = Unscaling()
    unscale(scaler, optimizer)
    weight.grad = torch.tensor([8.0])
    with pytest.raises(RuntimeError, match="already been called"):
        unscale(scaler, optimizer)


def test_each_optimizer_of_one_scaler_is_told_apart():
    scaler, optimizer, _ = scaled()
    _, other, weight = scaled()
    unscale = Unscaling()
    unscale(scaler, optimizer)
    scaler.unscale_(other)
    unscale(scaler, other)
    assert weight.grad.item() == 2.0


def test_other_errors_of_the_scaler_pass():
    scaler, optimizer, _ = scaled()
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="after step"):
        Unscaling()(scaler, optimizer)


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu", enabled=False)])
def test_without_a_scaler_nothing_happens(scaler):
    _, optimizer, weight = scaled()
    Unscaling()(scaler, optimizer)
    assert weight.grad.item() == 8.0
    assert not OverflowWatch().expects(scaler)


class Scaler:
    """Counts how often its scale is read."""

    def __init__(self, scale):
        self.scale, self.reads = scale, 0

    def is_enabled(self):
        return True

    def get_scale(self):
        self.reads += 1
        return self.scale


def test_the_scale_is_read_after_a_skip_alone():
    scaler, watch = Scaler(2.0), OverflowWatch()
    for skipped, reads in ((False, 0), (True, 0), (False, 1), (False, 1)):
        assert watch.expects(scaler)
        assert scaler.reads == reads
        watch.settle(skipped)


def test_at_the_smallest_scale_an_overflow_is_not_the_scalers():
    scaler, watch = Scaler(2.0), OverflowWatch()
    assert watch.expects(scaler)
    watch.settle(skipped=True)
    scaler.scale = 1.0
    assert not watch.expects(scaler)
    watch.settle(skipped=True)
    scaler.scale = 2.0  # it grew
    assert watch.expects(scaler)


def test_a_step_that_was_made_lets_the_scale_grow():
    scaler, watch = Scaler(1.0), OverflowWatch()
    for _ in range(2):
        watch.expects(scaler)
        watch.settle(skipped=True)
    watch.expects(scaler)
    watch.settle(skipped=False)
    assert watch.expects(scaler)


def test_a_flag_of_the_cpu_is_read_at_once():
    """As results by pattern have it."""
    scaler, watch = Scaler(1.0), OverflowWatch()
    watch.expects(scaler)
    watch.settle(torch.tensor(True))
    assert not watch.expects(scaler)


def test_a_step_that_nobody_told_of_counts_as_one_not_made():
    scaler, watch = Scaler(1.0), OverflowWatch()
    assert watch.expects(scaler)
    assert not watch.expects(scaler)


class Lookahead(torch.optim.Optimizer):
    """Steps another optimizer, whose parameters it shares."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})

    def step(self, closure=None):
        self.optimizer.step(closure)


def test_an_optimizer_with_one_of_its_own_is_unscaled_as_the_scaler_steps_it():
    scaler, optimizer, weight = scaled()
    outer = Lookahead(optimizer)
    Unscaling()(scaler, outer)
    scaler.step(outer)
    assert weight.item() == -2.0


def test_a_step_that_was_broken_off_can_be_forgotten():
    scaler, optimizer, weight = scaled()
    unscale = Unscaling()
    unscale(scaler, optimizer)
    begin_anew(scaler)
    begin_anew(None)
    weight.grad = torch.tensor([8.0])
    unscale(scaler, optimizer)
    assert weight.grad.item() == 2.0
    assert scaler.get_scale() == 4.0
    assert scaler.state_dict()["_growth_tracker"] == 0
    scaler.step(optimizer)
    scaler.update()
    begin_anew(scaler)  # there is nothing to forget
    assert scaler.state_dict()["_growth_tracker"] == 1
