"""What ranks do in the tests of Trainer on two processes: each function here runs on every rank."""

import math
import os

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers_runs import BATCH, LIMIT, ClippedTrainer, Keep, Model, arguments, dataset

from gradclip import ValueClip
from gradclip.errors import DoubleClippingError
from gradclip.integrations.transformers import GradientClippingCallback

RANKS, STEPS = 2, 5


class InOrder:
    """So that two ranks together see what one sees."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


class Ordered(InOrder, ClippedTrainer):
    pass


class Broken(Ordered):
    """The loss of the third step is NaN."""

    def compute_loss(self, *args, **options):
        loss = super().compute_loss(*args, **options)
        return loss * (math.nan if self.state.global_step == 2 else 1.0)


class Alone(InOrder, Trainer):
    """Without the mixin."""


def trainer_for(trainer, folder, policy=LIMIT, *, ranks=1, nonfinite="skip", **options):
    callback = GradientClippingCallback(policy, nonfinite=nonfinite)
    keep = Keep(callback)
    args = arguments(
        folder, max_steps=STEPS, per_device_train_batch_size=BATCH // ranks, optim="sgd", **options
    )
    return trainer(Model(), args, train_dataset=dataset(), callbacks=[callback, keep]), keep


def outcome(trainer, keep):
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [each.to_host() for each in keep.results], keep.weights, keep.rates, logged


def on_ddp(rank, folder):
    trainer, keep = trainer_for(Ordered, folder, ranks=RANKS)
    trainer.train()
    assert trainer.accelerator.num_processes == RANKS
    return outcome(trainer, keep)


def engined(trainer, folder, *, clipping="auto", max_grad_norm=0.0, **options):
    """Make a trainer under ZeRO 2, as the first of this process."""
    import deepspeed  # noqa: PLC0415 - it takes seconds, and warns: on ranks alone

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    # On a CPU Accelerate counts one process, where it is not told of a backend.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    del os.environ["ACCELERATE_USE_DEEPSPEED"]
    # A faster all-reduce, which DeepSpeed would compile first: half a minute, with a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {
        "zero_optimization": {"stage": 2},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
        **({} if clipping is None else {"gradient_clipping": clipping}),
    }
    return trainer_for(
        trainer,
        folder,
        ranks=RANKS,
        use_cpu=False,  # with it Accelerate ignores DeepSpeed
        accelerator_config={"use_configured_state": True},
        deepspeed=config,
        max_grad_norm=max_grad_norm,
        **options,
    )


def lowered(rank, folder, trainer, settings):
    outcomes = []
    for clipping, max_grad_norm in settings:
        made, keep = engined(trainer, folder, clipping=clipping, max_grad_norm=max_grad_norm)
        made.train()
        engine = made.accelerator.deepspeed_engine_wrapped.engine
        assert (engine.global_steps, engine.world_size) == (STEPS, RANKS)
        assert engine.gradient_clipping() == LIMIT
        outcomes.append(outcome(made, keep))
    return outcomes


def refusals(rank, folder):
    said = []
    for options in (
        {"clipping": None, "max_grad_norm": 1.0},
        {"clipping": 0.25, "max_grad_norm": 0.25},
        {"policy": ValueClip(clip_value=0.5)},
        {"policy": {"down.*": 0.5, "*": 1.0}},
        {"nonfinite": "propagate"},
    ):
        made, _ = engined(Ordered, folder, **options)
        with pytest.raises(DoubleClippingError) as caught:
            made.train()
        assert made.accelerator.deepspeed_engine_wrapped is None  # no engine was made
        said.append(str(caught.value))
    made, _ = engined(Alone, folder)
    with pytest.raises(DoubleClippingError) as caught:
        made.train()
    assert made.state.global_step == 0
    said.append(str(caught.value))
    return said
