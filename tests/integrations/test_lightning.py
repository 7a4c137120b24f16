"""Lightning's Trainer, clipped by a callback: where, what it equals, and what it refuses."""

import csv
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning_runs import (
    BATCHES,
    LIMIT,
    Net,
    adamw,
    fit,
    fused_adamw,
    fused_momentum,
    half,
    loader,
    moments,
    momentum,
    trainer,
    weights,
)

import gradclip
from gradclip import NormClip, ValueClip
from gradclip.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    DoubleClippingError,
    NonFiniteGradientError,
    StateError,
    TooManySkipsError,
)
from gradclip.integrations.lightning import GradientClippingCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*`Trainer.fit` stopped"),
]
SAME = {"rtol": 1e-6, "atol": 1e-6}
CLOSE = {"rel": 1e-6, "abs": 1e-6}


class Keep(Callback):
    """Keeps the result of every step, and weights and moments before and after each batch."""

    def __init__(self, clipping):
        self.clipping = clipping
        self.results, self.before, self.after = [], [], []
        self.last = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before.append((weights(pl_module), moments(trainer.optimizers[0])))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append((weights(pl_module), moments(trainer.optimizers[0])))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.clipping.last is not self.last:
            self.last = self.clipping.last
            self.results.append(self.last.to_host())


# Where in the step it comes.


class Noted(GradientClippingCallback):
    def __init__(self, events):
        super().__init__(LIMIT)
        self.events = events

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.events.append("clip")
        super().on_before_optimizer_step(trainer, pl_module, optimizer)


class NotedNet(Net):
    """Notes the order of what happens in a step, from hooks of Lightning and of torch."""

    def __init__(self, make, events):
        super().__init__(make)
        self.events = events

    def training_step(self, batch):
        self.events.append("forward")
        return super().training_step(batch)

    def on_before_zero_grad(self, optimizer):
        self.events.append("zero")

    def on_after_backward(self):
        self.events.append("backward")

    def on_before_optimizer_step(self, optimizer):
        squares = sum(p.grad.double().square().sum() for p in self.parameters())
        self.events.append(f"norm {float(squares.sqrt()):.4f}")

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.register_step_pre_hook(lambda *_: self.events.append("step begins"))
        optimizer.register_step_post_hook(lambda *_: self.events.append("step ends"))
        return optimizer


class NotedScaler(torch.amp.GradScaler):
    def __init__(self, events):
        super().__init__("cpu", init_scale=1024.0)
        self.events = events

    def unscale_(self, optimizer):
        self.events.append("unscale")
        super().unscale_(optimizer)

    def update(self, new_scale=None):
        self.events.append("update")
        super().update(new_scale)


MICRO = ["forward", "zero", "backward"]
CLIP = ["clip", "norm 0.5000"]
STEP = ["step begins", "step ends"]


@pytest.mark.parametrize("make", [adamw, fused_adamw])
def test_without_a_scaler_the_whole_step_happens_inside_that_of_the_optimizer(make):
    events = []
    fit(NotedNet(make, events), Noted(events), batches=2)
    assert events == ["step begins", *MICRO, *CLIP, "step ends"] * 2


@pytest.mark.parametrize(
    ("make", "order"),
    [
        (adamw, [*MICRO, "unscale", *CLIP, *STEP, "update"]),  # Lightning unscales
        (fused_adamw, [*MICRO, "clip", "unscale", "norm 0.5000", *STEP, "update"]),  # gradclip does
    ],
)
def test_with_a_scaler_the_callback_comes_after_the_backward_pass_and_before_the_step(make, order):
    events = []
    plugin = half()
    plugin.scaler = NotedScaler(events)
    fit(NotedNet(make, events), Noted(events), plugins=[plugin], batches=2)
    assert events == order * 2


def test_it_clips_once_at_the_end_of_an_accumulation_window():
    events = []
    clipping = Noted(events)
    fit(NotedNet(adamw, events), clipping, accumulate_grad_batches=2, batches=4)
    window = [*MICRO, "step begins", "forward", "backward", *CLIP, "step ends"]
    assert events == window * 2
    assert clipping.clippers[0].step == 2


# What it equals: Lightning's own clipping, where that is right.


@pytest.mark.parametrize("make", [adamw, fused_adamw, momentum])
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize(
    ("policy", "theirs"),
    [
        (LIMIT, {"gradient_clip_val": LIMIT}),
        (
            ValueClip(clip_value=0.05),
            {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
        ),
    ],
    ids=["norm", "value"],
)
def test_losses_and_weights_are_those_of_lightnings_own_clipping(make, window, policy, theirs):
    ours, reference, free = Net(make), Net(make), Net(make)
    clipping = GradientClippingCallback(policy)
    keep = Keep(clipping)
    fit(ours, clipping, keep, accumulate_grad_batches=window)
    fit(reference, accumulate_grad_batches=window, **theirs)
    fit(free, accumulate_grad_batches=window)

    assert len(ours.losses) == BATCHES
    assert ours.losses == pytest.approx(reference.losses, **CLOSE)
    assert ours.losses != pytest.approx(free.losses, rel=0, abs=1e-2)  # or it shows nothing
    torch.testing.assert_close(weights(ours), weights(reference), **SAME)
    assert [each.clipped for each in keep.results] == [True] * (BATCHES // window)


def test_limits_by_name():
    model = Net()
    clipping = GradientClippingCallback({"up.*": 0.1, "norm.*": None, "*": NormClip(max_norm=0.2)})
    fit(model, clipping)
    groups = clipping.last.to_host().groups
    assert [groups[pattern].norm_post for pattern in ("up.*", "*")] == pytest.approx([0.1, 0.2])


# Fused optimizers under a loss scaler: Lightning#15501, #21435.


def test_lightning_refuses_a_fused_optimizer_under_a_scaler():
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(Net(fused_adamw), plugins=[half()], gradient_clip_val=LIMIT)


@pytest.mark.parametrize(("fused", "plain"), [(fused_adamw, adamw), (fused_momentum, momentum)])
def test_a_fused_optimizer_under_a_scaler_ends_where_a_plain_one_clipped_by_lightning_does(
    fused, plain
):
    ours, reference = Net(fused), Net(plain)
    clipping = GradientClippingCallback(LIMIT)
    keep = Keep(clipping)
    fit(ours, clipping, keep, plugins=[half()])
    fit(reference, plugins=[half()], gradient_clip_val=LIMIT)
    assert ours.losses == pytest.approx(reference.losses, **CLOSE)
    torch.testing.assert_close(weights(ours), weights(reference), **SAME)
    # Unscaled: 1024 times as much would be there otherwise.
    assert all(LIMIT < each.norm_pre < 100 and each.clipped for each in keep.results)


@pytest.mark.parametrize("make", [adamw, fused_adamw, momentum, fused_momentum])
@pytest.mark.parametrize("when", [0, 3])
def test_an_overflow_skips_the_step_and_halves_the_scale(make, when):
    """A clipped zero must not hide the infinity from the scaler, which would step and not halve."""
    plugin = half()
    clipping = GradientClippingCallback(LIMIT, max_consecutive_skips=0)  # it is the scaler's affair
    keep = Keep(clipping)
    fit(Net(make, broken={when: torch.inf}), clipping, keep, plugins=[plugin])
    assert [each.skipped for each in keep.results] == [n == when for n in range(BATCHES)]
    unchanged = [
        same(before[0], after[0]) for before, after in zip(keep.before, keep.after, strict=True)
    ]
    assert unchanged == [n == when for n in range(BATCHES)]
    assert same(steps(keep.before[when]), steps(keep.after[when]))
    assert plugin.scaler.get_scale() == 512.0
    assert all(torch.isfinite(each).all() for each in keep.after[-1][0].values())


def test_overflows_count_once_the_scale_cannot_fall():
    broken = dict.fromkeys(range(BATCHES), torch.inf)
    clipping = GradientClippingCallback(LIMIT, max_consecutive_skips=1)
    keep = Keep(clipping)
    with pytest.raises(TooManySkipsError, match="max_consecutive_skips=1"):
        fit(Net(fused_adamw, broken=broken), clipping, keep, plugins=[half(scale=4.0)])
    # At 4, 2 and 1 the scaler answers; of the next two the second is one too many.
    assert len(keep.results) == 4


class Absent(Net):
    """Has no loss for some batches."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx in (1, 3) else super().training_step(batch)


@pytest.mark.parametrize("make", [adamw, fused_adamw])
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`")
def test_a_batch_without_a_loss_is_no_step_under_a_scaler(make, window):
    model, clipping = Absent(make), GradientClippingCallback(LIMIT)
    keep = Keep(clipping)
    fit(model, clipping, keep, plugins=[half()], accumulate_grad_batches=window)
    stepped = [
        not same(before[0], after[0]) for before, after in zip(keep.before, keep.after, strict=True)
    ]
    wanted = (0, 2, 4, 5, 6, 7) if window == 1 else (5, 7)
    assert stepped == [n in wanted for n in range(BATCHES)]
    assert clipping.clippers[0].step == len(wanted)


# Skipped steps.


def same(first, second):
    torch.testing.assert_close(first, first, rtol=0, atol=0)  # no NaN that would pass for unequal
    try:
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    except AssertionError:
        return False
    return True


def steps(state):
    """Return the moments that a step has made: none is as good as zeros."""
    return [{k: v for k, v in each.items() if v.abs().sum() > 0} for each in state[1]]


@pytest.mark.parametrize("make", [adamw, fused_adamw, momentum, fused_momentum])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("when", [0, 3])
def test_a_nan_changes_neither_weights_nor_moments(make, value, when):
    model, clipping = Net(make, broken={when: value}), GradientClippingCallback(LIMIT)
    keep = Keep(clipping)
    fit(model, clipping, keep)
    assert [each.skipped for each in keep.results] == [n == when for n in range(BATCHES)]
    for number, (before, after) in enumerate(zip(keep.before, keep.after, strict=True)):
        assert same(before[0], after[0]) == (number == when)
        assert same(before[1], after[1]) == (number == when)


@pytest.mark.parametrize("plugins", [[], [half()]], ids=["float32", "scaler"])
def test_where_no_verdict_is_read_a_fused_step_is_withheld_on_the_device(monkeypatch, plugins):
    """As on a GPU: verdicts stay tensors, and found_inf tells the optimizer, and is taken back."""
    from gradclip.clipping import clipper, response  # noqa: PLC0415
    from gradclip.clipping.kernels import foreach  # noqa: PLC0415
    from gradclip.clipping.nonfinite import SkipCounter  # noqa: PLC0415
    from gradclip.integrations.lightning_step import LightningStep  # noqa: PLC0415

    monkeypatch.setattr(foreach, "_on_cpu", lambda batch: False)
    for module in (clipper, response):
        monkeypatch.setattr(module, "host_waits_for", lambda device: True)
    monkeypatch.setattr(SkipCounter, "record", lambda self, skipped, *, expected: False)
    monkeypatch.setattr(LightningStep, "_see_floor", lambda self, scaler, withheld: None)
    clipping = GradientClippingCallback(LIMIT)
    keep = Keep(clipping)
    made = fit(Net(fused_adamw, broken={3: torch.nan}), clipping, keep, plugins=plugins)
    assert isinstance(clipping.last.withheld, torch.Tensor)
    assert [each.skipped for each in keep.results] == [n == 3 for n in range(BATCHES)]
    for number, (before, after) in enumerate(zip(keep.before, keep.after, strict=True)):
        assert same(before, after) == (number == 3)
    assert getattr(made.optimizers[0], "found_inf", None) is None


def test_a_nan_raises_where_it_is_asked_to():
    model = Net(broken={2: torch.nan})
    clipping = GradientClippingCallback(LIMIT, nonfinite="raise")
    keep = Keep(clipping)
    with pytest.raises(NonFiniteGradientError, match=r"up\.weight .* NaN: 1 .*Inf: 0"):
        fit(model, clipping, keep)
    assert same(weights(model), keep.before[-1][0])
    assert len(keep.before) == 3


def test_too_many_skips_raise():
    broken = dict.fromkeys(range(2, BATCHES), torch.nan)
    clipping = GradientClippingCallback(LIMIT, max_consecutive_skips=2)
    keep = Keep(clipping)
    with pytest.raises(TooManySkipsError, match="max_consecutive_skips=2"):
        fit(Net(broken=broken), clipping, keep)
    assert len(keep.results) == 4


# Manual optimisation.


class Manual(Net):
    """Steps two optimizers by itself, of which the second has a limit that never clips."""

    def __init__(self, limit=None):
        super().__init__()
        self.automatic_optimization = False
        self.limit = limit

    def training_step(self, batch):
        for optimizer in self.optimizers():
            loss = self.loss_of(batch)
            self.losses.append(float(loss.detach()))
            optimizer.zero_grad()
            self.manual_backward(loss)
            if self.limit is not None:
                self.clip_gradients(optimizer, gradient_clip_val=self.limit)
            optimizer.step()

    def configure_optimizers(self):
        return momentum(self.up.named_parameters()), adamw(self.down.parameters())


@pytest.mark.parametrize("plugins", [[], [half()]], ids=["float32", "scaler"])
def test_several_optimizers_of_manual_optimisation_are_clipped_each_by_itself(plugins):
    ours, reference = Manual(), Manual(limit=0.05)
    clipping = GradientClippingCallback(0.05)
    keep = Keep(clipping)
    made = fit(ours, clipping, keep, plugins=plugins)
    if not plugins:  # under a scaler Lightning's would clip what is still scaled
        fit(reference)
        assert ours.losses == pytest.approx(reference.losses, **CLOSE)
        torch.testing.assert_close(weights(ours), weights(reference), **SAME)
    assert [clipper.step for clipper in clipping.clippers] == [BATCHES, BATCHES]
    assert all(each.clipped for each in keep.results)
    logged = made.callback_metrics
    first, second = (float(logged[f"gradclip/{n}/norm_pre"]) for n in (0, 1))
    assert [first, second] == [pytest.approx(each.norm_pre) for each in keep.results[-2:]]
    assert first != second


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
    assert "Lightning  test_lightning.Overriding.configure_gradient_clipping\n" in said
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


def test_an_attachment_sees_lightnings_closure_and_says_what_to_use():
    """Its hook runs before the closure, so it would clip the gradients of the step before."""

    def make(parameters):
        optimizer = adamw(parameters)
        gradclip.attach(optimizer, 1.0)
        return optimizer

    said = refused(ArgumentTypeError, Net(make))
    assert "AdamW.step was given a closure" in said
    assert "gradclip.integrations.lightning.GradientClippingCallback" in said


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
    assert "LBFGS computes gradients several times in one step" in said


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


# What it leaves behind, and what it saves.


@pytest.mark.parametrize("broken", [None, {1: torch.nan}], ids=["finished", "raised"])
def test_afterwards_the_optimizer_is_free(broken):
    optimizers = []

    def make(parameters):
        optimizers.append(adamw(parameters))
        return optimizers[-1]

    clipping = GradientClippingCallback(LIMIT, nonfinite="raise")
    if broken is None:
        fit(Net(make), clipping)
    else:
        with pytest.raises(NonFiniteGradientError):
            fit(Net(make, broken), clipping)
    assert not optimizers[0]._optimizer_step_pre_hooks
    assert not optimizers[0]._optimizer_step_post_hooks
    gradclip.attach(optimizers[0], 1.0).remove()
    fit(Net(), clipping)  # and the callback can be used again
    assert clipping.clippers[0].step == BATCHES


def test_an_optimizer_that_takes_the_place_of_another_is_clipped_too():
    class Replace(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 4:
                trainer.strategy.optimizers = [momentum(pl_module.named_parameters())]

    clipping = GradientClippingCallback(LIMIT)
    fit(Net(), Replace(), clipping)
    assert [clipper.step for clipper in clipping.clippers] == [4, 4]
    assert float(clipping.last.norm_post) == pytest.approx(LIMIT)


def test_a_checkpoint_has_the_history_and_a_resumed_run_goes_on_with_it(tmp_path):
    path = tmp_path / "last.ckpt"
    broken = {6: torch.nan, 7: torch.nan}
    made = fit(Net(broken=broken), first := GradientClippingCallback(LIMIT))
    made.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["callbacks"]["GradientClippingCallback"]
    assert state["clippers"][0]["step"] == BATCHES
    assert state["clippers"][0]["consecutive_skips"] == 2
    assert first.state_dict() == state

    # Two skips before the break and one after it are three in a row.
    resumed = GradientClippingCallback(LIMIT, max_consecutive_skips=2)
    keep = Keep(resumed)
    going_on = trainer(resumed, keep, max_epochs=2)
    with pytest.raises(TooManySkipsError):
        going_on.fit(Net(broken={0: torch.nan}), loader(), ckpt_path=path)
    assert resumed.clippers[0].step == BATCHES
    assert keep.results == []

    healthy = GradientClippingCallback(LIMIT, max_consecutive_skips=2)
    trainer(healthy, max_epochs=2).fit(Net(), loader(), ckpt_path=path)
    assert healthy.clippers[0].step == 2 * BATCHES


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    fit(Net(), GradientClippingCallback(LIMIT)).save_checkpoint(path)
    other = GradientClippingCallback({"up.*": 1.0, "*": None})
    with pytest.raises(StateError):
        trainer(other, max_epochs=2).fit(Net(), loader(), ckpt_path=path)
    state = torch.load(path, weights_only=True)["callbacks"]["GradientClippingCallback"]
    two = GradientClippingCallback(LIMIT)
    two.load_state_dict(state)
    with pytest.raises(StateError, match="1 clippers, and there are 2 optimizers"):
        fit(Manual(), two)


# What it logs.


class Reads(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the numbers that are read on the host."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


class Logged(GradientClippingCallback):
    reads = 0

    def _log(self, pl_module, number, result):
        with Reads() as reads:
            super()._log(pl_module, number, result)
        self.reads += reads.count


def test_it_logs_norms_at_steps_and_fractions_for_epochs_and_reads_nothing(tmp_path):
    from lightning.pytorch.loggers import CSVLogger  # noqa: PLC0415

    clipping = Logged(15.0)
    keep = Keep(clipping)
    logger = CSVLogger(tmp_path)
    made = fit(
        Net(momentum, broken={5: torch.nan}), clipping, keep, logger=logger, log_every_n_steps=2
    )
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    written = [float(row["gradclip/norm_pre"]) for row in rows if row["gradclip/norm_pre"]]
    wanted = [each.norm_pre for each in keep.results][1::2]
    assert written == pytest.approx(wanted, nan_ok=True)
    posts = [float(row["gradclip/norm_post"]) for row in rows if row["gradclip/norm_post"]]
    assert posts == pytest.approx([each.norm_post for each in keep.results][1::2])
    clipped = [each.clipped for each in keep.results]
    assert 0 < sum(clipped) < BATCHES - 1  # or a share of all or none would pass for right
    last = made.callback_metrics
    assert float(last["gradclip/clip_fraction"]) == pytest.approx(sum(clipped) / BATCHES)
    assert float(last["gradclip/skipped"]) == 1.0
    assert clipping.reads == 0


def test_a_barebones_trainer_is_not_logged_to():
    clipping = GradientClippingCallback(LIMIT)
    options = {"logger": None, "enable_checkpointing": None, "enable_progress_bar": None}
    fit(Net(), clipping, barebones=True, enable_model_summary=None, **options)
    assert clipping.clippers[0].step == BATCHES
