"""A run that an error or Ctrl-C ended anywhere goes on as the run that nothing disturbed."""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradclip.clipping.policies import Decision, Policy, PolicyState
from gradclip.diagnostics.record import read_record
from gradclip.errors import ArgumentValueError
from gradclip.pipeline import HookBasedTrainer, SimpleBatchProcessor
from gradclip.pipeline.hooks import (
    GradientClippingHookConfig,
    HookContext,
    OptimizerHook,
    PipelineHooks,
    RecordHookConfig,
    ValidationHookConfig,
)

BATCHES, EPOCHS = 7, 2
CHANNELS = list(PipelineHooks().hooks)


class Noting(torch.optim.SGD):
    """Notes of which batches each of its steps is made: those since the gradients were dropped."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.fed, self.steps = [], []

    def step(self, closure=None):
        self.steps.append(tuple(self.fed))
        super().step(closure)

    def zero_grad(self, set_to_none=True):
        self.fed = []
        super().zero_grad(set_to_none)


class Usual(Policy):
    """Clips to half of the mean of the norms so far: its history is in every weight."""

    clip_mode: Literal["usual"] = "usual"

    def initial_state(self, scopes):
        return PolicyState({"mean": torch.zeros_like(scopes.sizes_S, dtype=torch.float64)})

    def decide(self, seen, state):
        mean_S = 0.5 * state.per_scope["mean"] + 0.5 * seen.norms_S
        return Decision(mean_S / 2, mean_S / 2, PolicyState({"mean": mean_S}))


@dataclass(frozen=True)
class Kind:
    """What goes wrong, and in which run.

    ``at`` is the batch at which it does, or the first one after it that the channel stands around.
    """

    error: type[BaseException]
    at: int
    accumulate: int = 1
    a_list: bool = False
    before_the_step: bool = False
    times: int = 1


# Windows of three end with batches 2, 5, 6; 9, 12, 13.
KINDS = {
    "an error": Kind(OSError, 3),
    "Ctrl-C": Kind(KeyboardInterrupt, 3),
    "an error inside a window": Kind(OSError, 4, accumulate=3),
    "Ctrl-C where a window ends": Kind(KeyboardInterrupt, 5, accumulate=3),
    "an error where an epoch ends": Kind(OSError, 6, accumulate=3, a_list=True),
    "Ctrl-C twice": Kind(KeyboardInterrupt, 6, accumulate=3, times=2),
    "an error in a hook before the step": Kind(OSError, 2, accumulate=3, before_the_step=True),
}


class Failing(PipelineHooks):
    def __init__(self, kind, channel, moment):
        super().__init__()
        self.kind, self.left = kind, kind.times
        context = HookContext.from_callable(**{moment: self.fail})
        self.register_hook(channel, context)
        self.loop = channel == "on_loop"

    def fail(self, arg):
        # A hook that fails as another has failed already would be a second error.
        if self.left and (self.loop or arg.global_step_id >= self.kind.at):
            self.left -= 1
            raise self.kind.error("it failed")


class Run:
    def __init__(self, path, kind, failing=()):
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(BATCHES, 1, 2, generator=generator)
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        self.optimizer = Noting(model.parameters())
        self.path = path
        if kind.a_list:
            loader = list(inputs)
        else:
            loader = DataLoader(TensorDataset(inputs[:, 0]), batch_size=1, shuffle=True)
        record = RecordHookConfig(path=str(path))
        own = [OptimizerHook()] if kind.before_the_step else []
        self.trainer = HookBasedTrainer(
            accelerator=Accelerator(cpu=True, gradient_accumulation_steps=kind.accumulate),
            model=model,
            dataloader=loader,
            batch_processor=SimpleBatchProcessor.from_callable(self.forward),
            optimizer=self.optimizer,
            lr_scheduler=torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.95),
            grad_clip=GradientClippingHookConfig(policy=Usual()),
            hooks=[*failing, *own, record],
            max_epoch=EPOCHS,
        )

    def forward(self, model, batch):
        batch = batch[0] if isinstance(batch, list) else batch
        self.optimizer.fed.append(tuple(batch.flatten().tolist()))
        return None, (model(batch) - 1).square().mean()

    def found(self):
        """What it came to: weights, momentum, the batches of each step, the record, the counts."""
        tensors = [*self.trainer.model.parameters()]
        tensors += [self.optimizer.state[p]["momentum_buffer"] for p in tensors]
        return {
            "weights": [tensor.detach().numpy().tobytes().hex() for tensor in tensors],
            "steps": self.optimizer.steps,
            "record": [
                (each.step, each.loss, each.norm_pre, each.clipped, each.skipped, each.lr)
                for each in read_record(self.path)
            ],
            "progress": self.trainer.trainer_progress_state,
            "rate": self.optimizer.param_groups[0]["lr"],
        }


@cache
def undisturbed(folder, accumulate, a_list):
    run = Run(folder / f"{accumulate}-{a_list}.jsonl", Kind(OSError, 0, accumulate, a_list))
    run.trainer()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return run.found()


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory):
    return tmp_path_factory.mktemp("undisturbed")


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize("name", KINDS)
def test_it_goes_on_as_if_nothing_had_happened(tmp_path, folder, name, channel, moment):
    """What was stepped comes once, what was not comes again: detectron2#509, Lightning#2095."""
    kind = KINDS[name]
    wanted = undisturbed(folder, kind.accumulate, kind.a_list)
    failing = Failing(kind, channel, moment)
    run = Run(tmp_path / "run.jsonl", kind, [failing])
    for _ in range(kind.times):
        with pytest.raises(kind.error, match="it failed"):
            run.trainer()
    run.trainer()
    assert not failing.left
    assert run.found() == wanted


def fed_to(hooks=(), validation=None, accumulate=1):
    """Train on 1, 10, 100 with a loss whose gradient is the batch, and a rate of 1."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    return HookBasedTrainer(
        accelerator=Accelerator(cpu=True, gradient_accumulation_steps=accumulate),
        model=model,
        dataloader=[torch.tensor([[value]]) for value in (1.0, 10.0, 100.0)],
        batch_processor=SimpleBatchProcessor.from_callable(lambda m, b: (None, m(b).sum())),
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        hooks=hooks,
        validation=validation,
        max_epoch=1,
    )


def test_a_batch_whose_step_was_made_is_not_trained_twice(tmp_path):
    """The report itself: -121 and four lines before. detectron2#509, Lightning#2095."""
    failing = PipelineHooks()
    once = iter([True])

    def fail(arg):
        if arg.global_step_id == 1 and next(once, False):
            raise OSError("it failed")

    failing.register_hook("on_step", HookContext.from_callable(after=fail))
    path = tmp_path / "run.jsonl"
    run = fed_to([RecordHookConfig(path=str(path)), failing])
    with pytest.raises(OSError, match="it failed"):
        run()
    assert run.trainer_progress_state.global_step_id == 2
    run()
    assert run.model.weight.item() == -111
    assert [each.step for each in read_record(path)] == [0, 1, 2]


def test_a_batch_whose_step_was_withheld_is_done_too(tmp_path):
    """Its NaN comes once, and the scheduler stays where it was."""
    failing = PipelineHooks()
    once = iter([True])

    def fail(arg):
        if arg.global_step_id == 1 and next(once, False):
            raise OSError("it failed")

    failing.register_hook("on_optimizer_step", HookContext.from_callable(after=fail))
    path = tmp_path / "run.jsonl"
    run = fed_to(
        [GradientClippingHookConfig(max_norm=1e9), RecordHookConfig(path=str(path)), failing]
    )
    run._position.dataloader[1].fill_(float("nan"))
    with pytest.raises(OSError, match="it failed"):
        run()
    state = run.trainer_progress_state
    assert (state.global_step_id, state.optimizer_step_id) == (2, 1)
    run()
    assert run.model.weight.item() == -101
    assert [(each.step, each.skipped) for each in read_record(path)] == [
        (0, False),
        (1, True),
        (2, False),
    ]


@pytest.mark.parametrize(("accumulate", "weight"), [(1, -111.0), (3, -37.0)])
def test_ctrl_c_inside_validation_makes_no_step_twice_and_loses_none(accumulate, weight):
    once = iter([True])

    def evaluate(model):
        if next(once, False):
            raise KeyboardInterrupt

    frequency = 3 if accumulate == 3 else 2
    validation = ValidationHookConfig(eval_callback=evaluate, step_eval_freq=frequency)
    run = fed_to(validation=validation, accumulate=accumulate)
    with pytest.raises(KeyboardInterrupt):
        run()
    run()
    assert run.model.weight.item() == pytest.approx(weight)
    assert run.trainer_progress_state.global_step_id == 3


def test_an_error_while_a_batch_is_fetched_gives_its_window_back():
    class Breaks:
        left = 1

        def __iter__(self):
            for value in (1.0, 10.0, 100.0):
                if value == 10.0 and self.left:
                    self.left -= 1
                    raise OSError("it failed")
                yield torch.tensor([[value]])

    run = fed_to(accumulate=3)
    run.dataloader = run._position.dataloader = Breaks()
    with pytest.raises(OSError, match="it failed"):
        run()
    run()
    assert run.model.weight.item() == pytest.approx(-37.0)
    assert run.trainer_progress_state.optimizer_step_id == 1


def once(values, failing=()):
    """An iterator's run, in which some batches fail the first time."""
    left = set(failing)

    def fail(arg):
        if arg.global_step_id in left:
            left.remove(arg.global_step_id)
            raise OSError("it failed")

    hooks = PipelineHooks()
    hooks.register_hook("on_step", HookContext.from_callable(after=fail))
    run = fed_to([hooks])
    run.dataloader = run._position.dataloader = iter([torch.tensor([[v]]) for v in values])
    return run


def test_an_iterator_goes_on_where_it_is_and_is_named_where_it_would_have_to_go_back():
    run = once((1.0, 10.0, 100.0), failing=[1])
    run.max_step = 1
    run()
    run.max_step = 3
    with pytest.raises(OSError, match="it failed"):
        run()  # after the step of the second batch
    run()
    assert run.model.weight.item() == -111
    run = once((1.0, 10.0, 100.0))

    def fail(arg):
        raise OSError("it failed")

    handle = run.hooks.register_hook("on_batch", HookContext.from_callable(before=fail))
    with pytest.raises(OSError, match="it failed"):
        run()
    handle.remove()
    with pytest.raises(ArgumentValueError, match="the last 1 of the batches"):
        run()
    assert run.model.weight.item() == 0


def test_an_epoch_whose_hooks_failed_after_it_is_not_trained_again():
    failing = PipelineHooks()
    once = iter([True])

    def fail(arg):
        if next(once, False):
            raise OSError("it failed")

    failing.register_hook("on_epoch", HookContext.from_callable(after=fail))
    run = fed_to([failing])
    with pytest.raises(OSError, match="it failed"):
        run()
    run()
    assert run.model.weight.item() == -111


def test_a_scheduler_that_failed_does_not_undo_the_step():
    class Breaks:
        steps = 0

        def step(self):
            self.steps += 1
            if self.steps == 2:
                raise OSError("it failed")

    run = fed_to()
    run._arg.lr_scheduler = Breaks()
    with pytest.raises(OSError, match="it failed"):
        run()
    run()
    assert run.model.weight.item() == -111
