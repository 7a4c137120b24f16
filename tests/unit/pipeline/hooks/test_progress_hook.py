import io
import sys

import pytest
import torch
from pydantic import ValidationError
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


def train(
    linear, monkeypatch, gradients, *, enabled=None, seconds_per_step=1.0, terminal=True, **fields
):
    """Run a loop on a clock of its own; return what was drawn, and how often."""
    clock = [0.0]
    monkeypatch.setattr(progress_module, "monotonic", lambda: clock[0])
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120, color_system=None)
    bar = ProgressHookConfig(enabled=enabled, **fields)(console=console)
    draws, draw = [], bar._show
    monkeypatch.setattr(bar, "_show", lambda *args: draws.append(1) or draw(*args))
    layer = linear([0.0, 0.0])
    clip = GradientClippingHookConfig(clip_mode="norm", max_norm=1.0)
    hooks = PipelineHooks.from_hooks([clip, OptimizerHook(), bar])
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


@pytest.mark.parametrize("enabled", [None, True])
def test_it_writes_lines_where_there_is_no_terminal(linear, monkeypatch, enabled):
    gradients = [[3.0, 4.0], [0.0, 0.5]] * 50
    text, _ = train(
        linear, monkeypatch, gradients, enabled=enabled, terminal=False, seconds_per_step=0.9
    )
    # The first step, then one after every 30 seconds, and the end.
    assert text.splitlines() == [
        "training 1/100  loss 2.5  norm 5  clipped 100 %  0:01:29 left",
        "training 35/100  loss 2.5  norm 5  clipped 51 %  0:00:58 left",
        "training 69/100  loss 2.5  norm 5  clipped 51 %  0:00:28 left",
        "training 100/100  loss 2.5  norm 0.5  clipped 50 %",
    ]


def test_the_time_between_lines_can_be_chosen(linear, monkeypatch):
    text, _ = train(
        linear,
        monkeypatch,
        [[3.0, 4.0]] * 5,
        terminal=False,
        seconds_per_line=2,
        seconds_per_step=1,
    )
    assert [line.split()[1] for line in text.splitlines()] == ["1/5", "3/5", "5/5"]
    with pytest.raises(ValidationError):
        ProgressHookConfig(seconds_per_line=0)


@pytest.mark.parametrize("terminal", [True, False])
def test_it_is_silent_if_it_is_told(linear, monkeypatch, terminal):
    assert train(linear, monkeypatch, [[3.0, 4.0]], enabled=False, terminal=terminal) == ("", 0)


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
    assert bar._display is None


def test_a_missing_rich_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(MissingDependencyError, match=r"gradclip\[cli\]"):
        ProgressHookConfig()()
