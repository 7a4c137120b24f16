"""gradclip inside RoboOrchardLab: after errors, in odd places, and what is left when it is gone."""

import gc
import math
import pickle
import weakref
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from robo_orchard_lab.pipeline import HookBasedTrainer
from robo_orchard_lab.pipeline.batch_processor import SimpleBatchProcessor
from robo_orchard_lab.pipeline.hook_based_trainer import ResumeCheckpointConfig
from robo_orchard_lab.pipeline.hooks import grad_clip as theirs
from robo_orchard_lab.pipeline.hooks.checkpoint import SaveCheckpointConfig
from robo_orchard_lab.pipeline.hooks.mixin import HookContext, PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.hooks.optimizer import OptimizerHookConfig
from torch.utils.data import DataLoader

from gradclip.diagnostics import read_record
from gradclip.errors import (
    ArgumentValueError,
    DoubleClippingError,
    NonFiniteGradientError,
    TooManySkipsError,
)
from gradclip.integrations.robo_orchard import GradientClippingHookConfig

CLIP = GradientClippingHookConfig(clip_mode="norm", max_norm=1.0)
THEIRS = theirs.GradientClippingHookConfig(clip_mode="norm", max_norm=1.0)
ONE, NAN = torch.ones(8), torch.full((8,), math.nan)


def scaled(scale=256.0):
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    return accelerator


def hook(channel, **functions):
    hooks = PipelineHooks()
    hooks.register_hook(channel, HookContext.from_callable(**functions))
    return hooks


def trainer(rows, grad_clip=CLIP, *, hooks=(), accelerator=None, forward=None, optimizer=None,
            kind=HookBasedTrainer):  # fmt: skip
    if accelerator is None:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True)
    if optimizer is None:
        model = torch.nn.Linear(8, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.model = model
    made = kind(
        accelerator,
        optimizer.model,
        DataLoader(rows, batch_size=1),
        SimpleBatchProcessor.from_callable(forward or (lambda m, b: ({}, m(b).sum()))),
        optimizer,
        torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9),
        hooks=list(hooks),
        grad_clip=grad_clip,
        max_epoch=1,
    )
    made.inner = optimizer
    return made


# After an error.


@pytest.mark.parametrize("under_scaler", [False, True])
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"nonfinite": "raise"}, NonFiniteGradientError),
        ({"max_consecutive_skips": 0}, TooManySkipsError),
    ],
)
def test_a_run_goes_on_after_an_error_of_clipping(under_scaler, options, error):
    # At a scale of 1 an overflow is no longer the scaler's affair.
    accelerator = scaled(1.0) if under_scaler else None
    made = trainer([ONE, NAN, NAN], CLIP.replace(**options), accelerator=accelerator)
    with pytest.raises(error):
        made()
    before = made.inner.model.weight.clone()
    made.dataloader = DataLoader([ONE] * 2, batch_size=1)
    made()
    assert made.inner.model.weight.isfinite().all()
    assert not torch.equal(made.inner.model.weight, before)


def test_an_error_that_was_handled_already_and_comes_again_makes_no_step():
    error, calls = KeyError("one object"), []

    def forward(model, batch):
        calls.append(1)
        loss = model(batch).sum()
        if len(calls) in (2, 3):
            loss.backward()
            raise error
        return {}, loss

    made = trainer([ONE] * 3, forward=forward)
    with pytest.raises(KeyError):
        made()
    try:
        raise error
    except KeyError:
        before = made.inner.model.weight.clone(), made.lr_scheduler.scheduler.last_epoch
        with pytest.raises(KeyError):
            made()
    assert torch.equal(made.inner.model.weight, before[0])
    assert made.lr_scheduler.scheduler.last_epoch == before[1]


@pytest.mark.parametrize("misplaced", [False, True])
def test_no_error_of_its_own_is_kept_alive(misplaced):
    made = (
        trainer([ONE], None, hooks=[CLIP()])
        if misplaced
        else trainer([ONE, NAN], CLIP.replace(nonfinite="raise"))
    )
    try:
        made()
    except (ArgumentValueError, NonFiniteGradientError) as error:
        kept = weakref.ref(error)
    gc.collect()
    assert kept() is None


# What is left.


def test_nothing_stays_on_the_optimizer():
    model = torch.nn.Linear(8, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.model = model
    alive = []
    for _ in range(3):
        made = trainer([ONE, NAN], optimizer=optimizer)
        made()
        assert "step" not in vars(made.optimizer)
        alive.append(weakref.ref(made.accelerator))
        del made
    AcceleratorState._reset_state(reset_partial_state=True)
    gc.collect()
    assert not optimizer._optimizer_step_pre_hooks
    assert [each() for each in alive] == [None] * 3


@pytest.mark.parametrize("way", [deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_configuration_and_a_used_hook_can_be_copied(way):
    used = CLIP()
    trainer([ONE], lambda: used)()
    assert way(CLIP) == CLIP
    if way is deepcopy:
        assert deepcopy(used).max_norm == 1.0


# In odd places.


def stepped_by_the_batch_processor(config):
    torch.manual_seed(0)

    def forward(model, batch):
        (model(batch) ** 2).sum().backward()
        made.inner.step()
        made.inner.zero_grad()
        return {}, model(batch).sum()

    made = trainer([ONE] * 2, config, forward=forward)
    made()
    return made.inner.model.weight


def test_a_batch_processor_may_step_by_itself():
    """The optimizer behind the wrapper, without gradients of the pipeline's step."""
    ours, reference = stepped_by_the_batch_processor(CLIP), stepped_by_the_batch_processor(THEIRS)
    torch.testing.assert_close(ours, reference)


def test_an_after_in_front_that_fails_leaves_the_optimizer_usable():
    def boom(arg):
        raise KeyError("user")

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model, wrapped, scheduler = accelerator.prepare(model, optimizer, scheduler)
    front = hook("on_step", after=boom)
    hooks = PipelineHooks.from_hooks([front, CLIP(), OptimizerHookConfig()])

    def step(hooks):
        arg = PipelineHookArgs(accelerator, model=model, optimizer=wrapped, lr_scheduler=scheduler)
        with hooks.begin("on_step", arg):
            model(ONE).sum().backward()

    with pytest.raises(KeyError):
        step(hooks)
    optimizer.step()
    step(PipelineHooks.from_hooks([CLIP(), OptimizerHookConfig()]))  # another hook, next step


def test_two_of_them_are_refused():
    made = trainer([ONE], CLIP, hooks=[CLIP()])
    before = made.inner.model.weight.clone()
    with pytest.raises(DoubleClippingError, match="there are two of gradclip's"):
        made()
    assert torch.equal(made.inner.model.weight, before)


def test_a_misplaced_one_is_refused_under_a_scaler_too():
    made = trainer([NAN, ONE], None, hooks=[CLIP()], accelerator=scaled())
    with pytest.raises(ArgumentValueError, match="comes after what steps"):
        made()
    assert made.accelerator.scaler.get_scale() == 256.0


@dataclass
class OwnArgs(PipelineHookArgs):
    tag: str = "x"


class OwnTrainer(HookBasedTrainer):
    def _get_hook_args(self, **options):
        return OwnArgs(**super()._get_hook_args(**options).__dict__)


def test_a_trainer_with_args_of_its_own():
    seen = []

    def look(arg):
        assert isinstance(arg, OwnArgs)
        seen.append((arg.copy_with_updates(tag="y").tag, arg.clip_result.to_host().norm_post))

    trainer([ONE], kind=OwnTrainer, hooks=[hook("on_step", after=look)])()
    assert seen == [("y", pytest.approx(1.0))]


def test_a_file_of_theirs_is_read_for_their_trainer():
    text = (
        "__config_type__: robo_orchard_lab.pipeline.hooks.grad_clip:GradientClippingHookConfig\n"
        "clip_mode: norm\nclip_value: null\nmax_norm: 1.0\n"
    )
    config = GradientClippingHookConfig.from_str(text, "yaml")
    assert config == CLIP
    trainer([ONE], config)()


@pytest.mark.parametrize("window", [1, 2])
def test_a_record_has_the_losses_and_goes_on_from_a_checkpoint_inside_an_epoch(tmp_path, window):
    def trainer(rows, **options):
        model = torch.nn.Linear(64, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return HookBasedTrainer(
            accelerator=Accelerator(cpu=True, gradient_accumulation_steps=window),
            model=model,
            dataloader=DataLoader(rows, batch_size=1),
            batch_processor=SimpleBatchProcessor.from_callable(
                lambda model, batch: (None, (model(batch) * 0 + 7.0).sum())
            ),
            optimizer=optimizer,
            lr_scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
            grad_clip=CLIP.replace(record=str(tmp_path / "record")),
            **options,
        )

    rows = [torch.full((64,), 1.0 + seed) for seed in range(5)]
    save = SaveCheckpointConfig(save_root=str(tmp_path / "run"), save_step_freq=4)
    trainer(rows, max_step=6, hooks=[save])()
    before = read_record(tmp_path / "record")
    resumed = ResumeCheckpointConfig(resume_from=str(tmp_path / "run"))
    trainer(rows, max_step=9, resume_from=resumed)()
    steps = read_record(tmp_path / "record")
    assert [step.step for step in steps] == list(range(len(steps)))
    assert {step.loss for step in steps} == {7.0}
    assert len(steps) > len(before)
