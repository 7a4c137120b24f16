"""transformers: what the callback tells loggers and its user, whatever the order of callbacks."""

import logging
import math
import re
import warnings

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers_runs import (
    LIMIT,
    STEPS,
    TRAINERS,
    ClippedTrainer,
    Keep,
    Model,
    arguments,
    dataset,
    poisoned,
    trained,
)

from gradclip import ObserveClip
from gradclip.diagnostics import read_log, read_record
from gradclip.errors import ArgumentTypeError, ArgumentValueError, NonFiniteGradientError
from gradclip.integrations.transformers import ClippingTrainerMixin, GradientClippingCallback

NAMES = {
    "gradclip/norm_pre",
    "gradclip/norm_post",
    "gradclip/norm_max",
    "gradclip/clip_fraction",
    "gradclip/skipped",
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_tensorboard_has_them(tmp_path, monkeypatch, trainer):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    clipping = GradientClippingCallback({"down.*": 0.3, "*": LIMIT})
    keep = Keep(clipping)
    trained(tmp_path, clipping, trainer, others=[keep], report_to="tensorboard")

    (file,) = tmp_path.rglob("events.out.tfevents*")
    for name in (*NAMES, "gradclip/down.*/norm_pre", "gradclip/*/norm_pre"):
        (run,) = read_log(file, norm_key=f"train/{name}")  # transformers puts "train/" first
        assert list(run.steps) == list(range(1, STEPS + 1))
    (run,) = read_log(file, norm_key="train/gradclip/norm_pre")
    assert list(run.norms) == pytest.approx([float(each.norm_pre) for each in keep.results])


class Logger(TrainerCallback):
    """Keeps what it is told, as TensorBoard's and W&B's callbacks write it."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.logs.append(dict(logs))


def run(folder, trainer, callbacks, **options):
    made = trainer(
        Model(), arguments(folder, **options), train_dataset=dataset(), callbacks=callbacks
    )
    made.train()
    return made


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("place", ["first", "before", "behind", "put in front"])
def test_every_logger_gets_every_number(tmp_path, trainer, place):
    """Without the mixin the loggers that the trainer makes, which come first, got none."""
    logger, clipping = Logger(), GradientClippingCallback(LIMIT)
    keep = Keep(clipping)
    callbacks = [clipping, logger] if place == "behind" else [logger, clipping]
    if place == "put in front":
        callbacks = [clipping]
    made = trainer(
        Model(),
        arguments(tmp_path, logging_steps=4),
        train_dataset=dataset(),
        callbacks=[*callbacks, keep],
    )
    if place == "first":  # before the trainer's own
        made.callback_handler.callbacks.remove(logger)
        made.callback_handler.callbacks.insert(0, logger)
    if place == "put in front":

        class Late(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                if state.global_step == 1:
                    made.callback_handler.callbacks = [logger, *made.callback_handler.callbacks]

        made.add_callback(Late())
    made.train()
    history = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(logger.logs) == len(history) == 2
    for number, (told, entry) in enumerate(zip(logger.logs, history, strict=True)):
        results = [each.to_host() for each in keep.results[4 * number : 4 * number + 4]]
        assert told.keys() >= NAMES
        assert {name: entry[name] for name in NAMES} == {name: told[name] for name in NAMES}
        assert told["gradclip/norm_pre"] == results[-1].norm_pre
        assert told["gradclip/norm_post"] == results[-1].norm_post
        assert told["gradclip/norm_max"] == pytest.approx(max(r.norm_pre for r in results))
        fraction = sum(r.clipped for r in results) / 4
        assert told["gradclip/clip_fraction"] == fraction
        assert told["gradclip/skipped"] == 0


@pytest.mark.parametrize("trainer", TRAINERS)
def test_patterns_have_norms_of_their_own(tmp_path, trainer):
    logger = Logger()
    clipping = GradientClippingCallback({"down.*": 0.1, "*": 0.2})
    run(tmp_path, trainer, [logger, clipping])
    groups = clipping.last.to_host().groups
    for pattern, stats in groups.items():
        assert logger.logs[-1][f"gradclip/{pattern}/norm_pre"] == stats.norm_pre
    assert list(groups) == ["down.*", "*"]


def test_a_callback_inside_another_is_found_too(tmp_path):
    """Its events come from the callback that holds it."""
    clipping, logger = GradientClippingCallback(LIMIT), Logger()

    class Holds(TrainerCallback):
        def __getattribute__(self, name):
            held = name.startswith("on_") and name in vars(TrainerCallback)
            return getattr(clipping, name) if held else super().__getattribute__(name)

    run(tmp_path, Trainer, [logger, Holds()])
    assert all(logger.logs[n].keys() >= NAMES for n in range(STEPS))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_handler_is_as_it_was_after_training(tmp_path, trainer):
    logger = Logger()
    observing, clipping = GradientClippingCallback(ObserveClip()), GradientClippingCallback(LIMIT)
    made = run(tmp_path, trainer, [logger, observing, clipping])
    before = list(made.callback_handler.callbacks)
    assert "on_log" not in vars(made.callback_handler)
    made.train()
    assert made.callback_handler.callbacks == before
    assert "on_log" not in vars(made.callback_handler)
    assert all(logs.keys() >= NAMES for logs in logger.logs)
    assert len(logger.logs) == 2 * STEPS


def test_a_training_after_one_that_failed_logs_as_the_first(tmp_path):
    logger, clipping = Logger(), GradientClippingCallback(LIMIT, nonfinite="raise")
    made = poisoned(Trainer, 2, math.nan)(
        Model(), arguments(tmp_path), train_dataset=dataset(), callbacks=[logger, clipping]
    )
    with pytest.raises(NonFiniteGradientError, match='"skip" to GradientClippingCallback'):
        made.train()
    type(made).training_step = Trainer.training_step
    made.train()
    assert len(logger.logs) == 2 + STEPS
    assert all(logs.keys() >= NAMES for logs in logger.logs)
    assert "on_log" not in vars(made.callback_handler)


# What is said, and counted.


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_skip_is_said_at_once_and_at_the_end(tmp_path, caplog, trainer):
    clipping = GradientClippingCallback(LIMIT)
    with warnings.catch_warnings(record=True) as caught, caplog.at_level("WARNING", "gradclip"):
        warnings.simplefilter("always")
        trained(tmp_path, clipping, poisoned(trainer, 3, math.nan))
    ((said),) = [str(w.message) for w in caught if "skipped step" in str(w.message)]
    assert re.match("GradientClippingCallback skipped step 3: the gradients? of ", said)
    assert "The optimizer does not make this step." in said
    (record,) = [each for each in caplog.records if each.name == "gradclip"]
    assert record.levelno == logging.WARNING
    assert "GradientClippingCallback: 1 of 8 steps were not made" in record.getMessage()
    stats = clipping.stats  # also now, when the optimizer is let go
    assert (stats.steps, stats.skipped, stats.nonfinite, stats.since) == (STEPS, 1, 1, 0)
    assert 0 < stats.p50 <= stats.max


def test_a_training_of_nothing_but_nan_ends_with_an_error_line(tmp_path, caplog):
    class Broken(Trainer):
        def training_step(self, model, *args, **options):
            loss = super().training_step(model, *args, **options)
            model.down.weight.grad.fill_(math.nan)
            return loss

    clipping = GradientClippingCallback(LIMIT)
    with caplog.at_level("WARNING", "gradclip"):
        trained(tmp_path, clipping, Broken)
    (record,) = [each for each in caplog.records if each.name == "gradclip"]
    assert record.levelno == logging.ERROR
    assert "8 of 8 steps were not made, the first was step 0" in record.getMessage()


def test_before_training_there_are_no_steps():
    assert GradientClippingCallback(LIMIT).stats.steps == 0
    assert GradientClippingCallback(LIMIT).report() == {}


# The mixin.


@pytest.mark.parametrize("max_grad_norm", [0, None])
def test_the_mixin_without_a_callback_is_refused(tmp_path, max_grad_norm):
    """With max_grad_norm=0 nothing clipped, and nobody said so; with 1.0 the trainer clips."""
    made = ClippedTrainer(
        Model(), arguments(tmp_path, max_grad_norm=max_grad_norm), train_dataset=dataset()
    )
    before = made.model.down.weight.detach().clone()
    with pytest.raises(ArgumentValueError, match="no GradientClippingCallback") as caught:
        made.train()
    assert "GradientClippingCallback(1.0)" in str(caught.value)
    assert torch.equal(made.model.down.weight, before)


def test_the_mixin_behind_the_trainer_is_refused():
    """The trainer's own methods would be called, and the mixin's never."""
    with pytest.raises(ArgumentTypeError, match=r"class Wrong\(ClippingTrainerMixin, Trainer\)"):

        class Wrong(Trainer, ClippingTrainerMixin):
            pass


def test_other_orders_are_fine():
    class Logs:
        def log(self, logs, *args, **options):
            super().log(logs, *args, **options)

    class InFront(Logs, ClippingTrainerMixin, Trainer):
        pass

    class Derived(InFront):
        def train(self, *args, **options):
            return super().train(*args, **options)

    assert issubclass(Derived, ClippedTrainer.__mro__[1])


@pytest.mark.parametrize("every", [1, 4])
def test_a_record_has_the_losses_that_are_logged(tmp_path, every):
    folder = tmp_path / "record"
    clipping = GradientClippingCallback(LIMIT, record=folder)
    made = trained(tmp_path, clipping, logging_steps=every)
    found = {each.step: each.loss for each in read_record(folder)}
    assert len(found) == STEPS
    logged = {e["step"] - 1: e["loss"] for e in made.state.log_history if "loss" in e}
    assert found == pytest.approx({step: logged.get(step) for step in found})
    assert len(logged) == STEPS // every
