"""DeepSpeed: what gradclip refuses, before anything is changed."""

from itertools import islice

import pytest
import torch
from deepspeed_runs import (
    BATCH,
    LIMIT,
    NEEDS_DEEPSPEED,
    RANKS,
    Collect,
    Model,
    accelerator,
    by_hand,
    forward,
    loader,
    momentum,
    on_two,
    weights,
)

from gradclip import ObserveClip, ValueClip
from gradclip.errors import (
    ArgumentValueError,
    DoubleClippingError,
)
from gradclip.integrations.deepspeed import EngineWatch, lower, observe
from gradclip.pipeline import HookBasedTrainer, SimpleBatchProcessor
from gradclip.pipeline.hooks import (
    GradientClippingHookConfig,
    OptimizerHook,
    PipelineHookArgs,
    PipelineHooks,
    SaveCheckpointConfig,
)

pytestmark = NEEDS_DEEPSPEED


def refused(function, *args):
    with pytest.raises(DoubleClippingError) as caught:
        function(*args)
    assert caught.value.code == "GC101"
    return str(caught.value)


def trainer_for(accelerated, config=None, **options):
    model = Model()
    return HookBasedTrainer(
        accelerated,
        model,
        loader(BATCH),
        SimpleBatchProcessor.from_callable(forward),
        momentum(model),
        grad_clip=config or GradientClippingHookConfig(clip_mode="norm", max_norm=LIMIT),
        max_step=2,
        **options,
    )


def trainers(rank):
    said = []
    for clipping in (1.0, 0.0):
        accelerated = accelerator(2, gradient_clipping=clipping)
        before = dict(accelerated.deepspeed_plugin.deepspeed_config)
        said.append(refused(trainer_for, accelerated))
        assert accelerated._models == []
        assert accelerated.deepspeed_plugin.deepspeed_config == before
    accelerated = accelerator(2)
    for config in (
        GradientClippingHookConfig(clip_mode="value", clip_value=0.5),
        GradientClippingHookConfig(clip_mode="norm", max_norm=1.0, norm_type=1),
        GradientClippingHookConfig(policy={"down.*": 1.0, "*": 0.5}),
        GradientClippingHookConfig(policy=0.5, nonfinite="propagate"),
        GradientClippingHookConfig(policy=0),
    ):
        refused(trainer_for, accelerated, config)
        assert accelerated._models == []
        assert accelerated.deepspeed_plugin.deepspeed_config["gradient_clipping"] == "auto"
    with pytest.raises(ArgumentValueError, match="unpickling"):
        trainer_for(accelerated, resume_from="runs/1")
    assert accelerated._models == []
    trainer = trainer_for(accelerated, hooks=SaveCheckpointConfig(save_root="runs/1"))
    with pytest.raises(ArgumentValueError, match="unpickling"):
        trainer()
    assert trainer.model.global_steps == 0
    # An engine that is there stays, for the same model and the same limit alone.
    with pytest.raises(ArgumentValueError, match="another model"):
        trainer_for(accelerated)
    options = {"max_step": 2, "hooks": Collect()}
    again = HookBasedTrainer(
        accelerated,
        trainer.model,
        loader(BATCH),
        SimpleBatchProcessor.from_callable(forward),
        trainer.optimizer,
        grad_clip=GradientClippingHookConfig(policy=LIMIT),
        **options,
    )
    again()
    assert again.model is trainer.model
    assert trainer.model.global_steps == 2
    assert [result.threshold for result, *_ in options["hooks"].steps] == [pytest.approx(LIMIT)] * 2
    return said


def test_the_trainer_refuses_before_it_prepares():
    other, none = on_two(trainers)

    assert "DeepSpeed  gradient_clipping = 1.0\n" in other
    assert "gradclip   max_norm          = 0.05\n" in other
    assert other.endswith("No parameters were changed.")
    assert "DeepSpeed  gradient_clipping = 0.0\n" in none


def engines(rank):
    """Engines that were made before gradclip was asked, in loops of one's own."""
    accelerated = accelerator(1)
    model = Model()
    engine, optimizer, batches = accelerated.prepare(model, momentum(model), loader(BATCH))
    assert engine.gradient_clipping() == 1.0  # Accelerate's "auto"
    said = [refused(lower, accelerated, LIMIT), refused(observe, engine, LIMIT)]
    lower(accelerated, 1.0)  # what it has

    before = weights(engine)
    for policy in (LIMIT, ValueClip(clip_value=1.0)):
        hooks = PipelineHooks.from_hooks(
            [GradientClippingHookConfig(policy=policy), OptimizerHook()]
        )
        arg = PipelineHookArgs(accelerator=accelerated, model=engine, optimizer=optimizer)

        def step(hooks=hooks, arg=arg):
            with accelerated.accumulate(engine), hooks.begin("on_step", arg):
                accelerated.backward(forward(engine, next(iter(batches)))[1])

        said.append(refused(step))
    assert engine.global_steps == 0
    assert all(torch.equal(before[name], after) for name, after in weights(engine).items())

    hooks = PipelineHooks.from_hooks([OptimizerHook(), GradientClippingHookConfig(policy=1.0)])
    seen = []
    for batch in islice(batches, 3):
        arg = PipelineHookArgs(accelerator=accelerated, model=engine, optimizer=optimizer)
        with accelerated.accumulate(engine), hooks.begin("on_step", arg):
            accelerated.backward(forward(engine, batch)[1])
        assert arg.is_optimizer_step_committed
        seen.append(arg.clip_result.to_host().norm_pre)
    assert engine.global_steps == 3

    with (
        pytest.raises(ArgumentValueError, match="made no step"),
        hooks.begin("on_step", PipelineHookArgs(accelerated, model=engine, optimizer=optimizer)),
    ):
        pass  # a loop that forgets accelerator.backward
    return said, seen


def test_an_engine_with_another_limit_is_refused_before_its_first_step():
    (lowering, observing, stepping, by_value), norms = on_two(engines)

    for text in (lowering, observing, stepping):
        assert "DeepSpeed  gradient_clipping = 1.0\n" in text
        assert "gradclip   max_norm          = 0.05\n" in text
        assert "gradclip.integrations.deepspeed.lower(accelerator, 0.05)" in text
        assert text.endswith("No parameters were changed.")
    assert "ValueClip" in by_value
    wanted, _ = by_hand(1.0)
    assert norms == pytest.approx([each.norm_pre for each in wanted[:3]], rel=1e-5)


def initialized(config):
    import deepspeed  # noqa: PLC0415

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = Model()
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_allow_untested_optimizer": True,
        **config,
    }
    return deepspeed.initialize(model=model, optimizer=momentum(model), config=config)[0]


def without_accelerate(rank, folder):
    zero = {"zero_optimization": {"stage": 1}}
    said = [refused(EngineWatch, initialized(zero), LIMIT)]
    for config, wrong in (
        ({}, "stage = 0"),
        (
            {
                "zero_optimization": {"stage": 2, "compute_grad_norm": False},
                "gradient_clipping": 0.0,
            },
            "compute_grad_norm",
        ),
        ({**zero, "bf16": {"enabled": True, "check_grad_overflow": False}}, "check_grad_overflow"),
    ):
        assert wrong in refused(EngineWatch, initialized(config), ObserveClip())

    config = dict(zero)
    lower(config, LIMIT)
    engine = initialized(config)
    watch = EngineWatch(engine, LIMIT)
    with pytest.raises(ArgumentValueError, match="no step"):
        observe(engine, LIMIT)
    hooks = PipelineHooks.from_hooks([GradientClippingHookConfig(policy=LIMIT), OptimizerHook()])
    batches = list(loader(BATCH))[rank::RANKS]
    norms = []
    for batch in batches[:2]:
        arg = PipelineHookArgs(model=engine, optimizer=engine.optimizer)
        with hooks.begin("on_step", arg):
            engine.backward(forward(engine, batch)[1])
            engine.step()
        assert arg.is_optimizer_step_committed
        norms.append(arg.clip_result.to_host().norm_pre)
        assert watch.observe().to_host().norm_pre == norms[-1]
        assert watch.observe() is None  # it was observed already
    assert engine.global_steps == 2

    # A checkpoint brings back the limit that it was saved with.
    other = initialized({**zero, "gradient_clipping": 7.0})
    other.backward(forward(other, batches[0])[1])
    other.step()
    other.save_checkpoint(folder)
    engine.load_checkpoint(folder)
    said.append(refused(watch.check))
    arg = PipelineHookArgs(model=engine, optimizer=engine.optimizer)
    said.append(refused(hooks.begin("on_step", arg).__enter__))
    return said, norms


def test_without_accelerate(tmp_path):
    (absent, *loaded), norms = on_two(without_accelerate, str(tmp_path))

    assert "DeepSpeed  gradient_clipping = 1.0    (not set; DeepSpeed's default)\n" in absent
    for text in loaded:
        assert "DeepSpeed  gradient_clipping = 7.0    (loaded from a checkpoint)\n" in text
        assert text.endswith("The engine has made 1 step with its own limit.")
    wanted, _ = by_hand(LIMIT)
    assert norms == pytest.approx([each.norm_pre for each in wanted[:2]], rel=1e-5)
