"""What the callback for Lightning refuses, before the first step."""

import re

import pytest
import torch
from lightning_runs import BATCHES, QUIET, Manual, Net, adamw, fit, same, trainer, weights

import gradclip
from gradclip.errors import ArgumentTypeError, ArgumentValueError, DoubleClippingError
from gradclip.integrations.lightning import GradientClippingCallback

pytestmark = QUIET


# What it refuses.


class Overriding(Net):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        self.clip_gradients(optimizer, 0.25, "norm")


def refused(error, model, *callbacks, **options):
    """Return the words of a refusal that came before anything was computed."""
    before = weights(model)
    with pytest.raises(error) as caught:
        fit(model, *callbacks, **options)
    assert model.losses == []
    assert same(before, weights(model))
    return str(caught.value)


def test_a_limit_of_the_trainer_too_is_refused_before_the_first_step():
    clipping = GradientClippingCallback(0.5)
    said = refused(
        DoubleClippingError,
        Net(),
        clipping,
        gradient_clip_val=0.25,
        gradient_clip_algorithm="value",
    )
    assert said == (
        "Lightning would clip these gradients too\n"
        '  Lightning  Trainer(gradient_clip_val=0.25, gradient_clip_algorithm="value")\n'
        "  gradclip   GradientClippingCallback(0.5)\n"
        "  Lightning clips right after the callback, and a second limit silently changes what the "
        "first one means.\n"
        "  Keep one of them:\n"
        "    the callback, and Trainer(..., callbacks=[...]) without gradient_clip_val\n"
        "    or Lightning's, and no callback\n"
        "  No step was made, and no gradient was changed."
    )
    assert DoubleClippingError.code == "GC101"


def test_a_limit_of_zero_is_none():
    clipping = GradientClippingCallback(0.5)
    fit(Net(), clipping, gradient_clip_val=0.0)
    assert clipping.clippers[0].step == BATCHES


def test_a_module_that_clips_by_itself_is_refused():
    said = refused(DoubleClippingError, Overriding(), GradientClippingCallback(0.5))
    assert "Lightning  test_lightning_refusals.Overriding.configure_gradient_clipping\n" in said
    assert "a LightningModule without configure_gradient_clipping" in said


def test_what_manual_optimisation_never_calls_is_not_refused():
    class Both(Manual):
        configure_gradient_clipping = Overriding.configure_gradient_clipping

    clipping = GradientClippingCallback(0.5)
    fit(Both(), clipping)
    assert clipping.clippers[0].step == BATCHES


def test_an_attachment_of_the_same_optimizer_is_refused():
    attached = []

    def make(parameters):
        optimizer = adamw(parameters)
        attached.append(gradclip.attach(optimizer, 1.0))
        return optimizer

    said = refused(DoubleClippingError, Net(make), GradientClippingCallback(0.5))
    assert re.search(r"by gradclip\.attach; GradientClippingCallback would clip", said)


def test_a_second_callback_is_refused():
    class Other(GradientClippingCallback):
        """Of another class: two of one class are refused by Lightning itself."""

    said = refused(DoubleClippingError, Net(), GradientClippingCallback(0.5), Other(0.25))
    assert "by GradientClippingCallback; Other would clip them again" in said
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trainer(GradientClippingCallback(0.5), GradientClippingCallback(0.25))


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}]
)
def test_an_attachment_clips_what_lightnings_closure_computes(options):
    attached = []

    def make(parameters):
        optimizer = adamw(parameters)
        attached.append(gradclip.attach(optimizer, 0.5))
        return optimizer

    model, reference = Net(make), Net(adamw)
    fit(model, **options)
    fit(reference, GradientClippingCallback(0.5), **options)
    assert attached[0].clipper.step == BATCHES // options.get("accumulate_grad_batches", 1)
    torch.testing.assert_close(weights(model), weights(reference), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_deepspeed_is_left_to_clip_by_itself():
    """Lightning runs it on CUDA alone, so the check is called as fitting would."""
    pytest.importorskip("deepspeed")
    from lightning.pytorch.strategies import DeepSpeedStrategy  # noqa: PLC0415

    made = trainer(strategy=DeepSpeedStrategy(), gradient_clip_val=0.25)
    with pytest.raises(DoubleClippingError) as caught:
        GradientClippingCallback(0.5).on_fit_start(made, Net())
    assert "DeepSpeed  gradient_clipping = 0.25 " in str(caught.value)
    assert 'Trainer(strategy="deepspeed", gradient_clip_val=...)' in str(caught.value)


def test_lbfgs_is_refused():
    said = refused(
        ArgumentTypeError,
        Net(lambda named: torch.optim.LBFGS([parameter for _, parameter in named])),
        GradientClippingCallback(0.5),
    )
    assert "LBFGS computes gradients inside step(closure)" in said


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (((-1.0,), {}), ArgumentValueError),
        ((("1",), {}), ArgumentTypeError),
        (((1.0,), {"nonfinite": "ignore"}), ArgumentValueError),
        (((1.0,), {"max_consecutive_skips": 1.5}), ArgumentTypeError),
    ],
)
def test_wrong_arguments_are_told_where_they_are_given(arguments, error):
    with pytest.raises(error):
        GradientClippingCallback(*arguments[0], **arguments[1])
