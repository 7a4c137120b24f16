"""The trainer on several processes ends on all of them at once, and is refused on all of them."""

import signal

import pytest
import torch
from test_pipeline import Run, checkpoints, trained

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


def asks_to_stop(rank):
    ends = []
    for step in (1, 5):
        run = Run("DDP", max_epoch=3, hooks=[at(step, lambda arg: arg.request_stop())])
        run.trainer()
        state = run.trainer.trainer_progress_state
        ends.append((state.global_step_id, state.micro_step_id, state.optimizer_step_id))
    return ends


def test_a_stop_that_one_process_asks_for_ends_all_at_one_step():
    """One optimizer step later, and at once where an epoch ends, with batch 6."""
    assert together(asks_to_stop, 2) == [[(4, 0, 2), (6, 0, 3)]] * 2


def is_terminated_and_goes_on(rank, root):
    run = {"dropout": 0.3, "max_epoch": 3}
    whole, said, progress = trained(rank, "FSDP2", **run)
    send = at(1, lambda arg: signal.raise_signal(signal.SIGTERM))
    hooks = [send, checkpoints(root, save_epoch_freq=9, save_when_loop_end=False)]
    terminated = Run("FSDP2", hooks=hooks, resume_from="auto", **run)
    with pytest.raises(SystemExit) as caught:
        terminated.trainer()
    assert caught.value.code == 128 + signal.SIGTERM
    assert terminated.trainer.trainer_progress_state.global_step_id == 4
    hooks = [checkpoints(root, save_epoch_freq=9)]
    found, rest, reached = trained(rank, "FSDP2", hooks=hooks, resume_from="auto", seed=7, **run)
    assert reached == progress
    assert rest == said[2:]
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_signal_to_one_process_is_a_checkpoint_of_all_that_goes_on_bit_for_bit(tmp_path):
    together(is_terminated_and_goes_on, 2, str(tmp_path))


def is_refused(rank, root):
    saving, recording = checkpoints(root), RecordHookConfig(path=f"{root}/run.jsonl")
    trained(rank, "DDP", max_epoch=1, hooks=[saving, recording])
    refused = []
    for hook in (saving, recording):
        with pytest.raises((ArgumentValueError, CheckpointError), match="earlier run") as caught:
            trained(rank, "DDP", max_epoch=1, hooks=[hook])
        refused.append(type(caught.value))
    return refused


def test_what_would_be_overwritten_is_refused_on_every_process(tmp_path):
    main, other = together(is_refused, 2, str(tmp_path))
    assert main == [CheckpointError, ArgumentValueError]
    assert other == [CheckpointError, CheckpointError]
