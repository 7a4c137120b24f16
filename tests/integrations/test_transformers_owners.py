"""transformers.Trainer: one clipper, from the begin of training to its end, or an error."""

import math

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from transformers_runs import (
    LIMIT,
    STEPS,
    TRAINERS,
    Model,
    arguments,
    dataset,
    poisoned,
    trained,
)

import gradclip
from gradclip import NormClip, ObserveClip
from gradclip.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    DoubleClippingError,
)
from gradclip.integrations.transformers import GradientClippingCallback


def refused(trainer):
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with pytest.raises(DoubleClippingError) as caught:
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(map(torch.equal, trainer.model.parameters(), before))
    assert caught.value.code == "GC101"
    return str(caught.value)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize(("options", "seen"), [({}, "1.0"), ({"max_grad_norm": 0.25}, "0.25")])
def test_a_trainer_that_clips_is_refused_before_the_first_step(tmp_path, trainer, options, seen):
    args = arguments(tmp_path)
    args.max_grad_norm = options.get("max_grad_norm", type(args)(str(tmp_path)).max_grad_norm)
    callback = GradientClippingCallback(NormClip(max_norm=LIMIT))
    said = refused(trainer(Model(), args, train_dataset=dataset(), callbacks=[callback]))

    assert f"Trainer    max_grad_norm = {seen}    (TrainingArguments; 1.0 where it is not" in said
    assert "gradclip   policy        = NormClip(clip_mode='norm', max_norm=0.5" in said
    assert "TrainingArguments(..., max_grad_norm=0)" in said
    assert said.endswith("No parameters were changed.")
    assert callback.last is None


def test_a_second_clipper_of_gradclip_is_refused(tmp_path):
    model = Model()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.01)
    options = {"train_dataset": dataset(), "optimizers": (optimizer, None)}
    callback = GradientClippingCallback(LIMIT)
    made = Trainer(model, arguments(tmp_path), callbacks=[callback], **options)
    with gradclip.attach(optimizer, 1.0):
        said = refused(made)
    assert "gradclip.attach; GradientClippingCallback would clip them again" in said

    made.train()  # it was taken off
    assert made.state.global_step == STEPS
    gradclip.attach(optimizer, 1.0).remove()  # after training the optimizer is free

    made.add_callback(GradientClippingCallback(1.0))
    with pytest.raises(DoubleClippingError, match="GradientClippingCallback; GradientClippingCal"):
        made.train()


def test_nothing_can_be_attached_while_it_trains(tmp_path):
    class Attaching(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **_):
            gradclip.attach(optimizer, 1.0)

    with pytest.raises(DoubleClippingError, match="by GradientClippingCallback"):
        trained(tmp_path, GradientClippingCallback(LIMIT), others=[Attaching()])


def test_it_trains_twice(tmp_path):
    callback = GradientClippingCallback(LIMIT)
    made = trained(tmp_path, callback)
    made.train()
    assert made.state.stateful_callbacks["gradclip"]["step"] == STEPS


@pytest.mark.parametrize(
    ("error", "args", "options"),
    [
        (ArgumentValueError, (-1.0,), {}),
        (ArgumentTypeError, ("1.0",), {}),
        (ArgumentValueError, (1.0,), {"nonfinite": "ignore"}),
        (ArgumentTypeError, (1.0,), {"max_consecutive_skips": 1.5}),
        (ArgumentValueError, (1.0,), {"backend": "cuda"}),
    ],
)
def test_wrong_arguments_are_refused_when_it_is_made(error, args, options):
    with pytest.raises(error):
        GradientClippingCallback(*args, **options)


# A callback that is given twice, or to two trainers.


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_same_callback_twice_is_refused(tmp_path, trainer):
    callback = GradientClippingCallback(LIMIT)
    made = trainer(
        Model(), arguments(tmp_path), train_dataset=dataset(), callbacks=[callback, callback]
    )
    assert "has this GradientClippingCallback twice" in refused(made)
    made.remove_callback(callback)
    made.train()
    assert made.state.stateful_callbacks["gradclip"]["step"] == STEPS


class At(TrainerCallback):
    """Does something at the end of one step."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.what()


def test_a_callback_that_another_trainer_took_makes_no_step(tmp_path):
    callback = GradientClippingCallback(LIMIT)

    def another():
        Trainer(Model(), arguments(tmp_path), train_dataset=dataset(), callbacks=[callback]).train()

    with pytest.raises(ArgumentValueError, match="not bound to this training"):
        trained(tmp_path, callback, others=[At(2, another)])


def test_a_callback_that_comes_later_makes_no_step(tmp_path):
    made = Trainer(Model(), arguments(tmp_path), train_dataset=dataset())
    made.add_callback(At(2, lambda: made.add_callback(GradientClippingCallback(LIMIT))))
    with pytest.raises(ArgumentValueError, match="added after training began"):
        made.train()
    assert made.state.global_step == 2


# A training that ended by an error.


def interrupted(folder, trainer, callback):
    """Return a trainer whose training was ended at the third step."""

    def interrupt():
        raise KeyboardInterrupt

    at = At(3, interrupt)
    made = trainer(Model(), arguments(folder), train_dataset=dataset(), callbacks=[callback, at])
    with pytest.raises(KeyboardInterrupt):
        made.train()
    made.remove_callback(at)
    return made


@pytest.mark.parametrize("trainer", TRAINERS)
def test_another_callback_can_take_its_place(tmp_path, trainer):
    first, second = GradientClippingCallback(LIMIT), GradientClippingCallback(LIMIT)
    made = interrupted(tmp_path, trainer, first)
    made.remove_callback(first)
    made.add_callback(second)
    made.train()
    assert second.last is not None
    assert first.clipper is None

    both = [GradientClippingCallback(LIMIT), GradientClippingCallback(1.0)]
    for callback in both:
        made.add_callback(callback)
    made.remove_callback(second)
    with pytest.raises(DoubleClippingError):
        made.train()
    made.remove_callback(both[0])  # keep one of them
    made.train()
    assert made.state.global_step == STEPS


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_optimizer_can_be_let_go(tmp_path, trainer):
    callback = GradientClippingCallback(LIMIT)
    made = interrupted(tmp_path, trainer, callback)
    if trainer is Trainer:  # the mixin does it
        with pytest.raises(DoubleClippingError, match=r"remove\(\) takes .* a callback off"):
            gradclip.attach(made.optimizer, 1.0)
        callback.remove()
        callback.remove()
    gradclip.attach(made.optimizer, 1.0).remove()
    assert callback.clipper is None
    made.train()
    assert made.state.global_step == STEPS


class StopOnSkip(TrainerCallback):
    def on_optimizer_step(self, args, state, control, optimizer=None, **_):
        if optimizer.step_was_skipped:
            raise RuntimeError("skipped")


def test_a_skip_that_an_error_followed_is_forgotten(tmp_path):
    """Without a loss scaler nothing else ever says that a step was not skipped."""
    callback, stop = GradientClippingCallback(LIMIT), StopOnSkip()
    made = poisoned(Trainer, 3, math.nan)(
        Model(), arguments(tmp_path), train_dataset=dataset(), callbacks=[callback, stop]
    )
    with pytest.raises(RuntimeError, match="skipped"):
        made.train()
    assert made.optimizer.step_was_skipped
    callback.remove()
    assert not made.optimizer.step_was_skipped


# Optimizers.


def stepped_in_backward(model):
    from torch.distributed.optim import _apply_optimizer_in_backward  # noqa: PLC0415

    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.01})
    return torch.optim.SGD(model.parameters(), lr=0.01)


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("make", [stepped_in_backward, lambda _: LayerWiseDummyOptimizer()])
def test_what_steps_in_the_backward_pass_is_refused(tmp_path, make):
    model = Model()
    made = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=dataset(),
        callbacks=[GradientClippingCallback(LIMIT)],
        optimizers=(make(model), None),
    )
    with pytest.raises(ArgumentValueError, match="inside the backward pass"):
        made.train()
    assert made.state.global_step == 0


def test_to_measure_beside_an_attachment_is_fine(tmp_path):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    callback = GradientClippingCallback(ObserveClip())
    with gradclip.attach(optimizer, LIMIT) as handle:
        Trainer(
            model,
            arguments(tmp_path),
            train_dataset=dataset(),
            callbacks=[callback],
            optimizers=(optimizer, None),
        ).train()
        assert callback.last.norm_post == handle.last.norm_pre > handle.last.norm_post


def test_a_clipper_that_another_callback_calls_is_found(tmp_path):
    class Clips(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            gradclip.GradientClipper(model, 0.1).clip()

    with pytest.raises(DoubleClippingError, match=r"by a GradientClipper.*max_norm=0.1"):
        trained(tmp_path, GradientClippingCallback(LIMIT), others=[Clips()])


def test_an_error_between_clipping_and_step_loses_no_later_step(tmp_path):
    class Boom(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            raise KeyError

    made = poisoned(Trainer, 0, math.nan)(
        Model(),
        arguments(tmp_path),
        train_dataset=dataset(),
        callbacks=[GradientClippingCallback(LIMIT), Boom()],
    )
    with pytest.raises(KeyError):
        made.train()
    before = made.model.down.weight.detach().clone()
    for parameter in made.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.optimizer.optimizer.step()
    assert not torch.equal(made.model.down.weight, before)
