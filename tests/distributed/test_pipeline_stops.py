"""The trainer on several processes ends on all of them at once, and is refused on all of them."""

import signal

import pytest
import torch
from test_pipeline import Run, checkpoints, train

from gradclip.errors import ArgumentValueError, CheckpointError
from gradclip.pipeline.hooks import HookContext, PipelineHooks, RecordHookConfig
from processes import together


def at(step, function):
    """Hooks that call a function on the second process, in a batch."""

    def call(arg):
        if arg.global_step_id == step and arg.accelerator.process_index == 1:
            function(arg)

    hooks = PipelineHooks()
    hooks.register_hook("on_batch", HookContext.from_callable("at", after=call))
    return hooks


def asks_to_stop(rank, step):
    run = Run("DDP", max_epoch=3, hooks=[at(step, lambda arg: arg.request_stop())])
    run.trainer()
    return run.trainer.trainer_progress_state


@pytest.mark.parametrize(("step", "end"), [(1, 4), (5, 6)])
def test_a_stop_that_one_process_asks_for_ends_all_at_one_step(step, end):
    """One optimizer step later, and at once where an epoch ends."""
    first, second = together(asks_to_stop, 2, step)
    assert first == second
    assert (first.global_step_id, first.micro_step_id) == (end, 0)


def is_terminated(rank, root):
    send = at(1, lambda arg: signal.raise_signal(signal.SIGTERM))
    run = Run(
        "FSDP2",
        dropout=0.3,
        max_epoch=3,
        hooks=[send, checkpoints(root, save_epoch_freq=9, save_when_loop_end=False)],
        resume_from="auto",
    )
    with pytest.raises(SystemExit) as caught:
        run.trainer()
    return caught.value.code, run.trainer.trainer_progress_state.global_step_id


def test_a_signal_to_one_process_is_a_checkpoint_of_all(tmp_path):
    whole, said, progress = train("FSDP2", 2, dropout=0.3, max_epoch=3)
    assert together(is_terminated, 2, str(tmp_path)) == [(143, 4)] * 2
    hooks = [checkpoints(tmp_path, save_epoch_freq=9)]
    again = {"hooks": hooks, "resume_from": "auto", "seed": 7}
    found, rest, reached = train("FSDP2", 2, dropout=0.3, max_epoch=3, **again)
    assert reached == progress
    assert rest == said[2:]
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def is_refused(rank, root, record):
    hooks = [checkpoints(root)] if record is None else [RecordHookConfig(path=record)]
    with pytest.raises((ArgumentValueError, CheckpointError), match="earlier run") as caught:
        Run("DDP", max_epoch=1, hooks=hooks).trainer()
    return type(caught.value).__name__


def test_what_would_be_overwritten_is_refused_on_every_process(tmp_path):
    record = str(tmp_path / "run.jsonl")
    train("DDP", 2, max_epoch=1, hooks=[checkpoints(tmp_path), RecordHookConfig(path=record)])
    assert together(is_refused, 2, str(tmp_path), None) == ["CheckpointError"] * 2
    refused = together(is_refused, 2, str(tmp_path), record)
    assert refused == ["ArgumentValueError", "CheckpointError"]
