import io
import sys

import pytest
import torch
from rich.console import Console

from gradclip.errors import MissingDependencyError
from gradclip.pipeline.hooks import (
    GradientClippingHookConfig,
    OptimizerHook,
    PipelineHookArgs,
    PipelineHooks,
    ProgressHookConfig,
)
from gradclip.pipeline.hooks import progress as progress_module


def train(linear, monkeypatch, gradients, *, enabled=True, seconds_per_step=1.0, terminal=True):
    """Run a loop on a clock of its own; return what was drawn, and how often."""
    clock = [0.0]
    monkeypatch.setattr(progress_module, "monotonic", lambda: clock[0])
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120, color_system=None)
    bar = ProgressHookConfig(enabled=enabled)(console=console)
    draws, draw = [], bar._draw
    monkeypatch.setattr(bar, "_draw", lambda *args: draws.append(1) or draw(*args))
    layer = linear([0.0, 0.0])
    clip = GradientClippingHookConfig(clip_mode="norm", max_norm=1.0)
    hooks = PipelineHooks.from_hooks([bar, clip, OptimizerHook()])
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    arg = PipelineHookArgs(model=layer, optimizer=optimizer, max_step=len(gradients))
    loop_arg = arg.copy_with_updates()
    with hooks.begin("on_loop", loop_arg):
        for number, gradient in enumerate(gradients):
            clock[0] += seconds_per_step
            step_arg = arg.copy_with_updates(global_step_id=number)
            with hooks.begin("on_step", step_arg):
                layer.weight.grad = torch.tensor([gradient])
                step_arg.reduce_loss = torch.tensor(2.5, requires_grad=True)
            loop_arg.global_step_id = number + 1
    return file.getvalue(), len(draws)


@pytest.mark.smoke
def test_it_shows_step_loss_norm_and_share_clipped(linear, monkeypatch):
    text, _ = train(linear, monkeypatch, [[3.0, 4.0], [0.0, 0.5], [0.0, 0.5], [30.0, 40.0]])
    last = [line for line in text.replace("\r", "\n").splitlines() if "4/4" in line][-1]
    assert "norm 50" in last
    assert "clipped 50 %" in last
    assert "loss 2.5" in last


def test_it_draws_at_most_ten_times_a_second(linear, monkeypatch):
    _, draws = train(linear, monkeypatch, [[3.0, 4.0]] * 50, seconds_per_step=0.0501)
    assert 24 <= draws <= 27


def test_between_two_drawings_nothing_is_read(linear, monkeypatch):
    """The count of clipped steps must still be exact."""
    gradients = [[3.0, 4.0], [0.0, 0.1], [0.0, 0.1], [0.0, 0.1]] * 5
    text, draws = train(linear, monkeypatch, gradients, seconds_per_step=0.001)
    assert draws == 1
    assert "clipped 25 %" in text


def test_it_is_off_where_there_is_no_terminal_unless_it_is_told(linear, monkeypatch):
    gradients = [[3.0, 4.0]]
    assert train(linear, monkeypatch, gradients, enabled=None, terminal=False) == ("", 0)
    assert train(linear, monkeypatch, gradients, enabled=False) == ("", 0)
    assert "1/1" in train(linear, monkeypatch, gradients, enabled=None)[0]


def test_the_total_is_the_nearer_limit():
    batches = [0] * 10
    for fields, total in (
        ({"max_step": 7}, 7),
        ({"max_epoch": 2, "dataloader": batches}, 20),
        ({"max_epoch": 2, "max_step": 50, "dataloader": batches}, 20),
        ({"max_epoch": 2, "dataloader": iter(batches)}, None),
    ):
        assert progress_module._total(PipelineHookArgs(**fields)) == total


def test_the_bar_is_taken_down_after_an_error(linear):
    console = Console(file=io.StringIO(), force_terminal=True)
    bar = ProgressHookConfig()(console=console)
    with pytest.raises(KeyError), bar.begin("on_loop", PipelineHookArgs()):
        raise KeyError
    assert bar._bar is None


def test_a_missing_rich_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(MissingDependencyError, match=r"gradclip\[cli\]"):
        ProgressHookConfig()()
