"""Ends before the limits: a hook asks, Ctrl-C, SIGTERM; and how the run goes on."""

import signal
import threading

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradclip.pipeline import HookBasedTrainer, SimpleBatchProcessor
from gradclip.pipeline import stopping as stopping_module
from gradclip.pipeline.hooks import (
    HookContext,
    PipelineHookArgs,
    PipelineHooks,
    RecordHookConfig,
    SaveCheckpointConfig,
    ValidationHookConfig,
)

SIGNALS = {
    signal.SIGINT: (KeyboardInterrupt, None),
    signal.SIGTERM: (SystemExit, 143),
}


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard():
    """A shell that runs tests in the background lets them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def on(channel, function, moment="after"):
    hooks = PipelineHooks()
    hooks.register_hook(channel, HookContext.from_callable(**{moment: function}))
    return hooks


def at(step, function):
    """Call a function once, in a batch."""
    once = [True]

    def call(arg):
        if arg.global_step_id == step and once:
            once.clear()
            function(arg)

    return call


class Noisy(TensorDataset):
    """Draws from the generator of the process."""

    def __getitem__(self, index):
        (sample,) = super().__getitem__(index)
        return (sample + 0.1 * torch.randn(2),)


def trainer(hooks=(), accumulate=1, **fields):
    """Five batches an epoch, with dropout and noise in the data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    data = Noisy(torch.randn(10, 2, generator=torch.Generator().manual_seed(1)))
    return HookBasedTrainer(
        accelerator=Accelerator(cpu=True, gradient_accumulation_steps=accumulate),
        model=model,
        dataloader=DataLoader(data, batch_size=2, shuffle=True),
        batch_processor=SimpleBatchProcessor.from_callable(
            lambda m, batch: (None, m(batch[0]).square().mean())
        ),
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.1),
        hooks=hooks,
        **{"max_epoch": 3} | fields,
    )


def save(root, **fields):
    return SaveCheckpointConfig(save_root=str(root), save_epoch_freq=100, **fields)


def test_a_hook_can_end_the_run():
    """ClassyVision#386, Lightning#2095."""
    seen = []
    run = trainer(
        [on("on_step", at(6, lambda arg: arg.request_stop())), on("on_loop", seen.append)]
    )
    run()
    state = run.trainer_progress_state
    assert (state.epoch_id, state.step_id, state.global_step_id) == (1, 2, 7)
    assert seen[0].exception is None
    assert seen[0].stop.agreed
    run()
    assert run.trainer_progress_state.global_step_id == 15


def test_it_ends_where_a_window_ends(weights):
    run = trainer([on("on_batch", at(6, lambda arg: arg.request_stop()))], accumulate=3)
    run()
    # Windows end with batches 2, 4; 7, 9.
    assert run.trainer_progress_state.global_step_id == 8
    assert run.trainer_progress_state.micro_step_id == 0
    run()
    whole = trainer(accumulate=3)
    whole()
    assert weights(run.model) == weights(whole.model)


@pytest.mark.parametrize(("channel", "steps"), [("on_epoch", 5), ("on_loop", 0)])
def test_it_ends_before_the_next_epoch(channel, steps):
    moment = "after" if channel == "on_epoch" else "before"
    run = trainer([on(channel, lambda arg: arg.request_stop(), moment)])
    run()
    assert run.trainer_progress_state.global_step_id == steps


def test_an_epoch_that_is_cut_is_not_evaluated_as_one():
    evaluated = []
    validation = ValidationHookConfig(eval_callback=evaluated.append, epoch_eval_freq=1)
    run = trainer([on("on_step", at(6, lambda arg: arg.request_stop()))], validation=validation)
    run()
    assert len(evaluated) == 1
    run()
    assert len(evaluated) == 3


def test_an_argument_of_a_loop_of_ones_own_can_be_asked():
    arg = PipelineHookArgs()
    copy = arg.copy_with_updates(step_id=1)
    copy.request_stop()
    assert arg.stop.wanted
    assert not PipelineHookArgs().stop.wanted


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_checkpoint_and_the_run_goes_on_bit_for_bit(
    tmp_path, capsys, weights, number, accumulate
):
    """Also with dropout, inside a window, and in the middle of an epoch: ClassyVision#386."""
    error, status = SIGNALS[number]
    before = signal.getsignal(number)
    send = on("on_model_forward", at(6, lambda arg: signal.raise_signal(number)))
    record = RecordHookConfig(path=str(tmp_path / "run.jsonl"))
    hooks = [send, record, save(tmp_path / "saved", save_when_loop_end=False)]
    run = trainer(hooks, accumulate, resume_from="auto")
    with pytest.raises(error) as caught:
        run()
    assert getattr(caught.value, "code", None) == status
    assert signal.getsignal(number) is before
    done = run.trainer_progress_state.global_step_id
    assert done == {1: 7, 3: 8}[accumulate]
    (folder,) = (tmp_path / "saved").iterdir()
    said = capsys.readouterr().err
    assert f"saved {folder}\nto go on, run again: " in said
    torch.manual_seed(7)
    again = trainer([record, save(tmp_path / "saved")], accumulate, resume_from="auto")
    assert again.trainer_progress_state.global_step_id == done
    again()
    whole = trainer(accumulate=accumulate)
    whole()
    assert weights(again.model) == weights(whole.model)


def test_the_way_to_go_on_names_the_folder(tmp_path, capsys):
    stop = on("on_step", at(2, lambda arg: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        trainer([stop, save(tmp_path)])()
    said = capsys.readouterr().err
    assert f'to go on, with resume_from="{tmp_path}" (or "auto"), run again: ' in said


def test_ctrl_c_that_a_hook_raised_is_saved_too(tmp_path, capsys, weights):
    def fail(arg):
        raise KeyboardInterrupt

    run = trainer([on("on_model_backward", at(7, fail)), save(tmp_path)], accumulate=3)
    with pytest.raises(KeyboardInterrupt):
        run()
    # The window of batches 5 to 7 begins again.
    assert run.trainer_progress_state.global_step_id == 5
    assert "saved" in capsys.readouterr().err
    again = trainer([save(tmp_path)], accumulate=3, resume_from=tmp_path)
    assert again.trainer_progress_state.global_step_id == 5
    again()
    assert again.trainer_progress_state.optimizer_step_id == 6


def test_nothing_is_saved_of_a_run_that_has_not_begun(tmp_path):
    stop = on("on_loop", lambda arg: signal.raise_signal(signal.SIGINT), "before")
    with pytest.raises(KeyboardInterrupt):
        trainer([stop, save(tmp_path)])()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("channel", ["on_epoch", "on_loop"])
def test_a_signal_at_the_very_end_is_not_swallowed(tmp_path, channel):
    stop = on(channel, lambda arg: signal.raise_signal(signal.SIGINT))
    run = trainer([stop, save(tmp_path)], max_epoch=1)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_second_ctrl_c_ends_at_once_and_saves_nothing(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stopping_module, "monotonic", lambda: now[0])

    def press(arg):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the same one, passed on by a launcher
        now[0] = 2.0
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")

    run = trainer([on("on_model_forward", at(2, press)), save(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        run()
    assert run.trainer_progress_state.global_step_id == 2
    assert not list(tmp_path.iterdir())


def test_a_second_ctrl_c_inside_the_step_waits_until_the_step_is_counted(monkeypatch, weights):
    now = [0.0]
    monkeypatch.setattr(stopping_module, "monotonic", lambda: now[0])
    run = trainer()
    step = run.optimizer.optimizer.step
    presses = iter([False, True])

    def pressed(*args, **kwargs):
        step(*args, **kwargs)
        if next(presses, False):
            for now[0] in (0.0, 2.0):
                signal.raise_signal(signal.SIGINT)

    run.optimizer.optimizer.step = pressed
    with pytest.raises(KeyboardInterrupt):
        run()
    assert run.trainer_progress_state.global_step_id == 2
    run()
    whole = trainer()
    whole()
    assert weights(run.model) == weights(whole.model)


def test_a_handler_of_the_users_own_stays():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        trainer([on("on_step", at(2, lambda arg: signal.raise_signal(signal.SIGTERM)))])()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_a_run_in_another_thread_trains():
    run = trainer(max_step=2)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert run.trainer_progress_state.global_step_id == 2
