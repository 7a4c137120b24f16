import pytest
from pydantic import ValidationError
from torch import nn

from gradclip.errors import ArgumentValueError
from gradclip.pipeline.hooks import PipelineHookArgs, ValidationHookConfig


def seen_by(channel, count, **config):
    """Which of a number of steps or epochs are evaluated."""
    seen, model = [], nn.Linear(1, 1)
    hook = ValidationHookConfig(eval_callback=lambda model: seen.append(number), **config)()
    for number in range(count):
        arg = PipelineHookArgs(model=model, epoch_id=number, global_step_id=number)
        with hook.begin(channel, arg):
            pass
    return seen


@pytest.mark.smoke
def test_it_evaluates_every_so_many_steps_and_epochs():
    assert seen_by("on_step", 7, step_eval_freq=3) == [2, 5]
    assert seen_by("on_epoch", 7, epoch_eval_freq=2) == [1, 3, 5]
    assert seen_by("on_step", 7, epoch_eval_freq=2) == []
    assert seen_by("on_loop", 1, epoch_eval_freq=2, eval_at_begin=True) == [0]
    assert seen_by("on_loop", 1, epoch_eval_freq=2) == []


def test_every_module_comes_back_to_the_mode_it_was_in():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    during = []

    def callback(given):
        assert given is model
        during.extend(module.training for module in model.modules())
        raise KeyError

    hook = ValidationHookConfig(eval_callback=callback, step_eval_freq=1)()
    with pytest.raises(KeyError), hook.begin("on_step", PipelineHookArgs(model=model)):
        pass
    assert during == [False] * 4
    assert [module.training for module in model.modules()] == [True, True, False, False]


def test_it_does_not_evaluate_after_an_error():
    seen = []
    hook = ValidationHookConfig(eval_callback=seen.append, step_eval_freq=1)()
    with (
        pytest.raises(KeyError),
        hook.begin("on_step", PipelineHookArgs(model=nn.Linear(1, 1))),
    ):
        raise KeyError
    assert seen == []


def test_it_needs_a_model_and_a_frequency():
    hook = ValidationHookConfig(eval_callback=print, step_eval_freq=1)()
    with pytest.raises(ArgumentValueError, match=r"arg\.model"):
        hook.evaluate(PipelineHookArgs())
    with pytest.raises(ValidationError, match="must be specified"):
        ValidationHookConfig(eval_callback=print)
    with pytest.raises(ValidationError):
        ValidationHookConfig(eval_callback=print, step_eval_freq=0)
