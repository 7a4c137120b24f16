import copy
import warnings
from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradclip import clip_grad_norm_
from gradclip.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    DoubleClippingError,
    GradClipError,
    TooManySkipsError,
)
from gradclip.pipeline import HookBasedTrainer, ResumeCheckpointConfig, SimpleBatchProcessor
from gradclip.pipeline.hooks import (
    GradientClippingHook,
    GradientClippingHookConfig,
    HookContext,
    HookListConfig,
    OptimizerHook,
    OptimizerHookConfig,
    PipelineHooks,
    SaveCheckpointConfig,
    ValidationHook,
    ValidationHookConfig,
)

CLIP = GradientClippingHookConfig(clip_mode="norm", max_norm=0.05)


def data():
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (
        torch.randn(20, 3, generator=generator),
        torch.randn(20, 1, generator=generator),
    )
    return TensorDataset(inputs, targets)


def loss(model, batch):
    inputs, targets = batch
    outputs = model(inputs)
    return outputs, nn.functional.mse_loss(outputs, targets)


@dataclass
class Parts:
    model: nn.Module
    dataloader: object
    batch_processor: object
    optimizer: object
    lr_scheduler: object


def parts(batch_size=4):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return Parts(
        model,
        DataLoader(data(), batch_size=batch_size),
        SimpleBatchProcessor.from_callable(loss),
        optimizer,
        torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5),
    )


def trainer(accelerator=None, **fields):
    given = vars(parts()) | fields
    if not {"max_step", "max_epoch"} & fields.keys():
        given["max_epoch"] = 2
    return HookBasedTrainer(accelerator or Accelerator(cpu=True), **given)


def on(channel, **functions):
    hooks = PipelineHooks()
    hooks.register_hook(channel, HookContext.from_callable("test", **functions))
    return hooks


@pytest.mark.smoke
@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("clip", [CLIP, None])
def test_it_trains_bit_for_bit_like_a_loop_written_by_hand(weights, accumulate, clip):
    ours = trainer(
        Accelerator(cpu=True, gradient_accumulation_steps=accumulate), grad_clip=clip, max_epoch=3
    )
    ours()

    hand = parts()
    rates = []
    for _ in range(3):
        batches = list(hand.dataloader)
        for number, batch in enumerate(batches, start=1):
            value = loss(hand.model, batch)[1] / accumulate
            value.backward()
            # A window ends with the epoch too.
            if number % accumulate == 0 or number == len(batches):
                if clip is not None:
                    clip_grad_norm_(hand.model.parameters(), 0.05)
                hand.optimizer.step()
                hand.lr_scheduler.step()
                hand.optimizer.zero_grad()
                rates.append(hand.optimizer.param_groups[0]["lr"])
    assert weights(ours.model) == weights(hand.model)
    assert ours.optimizer.param_groups[0]["lr"] == rates[-1]
    assert ours.trainer_progress_state.optimizer_step_id == len(rates)


def test_clipping_happens_where_a_window_ends():
    results = []
    hooks = on("on_step", after=lambda arg: results.append(arg.clip_result is not None))
    trainer(
        Accelerator(cpu=True, gradient_accumulation_steps=2),
        hooks=hooks,
        grad_clip=CLIP,
        max_epoch=2,
    )()
    # Five batches an epoch.
    assert results == [False, True, False, True, True] * 2


def test_the_channels_nest_and_count_as_in_the_original():
    log = []

    def note(channel):
        return HookContext.from_callable(
            before=lambda a: log.append(f"{channel} {a.epoch_id} {a.step_id} {a.global_step_id}"),
            after=lambda a: log.append(f"/{channel}"),
        )

    hooks = PipelineHooks()
    for channel in hooks.hooks:
        hooks.register_hook(channel, note(channel))
    trainer(dataloader=DataLoader(data(), batch_size=10), hooks=hooks, max_epoch=2)()

    def step(where):
        return [
            f"on_step {where}",
            f"on_batch {where}",
            f"on_model_forward {where}",
            "/on_model_forward",
            f"on_model_backward {where}",
            "/on_model_backward",
            "/on_batch",
            f"on_optimizer_step {where}",
            "/on_optimizer_step",
            "/on_step",
        ]

    assert log == [
        "on_loop 0 0 0",
        "on_epoch 0 0 0",
        *step("0 0 0"),
        *step("0 1 1"),
        "/on_epoch",
        "on_epoch 1 0 2",
        *step("1 0 2"),
        *step("1 1 3"),
        "/on_epoch",
        "/on_loop",
    ]


def test_hooks_are_given_everything():
    seen = {}

    def look(arg):
        seen.update(vars(arg))

    run = trainer(
        hooks=on("on_optimizer_step", after=look), grad_clip=CLIP, max_step=3, max_epoch=9
    )
    run()
    assert seen["accelerator"] is run.accelerator
    assert seen["model"] is run.model
    assert seen["optimizer"] is run.optimizer
    assert seen["lr_scheduler"] is run.lr_scheduler
    assert seen["dataloader"] is run.dataloader
    assert (seen["max_step"], seen["max_epoch"]) == (3, 9)
    assert (seen["step_id"], seen["optimizer_step_id"]) == (2, 2)
    assert seen["model_outputs"].shape == (4, 1)
    assert seen["reduce_loss"].ndim == 0
    assert seen["clip_result"] is not None
    assert seen["is_optimizer_step_committed"]


def test_micro_steps_are_counted():
    seen = []
    trainer(
        Accelerator(cpu=True, gradient_accumulation_steps=3),
        hooks=on(
            "on_step", before=lambda arg: seen.append((arg.micro_step_id, arg.optimizer_step_id))
        ),
        max_epoch=2,
    )()
    window = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]
    assert seen == window + [(micro, step + 2) for micro, step in window]


def test_max_step_counts_batches_over_epochs():
    run = trainer(max_step=7)
    run()
    state = run.trainer_progress_state
    assert (state.epoch_id, state.step_id, state.global_step_id) == (1, 2, 7)


def test_it_goes_on_where_the_last_call_ended(weights):
    whole = trainer(max_step=12, grad_clip=CLIP)
    whole()
    run = trainer(max_step=7, grad_clip=CLIP)
    run()
    run()
    assert run.trainer_progress_state.global_step_id == 7
    run.max_step = 12
    run()
    assert weights(run.model) == weights(whole.model)


def test_what_was_left_behind_by_an_earlier_loop_does_not_matter(weights):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    run = trainer(accelerator, max_step=10)
    with accelerator.accumulate(run.model):
        run.model(torch.ones(1, 3)).sum().backward()
    run()
    fresh = trainer(Accelerator(cpu=True, gradient_accumulation_steps=3), max_step=10)
    fresh()
    assert weights(run.model) == weights(fresh.model)


def test_after_an_error_a_second_call_begins_with_the_batch_that_failed():
    failing = iter([False, True] + [False] * 20)
    seen = []

    def fail(arg):
        if next(failing):
            raise KeyError
        seen.append(arg.batch[1].tolist())

    run = trainer(hooks=on("on_batch", before=fail), max_epoch=1)
    with pytest.raises(KeyError):
        run()
    assert not run.accelerator.gradient_state.in_dataloader
    run()
    targets = [batch[1].tolist() for batch in DataLoader(data(), batch_size=4)]
    assert seen == targets


def test_the_accelerator_is_made_by_default():
    run = HookBasedTrainer(**vars(parts()), max_step=1)
    assert isinstance(run.accelerator, Accelerator)
    run()


def test_arguments_stand_in_the_order_of_the_original():
    p = parts()
    run = HookBasedTrainer(
        Accelerator(cpu=True),
        p.model,
        p.dataloader,
        p.batch_processor,
        p.optimizer,
        p.lr_scheduler,
        [],
        2,
    )
    run()
    assert run.trainer_progress_state.global_step_id == 2


def test_there_need_be_no_scheduler_and_no_dataloader():
    batches = list(DataLoader(data(), batch_size=5))
    run = trainer(dataloader=batches, lr_scheduler=None, max_epoch=2)
    run()
    assert run.trainer_progress_state.global_step_id == 8
    assert run.lr_scheduler is None


def test_hooks_that_change_during_the_run_count_from_the_next_step():
    seen = []
    mine = PipelineHooks()
    handle = mine.register_hook(
        "on_step", HookContext.from_callable(before=lambda arg: seen.append(arg.global_step_id))
    )
    late = HookContext.from_callable(before=lambda arg: seen.append(-arg.global_step_id))

    def change(arg):
        if arg.global_step_id == 2:
            handle.remove()
            mine.register_hook("on_step", late)

    trainer(hooks=[mine, on("on_step", after=change)], max_step=5)()
    assert seen == [0, 1, 2, -3, -4]


class Unsized:
    """An iterable without a length; it may know its place."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Remembering(Unsized):
    done = 0

    def __iter__(self):
        while self.done < len(self.batches):
            self.done += 1
            yield self.batches[self.done - 1]
        self.done = 0

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


@pytest.mark.parametrize("kind", [list, tuple, Unsized, Remembering])
@pytest.mark.parametrize("accumulate", [2, 3, 9])
def test_a_window_ends_with_the_epoch_of_any_iterable(weights, kind, accumulate):
    """As it does with a DataLoader's."""
    runs = []
    loader = DataLoader(data(), batch_size=4)
    for dataloader in (loader, kind(list(loader))):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        run = trainer(
            Accelerator(cpu=True, gradient_accumulation_steps=accumulate),
            dataloader=dataloader,
            grad_clip=CLIP,
            max_epoch=3,
        )
        run()
        runs.append((weights(run.model), run.trainer_progress_state))
    assert runs[0] == runs[1]
    assert runs[0][1].micro_step_id == 0


def test_a_window_goes_over_the_epochs_end_where_accelerate_is_told_so():
    plugin = GradientAccumulationPlugin(num_steps=3, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    batches = list(DataLoader(data(), batch_size=4))
    run = trainer(accelerator, dataloader=batches, max_epoch=3)
    run()
    assert run.trainer_progress_state.optimizer_step_id == 5


def test_hooks_stand_in_the_order_of_the_original():
    user = on("on_step")
    validation = ValidationHookConfig(eval_callback=print, step_eval_freq=1)
    run = trainer(hooks=user, grad_clip=CLIP, validation=validation)
    kinds = [type(each) for each in run.hooks.registered_sets]
    assert kinds == [GradientClippingHook, OptimizerHook, ValidationHook, PipelineHooks]
    assert run.hooks.hooks["on_step"][3] is user.hooks["on_step"][0]


def test_a_clipping_hook_among_hooks_clips_though_the_optimizer_hook_comes_first():
    norms = []
    watch = on(
        "on_optimizer_step", after=lambda arg: norms.append(float(arg.clip_result.norm_post))
    )
    run = trainer(hooks=[CLIP, watch], max_epoch=1)
    assert [type(each) for each in run.hooks.registered_sets[:2]] == [
        OptimizerHook,
        GradientClippingHook,
    ]
    run()
    assert max(norms) <= 0.05 * (1 + 1e-6)
    assert len(norms) == 5


def test_an_optimizer_hook_of_the_user_takes_the_place_of_the_trainers(weights):
    class Mine(OptimizerHook):
        pass

    run = trainer(
        hooks=[Mine(), CLIP],
        validation=ValidationHookConfig(eval_callback=print, epoch_eval_freq=9),
    )
    assert [type(each) for each in run.hooks.registered_sets] == [
        Mine,
        GradientClippingHook,
        ValidationHook,
    ]
    run()
    plain = trainer(grad_clip=CLIP)
    plain()
    assert weights(run.model) == weights(plain.model)


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"grad_clip": CLIP, "hooks": CLIP}, DoubleClippingError, "2 clipping hooks"),
        ({"hooks": [CLIP, CLIP]}, DoubleClippingError, "2 clipping hooks"),
        ({"hooks": [HookListConfig(hooks=(CLIP,)), CLIP]}, DoubleClippingError, "2 clipping hooks"),
        (
            {"hooks": [OptimizerHookConfig(), OptimizerHook()]},
            ArgumentValueError,
            "2 optimizer hooks",
        ),
        ({"hooks": ["clip"]}, ArgumentTypeError, "PipelineHooks"),
        ({"grad_clip": 1.0}, ArgumentTypeError, "grad_clip is 1.0"),
        ({"grad_clip": OptimizerHookConfig()}, ArgumentTypeError, "grad_clip"),
        ({"validation": CLIP}, ArgumentTypeError, "validation"),
        ({"max_step": None, "max_epoch": None}, ArgumentValueError, "either max_step or max_epoch"),
        ({"max_step": 0}, ArgumentValueError, "max_step = 0 < 1"),
        ({"max_epoch": -1}, ArgumentValueError, "max_epoch = -1 < 1"),
        ({"max_step": 2.5}, ArgumentTypeError, "max_step is 2.5"),
        ({"max_step": True}, ArgumentTypeError, "max_step is True"),
        ({"model": None}, ArgumentTypeError, "model is missing"),
        ({"model": "gpt"}, ArgumentTypeError, "model is of type str"),
        ({"dataloader": 3}, ArgumentTypeError, "dataloader is of type int"),
        ({"batch_processor": loss}, ArgumentTypeError, "from_callable"),
        ({"batch_processor": None}, ArgumentTypeError, "batch_processor is missing"),
        ({"optimizer": torch.optim.SGD}, ArgumentTypeError, "optimizer is of type type"),
        ({"lr_scheduler": 0.1}, ArgumentTypeError, "lr_scheduler is of type float"),
        ({"resume_from": 3}, ArgumentTypeError, "resume_from is of type int"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_prepared(fields, error, said):
    accelerator = Accelerator(cpu=True)
    with pytest.raises(error, match=said) as caught:
        trainer(accelerator, **fields)
    assert isinstance(caught.value, GradClipError)
    assert accelerator._models == accelerator._optimizers == accelerator._dataloaders == []


def test_what_training_alone_needs_may_be_none_until_then():
    p = parts()
    only_evaluates = {"dataloader": None, "optimizer": None, "lr_scheduler": None}
    run = HookBasedTrainer(Accelerator(cpu=True), **vars(p) | only_evaluates, max_epoch=1)
    assert run.dataloader is run.optimizer is None
    with pytest.raises(ArgumentTypeError, match="dataloader is None: training needs one"):
        run()
    with pytest.raises(ArgumentTypeError, match="optimizer is missing"):
        HookBasedTrainer(Accelerator(cpu=True), p.model, [1], p.batch_processor, max_epoch=1)


@pytest.mark.parametrize(
    ("with_optimizer", "each_window"), [(True, 1), (False, 3)], ids=["default", "with False"]
)
def test_the_scheduler_follows_the_accelerator_in_a_window(with_optimizer, each_window):
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=3,
        step_scheduler_with_optimizer=with_optimizer,
    )
    p = parts(batch_size=2)
    p.lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(p.optimizer, 0.5)
    failing = iter([False] * 4 + [True] + [False] * 9)

    def fail(arg):
        if next(failing):
            raise KeyError

    run = HookBasedTrainer(
        accelerator, **vars(p), hooks=on("on_model_forward", before=fail), max_step=6
    )
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(KeyError):
            run()
        # The window that was broken off is made whole, and its steps of the scheduler count once.
        assert p.optimizer.param_groups[0]["lr"] == 0.1 * 0.5**each_window
        run()
    assert p.optimizer.param_groups[0]["lr"] == 0.1 * 0.5 ** (2 * each_window)
    said = [w for w in warned if "3 times for each step" in str(w.message)]
    assert len(said) == (not with_optimizer)


def test_begin_and_end_are_logged(caplog):
    with caplog.at_level("INFO", "gradclip"):
        trainer(max_epoch=1)()
        trainer(max_epoch=1, grad_clip=CLIP)()
    assert [record.message for record in caplog.records] == [
        "BEGIN TRAINING from epoch 0 and step 0",
        "FINISH TRAINING after 1 epochs and 5 steps",
        "BEGIN TRAINING from epoch 0 and step 0",
        "FINISH TRAINING after 1 epochs and 5 steps; 5 of 5 optimizer steps were clipped",
    ]


def test_a_scheduler_that_needs_a_metric_is_refused():
    p = parts()
    p.lr_scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(p.optimizer)
    with pytest.raises(ArgumentTypeError, match="needs a metric"):
        HookBasedTrainer(Accelerator(cpu=True), **vars(p), max_step=1)


@pytest.mark.parametrize("dataloader", [[], iter([])])
def test_a_dataloader_without_batches_does_not_train_forever(dataloader):
    with pytest.raises(ArgumentValueError, match="no batch in epoch 0"):
        trainer(dataloader=dataloader, max_step=3)()


def test_an_iterator_that_ends_is_named():
    batches = iter(list(DataLoader(data(), batch_size=10)))
    with pytest.raises(ArgumentValueError, match="no batch in epoch 1"):
        trainer(dataloader=batches, max_step=5)()


@pytest.mark.parametrize("where", ["forward", "backward", "on_batch", "on_step"])
def test_nothing_steps_when_a_step_fails(weights, where):
    run = trainer(hooks=[], grad_clip=CLIP, max_epoch=1)
    failing = iter([False, False, True])

    def fail(arg):
        if next(failing):
            raise KeyError

    channel = {"forward": "on_model_forward", "backward": "on_model_backward"}.get(where, where)
    run.hooks.register_hook(channel, HookContext.from_callable(before=fail))
    seen = []
    run.hooks.register_hook(
        "on_optimizer_step", HookContext.from_callable(after=lambda arg: seen.append(arg.exception))
    )
    run.hooks.register_hook(
        "on_loop", HookContext.from_callable(after=lambda arg: seen.append(arg.exception))
    )
    reference = trainer(grad_clip=CLIP, max_step=2)
    reference()
    with pytest.raises(KeyError) as caught:
        run()
    assert weights(run.model) == weights(reference.model)
    assert seen == [None, None, caught.value]
    assert run.trainer_progress_state.global_step_id == 2


def test_skipped_steps_move_nothing_and_then_raise(weights):
    dataset = data()
    dataset.tensors[0][:] = float("nan")
    config = GradientClippingHookConfig(clip_mode="norm", max_norm=1.0, max_consecutive_skips=2)
    run = trainer(dataloader=DataLoader(dataset, batch_size=4), grad_clip=config, max_epoch=1)
    before = copy.deepcopy(weights(run.model))
    with pytest.raises(TooManySkipsError):
        run()
    assert weights(run.model) == before
    assert run.optimizer.state_dict()["state"] == {}
    assert run.lr_scheduler.scheduler.last_epoch == 0
    assert run.trainer_progress_state.optimizer_step_id == 0


def test_validation_runs_after_the_optimizer_step_of_its_step(weights):
    seen = []
    config = ValidationHookConfig(
        eval_callback=lambda model: seen.append((model.training, weights(model))),
        step_eval_freq=2,
        eval_at_begin=True,
    )
    run = trainer(validation=config, max_step=2)
    begin = weights(run.model)
    run()
    assert seen == [(False, begin), (False, weights(run.model))]
    assert run.model.training


def test_checkpoint_hooks_come_last(tmp_path):
    save = SaveCheckpointConfig(save_root=str(tmp_path))
    for hooks in (
        [save, on("on_step")],
        [HookListConfig(hooks=(save,)), OptimizerHook(), on("on_step")],
    ):
        run = trainer(hooks=hooks)
        assert run.hooks.hooks["on_step"][-1].name == "save checkpoint"


def test_resume_config_names_a_path():
    assert ResumeCheckpointConfig(resume_from="runs/1").resume_from == "runs/1"
