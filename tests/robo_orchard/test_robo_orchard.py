"""gradclip inside the trainer of RoboOrchardLab 0.4.0: the real one, on a CPU."""

import gc
import math
import weakref
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from robo_orchard_core.utils.config import load_from
from robo_orchard_lab.pipeline import HookBasedTrainer
from robo_orchard_lab.pipeline.batch_processor import SimpleBatchProcessor
from robo_orchard_lab.pipeline.hooks import grad_clip as theirs
from robo_orchard_lab.pipeline.hooks.mixin import HookContext, PipelineHooks
from robo_orchard_lab.pipeline.hooks.optimizer import OptimizerHook
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader

from gradclip import ObserveClip
from gradclip.config import dump, load
from gradclip.errors import ArgumentValueError, NonFiniteGradientError, TooManySkipsError
from gradclip.integrations.robo_orchard import GradientClippingHook, GradientClippingHookConfig
from oracle import randn
from processes import together

CLIP = GradientClippingHookConfig(clip_mode="norm", max_norm=1.0)
THEIRS = theirs.GradientClippingHookConfig(clip_mode="norm", max_norm=1.0)
ROWS = [scale * randn(64, seed=seed) for seed, scale in enumerate([1.0, 1e-3, 1e4, 0.1, 30.0])]
NAN = torch.full((64,), math.nan)
INF = torch.cat([torch.ones(63), torch.tensor([math.inf])])


@dataclass
class Run:
    """A training whose gradients are the rows of its data, and what its hooks saw after steps."""

    grad_clip: object = CLIP
    optimizer: str = "SGD"
    lr: float = 1.0
    accelerator: Accelerator | None = None
    hooks: list = field(default_factory=list)
    forward: object = None

    def __post_init__(self):
        self.model = torch.nn.Linear(64, 1, bias=False)
        torch.nn.init.zeros_(self.model.weight)
        self.inner = getattr(torch.optim, self.optimizer)(self.model.parameters(), lr=self.lr)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.inner, 1, 0.5)
        self.results, self.weights, self.args = [], [], []
        self.accelerator = self.accelerator or Accelerator(cpu=True)
        self.watching = PipelineHooks()
        self.watching.register_hook("on_step", HookContext.from_callable(after=self._look))

    def _look(self, arg):
        self.args.append(arg)
        self.results.append(getattr(arg, "clip_result", None))
        self.weights.append(self.model.weight.detach().flatten().clone())

    def _forward(self, model, batch):
        loss = model(batch).sum()
        return {"loss": loss}, loss

    def trainer(self, rows):
        return HookBasedTrainer(
            accelerator=self.accelerator,
            model=self.model,
            dataloader=DataLoader(rows, batch_size=1),
            batch_processor=SimpleBatchProcessor.from_callable(self.forward or self._forward),
            optimizer=self.inner,
            lr_scheduler=self.scheduler,
            hooks=[*self.hooks, self.watching],
            grad_clip=self.grad_clip,
            max_epoch=1,
        )

    def on(self, rows):
        self.trainer(rows)()
        return self

    def state(self):
        """All that a step changes."""
        moments = self.inner.state_dict()["state"].get(0, {})
        return {
            "weight": self.model.weight.flatten().tolist(),
            "lr": self.scheduler.get_last_lr(),
            "scheduled": self.scheduler.last_epoch,
            **{name: torch.as_tensor(value).tolist() for name, value in moments.items()},
        }


def truth(row, limit, p):
    """The clipped gradient and its norm, in float64."""
    wide = row.double().numpy()
    norm = float(np.linalg.norm(wide, p))
    return wide * min(1.0, limit / norm), norm


# Values


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("limit", [0.5, 20.0])
def test_gradients_are_clipped_as_in_float64_and_the_arg_has_the_result(p, limit):
    config = GradientClippingHookConfig(clip_mode="norm", max_norm=limit, norm_type=p)
    run = Run(config).on(ROWS)
    weight = np.zeros(64)
    for step, row in enumerate(ROWS):
        clipped, norm = truth(row, limit, p)
        weight -= 0.5**step * clipped
        stats = run.results[step].to_host()
        assert stats.norm_pre == pytest.approx(norm, rel=1e-6)
        assert stats.clipped == (norm > limit)
        assert stats.norm_post <= limit
        assert stats.norm_post == pytest.approx(min(norm, limit), rel=1e-6)
        np.testing.assert_allclose(run.weights[step].numpy(), weight, rtol=1e-5, atol=1e-6 * limit)
    assert len(run.results) == len(ROWS)


def test_values_are_clamped():
    run = Run(GradientClippingHookConfig(clip_mode="value", clip_value=0.25)).on(ROWS[:1])
    assert torch.equal(run.weights[0], -ROWS[0].clamp(-0.25, 0.25))


def test_a_policy_may_say_how_to_clip():
    run = Run(GradientClippingHookConfig(policy=ObserveClip())).on(ROWS[2:3])
    assert torch.equal(run.weights[0], -ROWS[2])
    assert float(run.results[0].norm_pre) == pytest.approx(truth(ROWS[2], 1.0, 2)[1], rel=1e-6)


def test_one_clipping_for_each_accumulation_window():
    run = Run(accelerator=Accelerator(cpu=True, gradient_accumulation_steps=2)).on(ROWS[:4])
    assert [result is None for result in run.results] == [True, False, True, False]
    for window in (0, 2):
        _, norm = truth((ROWS[window].double() + ROWS[window + 1].double()) / 2, 1.0, 2)
        assert float(run.results[window + 1].norm_pre) == pytest.approx(norm, rel=1e-6)


# Order


def test_the_trainer_runs_it_before_its_optimizer_hook_and_users_hooks_after():
    run = Run()
    owners = [
        context.after_info.owner
        for context in run.trainer(ROWS).hooks.hooks["on_step"]._context_handlers
    ]
    assert [type(owner) for owner in owners] == [GradientClippingHook, OptimizerHook, Run]


def test_behind_the_optimizer_hook_it_refuses_before_anything_is_stepped():
    run = Run(grad_clip=None, hooks=[CLIP()])
    before = run.state()
    with pytest.raises(ArgumentValueError, match="grad_clip="):
        run.on(ROWS)
    assert run.state() == before


def test_a_clipping_hook_of_theirs_there_clips_nothing():
    """What the refusal above is for: their own hook is silent about it."""
    run = Run(grad_clip=None, hooks=[THEIRS()]).on(ROWS[2:3])
    assert torch.equal(run.weights[0], -ROWS[2])


def test_the_arg_can_still_be_copied_and_is_of_their_kind():
    run = Run().on(ROWS[:1])
    copy = run.args[0].copy_with_updates(step_id=7)
    assert (copy.step_id, copy.clip_result) == (7, run.results[0])
    assert isinstance(copy, type(run.args[0]).__mro__[1])
    assert run.args[0].optimizer.optimizer is run.inner


def test_the_trainer_can_show_its_hooks():
    assert "GradientClippingHook" in repr(Run().trainer(ROWS).hooks)


def test_it_has_their_attributes():
    hook = GradientClippingHookConfig(clip_mode="norm", max_norm=2, norm_type=1)()
    assert isinstance(hook, PipelineHooks)
    assert (hook.clip_mode, hook.clip_value, hook.max_norm, hook.norm_type) == ("norm", None, 2, 1)


# Steps that are not made


@pytest.mark.parametrize("bad", [NAN, INF], ids=["nan", "inf"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_step_on_a_nan_is_as_if_its_batch_had_not_been(optimizer, bad):
    run = Run(optimizer=optimizer).on([ROWS[0], bad, ROWS[2]])
    assert [bool(result.skipped) for result in run.results] == [False, True, False]
    assert torch.equal(run.weights[1], run.weights[0])
    assert run.state() == Run(optimizer=optimizer).on([ROWS[0], ROWS[2]]).state()
    assert run.scheduler.last_epoch == 2
    assert run.args[1].optimizer is run.args[0].optimizer
    assert run.args[1].lr_scheduler is run.args[0].lr_scheduler


def test_their_own_hook_steps_on_it():
    run = Run(THEIRS).on([ROWS[0], NAN])
    assert bool(run.weights[1].isnan().all())
    assert run.scheduler.last_epoch == 2


def test_a_nan_can_be_an_error():
    run = Run(CLIP.replace(nonfinite="raise"))
    with pytest.raises(NonFiniteGradientError):
        run.on([ROWS[0], NAN, ROWS[2]])
    assert run.state() == Run().on(ROWS[:1]).state()


def test_too_many_skips_are_an_error():
    run = Run(CLIP.replace(max_consecutive_skips=2))
    with pytest.raises(TooManySkipsError):
        run.on([ROWS[0], NAN, NAN, NAN, ROWS[2]])
    assert run.state() == Run().on(ROWS[:1]).state()


class Stop(Exception):  # noqa: N818 - not an error of anybody's
    pass


def failing(where):
    """A forward whose second call fails: before it, or in the backward pass, gradients there."""
    calls = []

    def forward(model, batch):
        def fail(_):
            assert model.weight.grad is not None
            raise Stop

        calls.append(batch)
        if len(calls) == 2 and where == "forward":
            raise Stop
        inner = batch.clone().requires_grad_()
        loss = model(inner * 1.0).sum()
        if len(calls) == 2:
            inner.register_hook(fail)
        return {"loss": loss}, loss

    return forward


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_nothing_steps_after_a_failure(where, optimizer):
    run = Run(optimizer=optimizer, forward=failing(where))
    with pytest.raises(Stop):
        run.on(ROWS[:3])
    assert run.results[1] is None
    assert run.state() == Run(optimizer=optimizer).on(ROWS[:1]).state()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_nothing_steps_after_a_hook_failed_inside_the_step(moment):
    def fail(arg):
        if arg.global_step_id == 1:
            raise Stop

    hooks = PipelineHooks()
    channel = "on_step" if moment == "before" else "on_batch"
    hooks.register_hook(channel, HookContext.from_callable(**{moment: fail}))
    run = Run(hooks=[hooks])
    with pytest.raises(Stop):
        run.on(ROWS[:3])
    assert run.state() == Run().on(ROWS[:1]).state()


def test_their_own_hook_steps_after_a_failure():
    run = Run(THEIRS, optimizer="AdamW", forward=failing("forward"))
    with pytest.raises(Stop):
        run.on(ROWS[:3])
    assert run.scheduler.last_epoch == 2


def test_a_failed_run_can_go_on_inside_the_handler_of_its_error():
    run = Run(forward=failing("backward"))
    trainer = run.trainer(ROWS[:3])
    try:
        trainer()
    except Stop:
        trainer()
    assert run.state() == Run().on([ROWS[0], *ROWS[:3]]).state()


@pytest.mark.parametrize("again", [False, True])
def test_no_error_is_kept_alive(again):
    """What ran out of memory must be free for the next attempt."""
    trainer = Run(forward=failing("forward")).trainer(ROWS[:2])
    try:
        trainer()
    except Stop as error:
        failure = weakref.ref(error)
        if again:
            trainer()
    gc.collect()
    assert failure() is None


# Under a loss scaler


# float16 has these, and 256 times these.
HALF = [ROWS[number].half().float() for number in (0, 3, 4)]


def scaled(**fields):
    """An accelerator with a loss scaler; on the CPU Accelerate makes none itself."""
    accelerator = Accelerator(cpu=True, **fields)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    return accelerator


def test_the_norm_is_that_of_unscaled_gradients():
    run = Run(accelerator=scaled()).on(HALF)
    weight = np.zeros(64)
    for step, (row, result) in enumerate(zip(HALF, run.results, strict=True)):
        clipped, norm = truth(row, 1.0, 2)
        weight -= 0.5**step * clipped
        assert float(result.norm_pre) == pytest.approx(norm, rel=1e-6)
        np.testing.assert_allclose(run.weights[step].numpy(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_an_overflow_lowers_the_scale_and_nothing_else(optimizer):
    run = Run(optimizer=optimizer, accelerator=scaled()).on([HALF[0], INF, HALF[2]])
    assert run.accelerator.scaler.get_scale() == 128.0
    alone = Run(optimizer=optimizer, accelerator=scaled()).on([HALF[0], HALF[2]])
    assert alone.accelerator.scaler.get_scale() == 256.0
    assert run.state() == alone.state()


def test_the_scale_is_not_read_while_steps_are_made(monkeypatch):
    accelerator = scaled()
    reads = []
    monkeypatch.setattr(accelerator.scaler, "get_scale", lambda: reads.append(1) or 256.0)
    Run(accelerator=accelerator).on([HALF[0], HALF[1]])
    assert not reads
    Run(accelerator=accelerator).on([HALF[0], INF, HALF[1]])
    assert len(reads) == 1


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_nothing_steps_after_a_failure_under_a_scaler(where):
    run = Run(accelerator=scaled(), forward=failing(where))
    with pytest.raises(Stop):
        run.on(HALF)
    assert run.state() == Run(accelerator=scaled()).on(HALF[:1]).state()


# Under FSDP1, with a frozen parameter


def under_fsdp1(rank, grad_clip, poisoned=None):
    """Train on a row for each rank.

    Args:
        rank: This process.
        grad_clip: The configuration.
        poisoned: A rank whose gradient, under a loss scaler, gets a NaN that no other rank sees.

    Returns:
        The sum of squares of this rank's part of the gradients where the optimizer steps, the norm
        that clipping found, and whether this rank's part of the weights changed.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=1, auto_wrap_policy="no_wrap", use_orig_params=True
    )
    accelerator = (
        Accelerator(cpu=True, fsdp_plugin=plugin)
        if poisoned is None
        else scaled(fsdp_plugin=plugin)
    )
    # Accelerate goes this way on accelerators alone; all behind this switch is its own code.
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 1, bias=False)
    )
    with torch.no_grad():
        # Of norm 1: the gradient of the first layer, half of it on each rank, has the row's norm.
        model[1].weight.fill_(1 / 8).requires_grad_(False)
    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    # Its decay moves the weights even where the gradients are zeros.
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    left, norms = [], []

    def poison(_):
        for p in model.parameters():
            if rank == poisoned and p.grad is not None:
                p.grad.view(-1)[0] = math.nan

    def note(optimizer, *_):
        gradients = [p.grad for g in optimizer.param_groups for p in g["params"]]
        left.append(sum(float(g.double().square().sum()) for g in gradients if g is not None))

    optimizer.register_step_pre_hook(note)
    watching = PipelineHooks()
    watching.register_hook("on_batch", HookContext.from_callable(after=poison))
    watching.register_hook(
        "on_step",
        HookContext.from_callable(
            after=lambda arg: norms.append(getattr(arg, "clip_result", None))
        ),
    )
    HookBasedTrainer(
        accelerator=accelerator,
        model=model,
        dataloader=DataLoader([ROWS[0], 3 * ROWS[3]], batch_size=1),
        batch_processor=SimpleBatchProcessor.from_callable(
            lambda model, batch: ({}, model(batch).sum())
        ),
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1),
        grad_clip=grad_clip,
        hooks=watching,
        max_epoch=1,
    )()
    changed = any(
        not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)
    )
    return left, [None if result is None else float(result.norm_pre) for result in norms], changed


@pytest.mark.parametrize("ours", [True, False])
def test_fsdp1_is_clipped_by_one_norm_where_a_parameter_is_frozen(ours):
    """Their hook hands Accelerate a filtered list, and every rank clips by a norm of its own."""
    runs = together(under_fsdp1, 2, CLIP if ours else THEIRS)
    after = math.sqrt(sum(squares for (squares,), _, _ in runs))
    _, norm = truth((ROWS[0].double() + 3 * ROWS[3].double()) / 2, 1.0, 2)
    if ours:
        assert [norms for _, norms, _ in runs] == [[pytest.approx(norm, rel=1e-6)]] * 2
        assert after == pytest.approx(1.0, rel=1e-6)
    else:
        assert after > 1.2
    assert [changed for _, _, changed in runs] == [True, True]


@pytest.mark.parametrize("poisoned", [0, 1])
def test_a_nan_on_one_rank_keeps_every_rank_from_stepping_under_a_scaler(poisoned):
    """Its own scaler tells a rank nothing of the others."""
    runs = together(under_fsdp1, 2, CLIP, poisoned)
    assert all(math.isnan(norm) for _, (norm,), _ in runs)
    assert [changed for _, _, changed in runs] == [False, False]


# Files


@pytest.mark.parametrize("suffix", ["yaml", "toml", "json"])
def test_the_configuration_can_be_written_and_read(suffix, tmp_path):
    dump(CLIP, tmp_path / f"clip.{suffix}")
    again = load(tmp_path / f"clip.{suffix}")
    assert again == CLIP
    assert type(again()) is GradientClippingHook


def test_a_file_that_it_reads_says_the_same_to_gradclip(tmp_path):
    path = tmp_path / "clip.yaml"
    path.write_text(
        "__config_type__: robo_orchard_lab.pipeline.hooks.grad_clip:GradientClippingHookConfig\n"
        "clip_mode: norm\nclip_value: null\nmax_norm: 0.5\nnorm_type: 1.0\n"
    )
    for config in (load_from(str(path)), load(path)):
        fields = (config.clip_mode, config.clip_value, config.max_norm, config.norm_type)
        assert fields == ("norm", None, 0.5, 1.0)
    assert isinstance(load_from(str(path)), theirs.GradientClippingHookConfig)
    assert type(load(path)).__module__ == "gradclip.pipeline.hooks.grad_clip"
