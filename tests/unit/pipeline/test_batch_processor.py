import pytest
import torch
from accelerate import Accelerator
from torch import nn

from gradclip.errors import ArgumentTypeError, GradClipError
from gradclip.pipeline import BatchProcessorMixin, LossNotProvidedError, SimpleBatchProcessor
from gradclip.pipeline.hooks import HookContext, PipelineHookArgs, PipelineHooks


def loss_of(model, batch):
    outputs = model(batch)
    return {"outputs": outputs}, outputs.sum()


def process(processor, model, hooks=None, **fields):
    arg = PipelineHookArgs(batch=torch.tensor([[3.0, 4.0]]), model=model, **fields)
    processor(hooks or PipelineHooks(), arg, model)
    return arg


@pytest.mark.parametrize("with_accelerator", [False, True])
def test_forward_and_backward_run_and_leave_their_results(linear, with_accelerator):
    model = linear([1.0, 2.0])
    fields = {"accelerator": Accelerator(cpu=True)} if with_accelerator else {}
    arg = process(SimpleBatchProcessor.from_callable(loss_of), model, **fields)
    assert arg.model_outputs["outputs"].tolist() == [[11.0]]
    assert arg.reduce_loss == 11.0
    assert not arg.reduce_loss.requires_grad
    assert model.weight.grad.tolist() == [[3.0, 4.0]]


def test_it_can_be_subclassed(linear):
    class Mine(SimpleBatchProcessor):
        def forward(self, model, batch):
            return loss_of(model, batch)

    model = linear([1.0, 2.0])
    assert process(Mine(), model).reduce_loss == 11.0
    assert isinstance(Mine(), BatchProcessorMixin)


def test_hooks_stand_around_forward_and_backward(linear):
    model, seen, hooks = linear([1.0, 2.0]), [], PipelineHooks()
    for channel in ("on_model_forward", "on_model_backward"):
        hooks.register_hook(
            channel,
            HookContext.from_callable(
                before=lambda arg, c=channel: seen.append((c, arg.reduce_loss, model.weight.grad)),
                after=lambda arg, c=channel: seen.append(
                    (c, float(arg.reduce_loss), model.weight.grad is not None)
                ),
            ),
        )
    process(SimpleBatchProcessor.from_callable(loss_of), model, hooks)
    assert seen == [
        ("on_model_forward", None, None),
        ("on_model_forward", 11.0, False),
        ("on_model_backward", torch.tensor(11.0), None),
        ("on_model_backward", 11.0, True),
    ]


def test_the_loss_is_divided_over_the_accumulation_window(linear):
    model = linear([1.0, 2.0])
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    arg = process(SimpleBatchProcessor.from_callable(loss_of), model, accelerator=accelerator)
    assert arg.reduce_loss == 11.0
    assert model.weight.grad.tolist() == [[0.75, 1.0]]


def test_without_backward_no_loss_is_needed(linear):
    model = linear([1.0, 2.0])
    processor = SimpleBatchProcessor.from_callable(lambda m, b: (m(b), None), need_backward=False)
    arg = process(processor, model)
    assert arg.reduce_loss is None
    assert model.weight.grad is None


def test_a_missing_loss_is_an_error(linear):
    processor = SimpleBatchProcessor.from_callable(lambda m, b: (m(b), None))
    with pytest.raises(LossNotProvidedError, match="need_backward=False") as caught:
        process(processor, linear([1.0, 2.0]))
    assert isinstance(caught.value, GradClipError)


@pytest.mark.parametrize("wrong", [torch.tensor(1.0), (1, 2, 3), (None, 1.0), None, [1, 2]])
def test_forward_must_return_a_pair(linear, wrong):
    processor = SimpleBatchProcessor.from_callable(lambda m, b: wrong)
    with pytest.raises(ArgumentTypeError, match=r"\(outputs, loss\)"):
        process(processor, linear([1.0, 2.0]))


def test_modules_of_the_processor_are_prepared_once(linear):
    class Weighted(SimpleBatchProcessor):
        def __init__(self):
            self.scale = nn.Linear(1, 1, bias=False)

        def forward(self, model, batch):
            return None, self.scale(model(batch)).sum()

    accelerator, processor = Accelerator(cpu=True), Weighted()
    processor.prepare(accelerator)
    process(processor, linear([1.0, 2.0]), accelerator=accelerator)
    assert [type(each) for each in accelerator._models] == [nn.Linear]
    assert processor.accelerator is accelerator
