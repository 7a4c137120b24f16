"""DeepSpeed on two processes: its limit is gradclip's, and its norm is gradclip's."""

import math
import re
import runpy
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, GradientState
from deepspeed_runs import (
    BATCH,
    LIMIT,
    NEEDS_DEEPSPEED,
    RANKS,
    STEPS,
    Collect,
    Model,
    accelerator,
    accelerator_for,
    by_hand,
    forward,
    loader,
    momentum,
    on_two,
    weights,
)

from gradclip import NormClip, ObserveClip
from gradclip.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    NonFiniteGradientError,
    TooManySkipsError,
)
from gradclip.integrations.deepspeed import EngineWatch, lower, observe
from gradclip.pipeline import HookBasedTrainer, SimpleBatchProcessor
from gradclip.pipeline.hooks import (
    GradientClippingHookConfig,
    HookContext,
    PipelineHooks,
)
from pairwise import ALL_COMBINATIONS
from processes import together


def some(arguments, cases, more):
    """Parametrize a test that starts engines: by more cases if all are asked for."""
    return pytest.mark.parametrize(arguments, [*cases, *(more if ALL_COMBINATIONS else [])])


pytestmark = NEEDS_DEEPSPEED
EXAMPLE = Path(__file__).parents[2] / "examples" / "deepspeed_zero.py"
TO = {"rtol": 1e-5, "atol": 1e-6}
"""How far float32 weights may be from those of one process after ten steps."""


# What is lowered is what clips, and what is observed is what was there.


def lowered(rank, stage, policy, lr):
    accelerated = accelerator(stage)
    lower(accelerated, policy)
    model = Model()
    engine, _, batches = accelerated.prepare(model, momentum(model, lr), loader(BATCH))
    assert type(engine.optimizer).__name__.endswith("Stage3") == (stage == 3)
    results = []
    for batch in batches:
        accelerated.backward(forward(engine, batch)[1])
        results.append(observe(engine, policy).to_host())
    return engine.gradient_clipping(), results, weights(engine)


CLIP, WATCH = NormClip(max_norm=LIMIT), ObserveClip()


@some(("stage", "policy"), [(1, WATCH), (2, CLIP), (3, CLIP)], [(1, CLIP), (2, WATCH), (3, WATCH)])
def test_ten_steps_end_where_one_process_ends(stage, policy):
    lr = 0.5 if isinstance(policy, NormClip) else 0.01  # not clipped, 0.5 blows up
    limit, found, weights = on_two(lowered, stage, policy, lr)
    wanted, reference = by_hand(policy, lr)

    assert limit == (LIMIT if isinstance(policy, NormClip) else 0.0)
    assert len(found) == STEPS
    for have, want in zip(found, wanted, strict=True):
        assert math.isclose(have.norm_pre, want.norm_pre, rel_tol=1e-5)
        assert math.isclose(have.norm_post, want.norm_post, rel_tol=3e-5)
        assert have.threshold == want.threshold
        assert (have.clipped, have.skipped, have.nonfinite) == (want.clipped, False, 0)
    if isinstance(policy, NormClip):
        assert sum(each.clipped for each in found) >= STEPS - 2  # or there is nothing to compare
    for name, want in reference.items():
        torch.testing.assert_close(weights[name], want.detach(), **TO)


# The trainer: it lowers, observes, and does not step a second time.


def run(accelerated, batch_size, *, config, max_step=None, gamma=1.0):
    model = Model()
    optimizer = momentum(model)
    collect = Collect()
    trainer = HookBasedTrainer(
        accelerated,
        model,
        loader(batch_size),
        SimpleBatchProcessor.from_callable(forward),
        optimizer,
        torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma),
        hooks=collect,
        grad_clip=config,
        max_epoch=2,
        max_step=max_step,
    )
    trainer()
    return trainer, collect.steps


def by_trainer(rank, stage, window):
    accelerated = accelerator(stage, gradient_accumulation_steps=window)
    config = GradientClippingHookConfig(clip_mode="norm", max_norm=LIMIT)
    # Accelerate steps a scheduler once for each process, as it does under DDP.
    trainer, steps = run(accelerated, BATCH, config=config, gamma=0.9)
    assert trainer.model.gradient_clipping() == LIMIT
    assert trainer.model.global_steps == len(steps) == 2 * STEPS // window
    return steps, weights(trainer.model)


@some(("stage", "window"), [(1, 1), (2, 2), (3, 2)], [(1, 2), (3, 1)])
def test_the_trainer_ends_where_one_process_ends(stage, window):
    steps, weights = on_two(by_trainer, stage, window)
    config = GradientClippingHookConfig(clip_mode="norm", max_norm=LIMIT)
    alone = Accelerator(cpu=True, gradient_accumulation_steps=window)
    trainer, wanted = run(alone, RANKS * BATCH, config=config, gamma=0.9**RANKS)

    for (have, made, rate), (want, _, rate_wanted) in zip(steps, wanted, strict=True):
        assert made
        assert math.isclose(rate, rate_wanted, rel_tol=1e-12)
        assert math.isclose(have.norm_pre, want.norm_pre, rel_tol=2e-5)
        assert have.clipped == want.clipped
    assert any(have.clipped for have, *_ in steps)
    for name, want in trainer.model.named_parameters():
        torch.testing.assert_close(weights[name], want.detach(), **TO)


# A NaN: DeepSpeed drops the step, and gradclip says so.


def poisoned(rank, stage, precision, factor, nonfinite, most):
    """Train with one batch whose loss is multiplied; return what happened around it."""
    accelerated = accelerator(stage, mixed_precision=precision)
    calls = []

    def forward_poisoned(model, batch):
        calls.append(None)
        outputs, loss = forward(model, batch)
        return outputs, loss * (factor if len(calls) == 3 else 1.0)

    model = Model()
    optimizer = momentum(model)
    collect, before = Collect(), []
    look = PipelineHooks()
    look.register_hook(
        "on_step",
        HookContext.from_callable("look", before=lambda arg: before.append(weights(arg.model))),
    )
    trainer = HookBasedTrainer(
        accelerated,
        model,
        loader(BATCH),
        SimpleBatchProcessor.from_callable(forward_poisoned),
        optimizer,
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        hooks=[look, collect],
        grad_clip=GradientClippingHookConfig(
            clip_mode="norm", max_norm=LIMIT, nonfinite=nonfinite, max_consecutive_skips=most
        ),
        max_step=5,
    )
    error = None
    try:
        trainer()
    except NonFiniteGradientError as raised:
        error = raised
    after = before[3] if error is None else weights(trainer.model)
    moved = any(not torch.equal(before[2][name], after[name]) for name in after)
    return collect.steps, moved, error, weights(trainer.model)


@some(("stage", "precision"), [(1, "no"), (2, "bf16"), (3, "no")], [(3, "bf16")])
def test_a_nan_is_a_skipped_step(stage, precision):
    steps, moved, error, weights = on_two(poisoned, stage, precision, math.nan, "skip", 1)

    assert error is None
    assert not moved
    assert [made for _, made, _ in steps] == [True, True, False, True, True]
    assert [result.skipped for result, *_ in steps] == [False, False, True, False, False]
    result, _, rate = steps[2]
    assert (result.norm_pre, result.norm_post, result.coefficient) == (math.inf, 0.0, 0.0)
    assert (result.clipped, result.nonfinite) == (False, 1)
    assert rate == steps[1][2] > steps[3][2]  # the scheduler waits too
    assert all(weight.isfinite().all() for weight in weights.values())


@some("stage", [1, 3], [2])
def test_raise_comes_right_after_a_step_that_was_not_made(stage):
    steps, moved, error, _ = on_two(poisoned, stage, "no", math.nan, "raise", 25)

    assert isinstance(error, NonFiniteGradientError)
    assert str(error).startswith("The total norm of order 2.0 for gradients from `parameters` is n")
    assert "at step 3 (measured by DeepSpeed)" in str(error)
    assert len(steps) == 2
    assert not moved


def test_too_many_skips_are_an_error():
    *_, moved, error, _ = on_two(poisoned, 2, "no", math.inf, "skip", 0)

    assert isinstance(error, TooManySkipsError)
    assert not moved


def test_a_finite_norm_that_float32_cannot_square_is_skipped_by_stage_1():
    """gradclip would clip it: DeepSpeed adds squares in float32, which end at a norm of 1.8e19."""
    steps, moved, error, _ = on_two(poisoned, 1, "no", 1e25, "skip", 1)

    assert error is None
    assert not moved
    assert steps[2][0].skipped


def stepped_on(rank):
    """Switch the look for a NaN off behind gradclip's back, where it is refused beforehand."""
    accelerated = accelerator(2, mixed_precision="bf16")
    lower(accelerated, LIMIT)
    model = Model()
    engine, _, batches = accelerated.prepare(model, momentum(model), loader(BATCH))
    watch = EngineWatch(engine, LIMIT)
    engine.optimizer.check_grad_overflow = False
    accelerated.backward(forward(engine, next(iter(batches)))[1] * math.nan)
    assert engine.was_step_applied()
    assert any(weight.isnan().any() for weight in weights(engine).values())
    with pytest.raises(NonFiniteGradientError) as caught:
        watch.observe()
    return str(caught.value)


def test_a_step_that_was_made_on_a_nan_is_an_error_whatever_was_asked():
    assert "DeepSpeed made the step all the same" in on_two(stepped_on)


def dropped_zero(rank):
    """Accelerate's plugin drops a 0, and DeepSpeed reads an absent key as 1.0."""
    accelerated = accelerator(1, gradient_clipping=0)
    assert "gradient_clipping" not in accelerated.deepspeed_plugin.deepspeed_config
    model = Model()
    untold, *_ = accelerated.prepare(model, momentum(model), loader(BATCH))
    accelerated = accelerator(1, gradient_clipping=0)
    lower(accelerated, math.inf)
    model = Model()
    told, *_ = accelerated.prepare(model, momentum(model), loader(BATCH))
    return untold.gradient_clipping(), told.gradient_clipping()


def test_a_zero_that_accelerate_drops_reaches_deepspeed():
    assert on_two(dropped_zero) == (1.0, 0.0)


def plugin_from_config(rank):
    found = []
    for value in ("auto", None, LIMIT):
        config = {
            "zero_optimization": {"stage": 2},
            "train_micro_batch_size_per_gpu": BATCH,
            **({} if value is None else {"gradient_clipping": value}),
        }
        accelerated = accelerator_for(DeepSpeedPlugin(hf_ds_config=config))
        lower(accelerated, LIMIT)
        model = Model()
        found.append(accelerated.prepare(model, momentum(model))[0].gradient_clipping())
    with pytest.raises(ArgumentTypeError, match="Accelerator or"):
        lower(object(), LIMIT)
    return found


def test_auto_absent_and_equal_are_lowered():
    assert on_two(plugin_from_config) == [LIMIT] * 3


# After an error.


def broken(rank, window):
    """Break the second batch, then train on; return the norms of the steps."""
    accelerated = accelerator(2, gradient_accumulation_steps=window)
    calls = []

    def breaking(model, batch):
        calls.append(None)
        if len(calls) == 2:
            raise KeyError("the second batch")
        return forward(model, batch)

    model = Model()
    collect = Collect()
    trainer = HookBasedTrainer(
        accelerated,
        model,
        [next(iter(loader(BATCH)))] * 4,
        SimpleBatchProcessor.from_callable(breaking),
        momentum(model, lr=0.0),
        hooks=collect,
        grad_clip=GradientClippingHookConfig(policy=LIMIT),
        max_step=4,
    )
    with pytest.raises(KeyError):
        trainer()
    error = None
    try:
        trainer()
    except ArgumentValueError as raised:
        error = str(raised)
    return [result.norm_pre for result, *_ in collect.steps], error


def test_a_broken_window_is_not_added_to_the_next():
    norms, error = on_two(broken, 2)
    assert norms == []
    assert "cannot drop the gradients" in error

    norms, error = on_two(broken, 1)
    assert error is None
    assert norms == [norms[0]] * 4


def example(rank):
    accelerator(2)  # without the operator that DeepSpeed would compile
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with redirect_stdout(StringIO()) as printed:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return printed.getvalue() if rank == 0 else ""


def test_the_example():
    printed, nothing = together(example, RANKS, env={"DS_ACCELERATOR": "cpu"})

    assert nothing == ""
    counts = re.findall(r"epoch \d: DeepSpeed clipped (\d+) of 64 steps, largest norm \d+", printed)
    assert len(counts) == 3
    assert all(10 < int(count) < 60 for count in counts)
    assert printed.endswith("gradient_clipping 5.0\n")
