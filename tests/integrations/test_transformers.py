"""transformers.Trainer and TRL: the callback clips, in runs that are real and short."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers_runs import (
    LIMIT,
    STEPS,
    TRAINERS,
    ClippedTrainer,
    Keep,
    Model,
    arguments,
    dataset,
    losses,
    poisoned,
    trained,
)

from gradclip import ClipResult, GradientClipper, ValueClip
from gradclip.errors import (
    NonFiniteGradientError,
    TooManySkipsError,
)
from gradclip.integrations.transformers import GradientClippingCallback

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "integrations" / "transformers.md"


def spy(monkeypatch, owner, name, events, said):
    """Note each call of a method, and make it."""
    original = getattr(owner, name)

    def noted(*args, **options):
        events.append(said)
        return original(*args, **options)

    monkeypatch.setattr(owner, name, noted)


# A training run.


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("window", [1, 2])
def test_the_order_of_calls(tmp_path, monkeypatch, trainer, window):
    """And how many there are: with the mixin the gradients are measured once, not twice."""
    events = []

    class Noting(trainer):
        def training_step(self, *args, **options):
            loss = super().training_step(*args, **options)
            events.append("backward")
            return loss

    spy(monkeypatch, Accelerator, "clip_grad_norm_", events, "measure")
    spy(monkeypatch, GradientClipper, "clip", events, "clip")
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.register_step_pre_hook(lambda *_: events.append("step"))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda _: events.append("scheduler") or 1.0
    )
    events.clear()
    Noting(
        model,
        arguments(tmp_path, max_steps=3, gradient_accumulation_steps=window),
        train_dataset=dataset(),
        callbacks=[GradientClippingCallback(LIMIT)],
        optimizers=(optimizer, scheduler),
    ).train()

    measure = [] if trainer is ClippedTrainer else ["measure"]
    assert events == [*["backward"] * window, *measure, "clip", "step", "scheduler"] * 3


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("window", [1, 2])
def test_it_trains_as_the_trainers_own_clipping(tmp_path, trainer, window):
    options = {"gradient_accumulation_steps": window}
    own = trained(tmp_path, None, max_grad_norm=LIMIT, **options)
    callback = GradientClippingCallback(LIMIT)
    ours = trained(tmp_path, callback, trainer, **options)

    assert losses(ours) == pytest.approx(losses(own), rel=1e-6, abs=1e-6)
    assert len(losses(ours)) == STEPS
    for have, want in zip(ours.model.parameters(), own.model.parameters(), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)
    for have, want in zip(ours.state.log_history[:-1], own.state.log_history[:-1], strict=True):
        assert have["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)
        assert have["gradclip/norm_pre"] == pytest.approx(want["grad_norm"], rel=1e-5)
        assert have["gradclip/norm_post"] <= LIMIT
    assert (
        sum(entry["gradclip/clip_fraction"] for entry in ours.state.log_history[:-1]) >= STEPS / 2
    )
    assert callback.last.to_host().norm_pre == ours.state.log_history[-2]["gradclip/norm_pre"]


def test_limits_by_name_take_the_names_of_the_model(tmp_path):
    callback = GradientClippingCallback(
        {"down.*": 0.1, "norm.*": None, "*": ValueClip(clip_value=1)}
    )
    trained(tmp_path, callback, ClippedTrainer)

    groups = callback.last.to_host().groups
    assert list(groups) == ["down.*", "*"]
    assert groups["down.*"].norm_post <= 0.1 < groups["down.*"].norm_pre


# What is logged.


class Logger(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_numbers_stand_beside_the_trainers(tmp_path, monkeypatch, trainer):
    """They are read from the device only when the trainer logs."""
    reads, first, last = [], Logger(), Logger()
    callback = GradientClippingCallback(29.0)
    keep = Keep(callback)

    class Late(TrainerCallback):
        def on_init_end(self, args, state, control, **_):
            spy(monkeypatch, ClipResult, "to_host", reads, "read")

    made = trainer(
        Model(),
        arguments(tmp_path, logging_steps=4, eval_strategy="steps", eval_steps=2),
        train_dataset=dataset(),
        eval_dataset=dataset(),
        callbacks=[first, Late(), callback, last, keep],
    )
    made.train()

    assert len(reads) == 2
    history = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(history) == 2
    for number, entry in enumerate(history):
        results = keep.results[4 * number : 4 * number + 4]
        assert entry["gradclip/norm_pre"] == float(results[-1].norm_pre)
        assert entry["gradclip/norm_post"] == float(results[-1].norm_post)
        assert entry["gradclip/clip_fraction"] == sum(bool(each.clipped) for each in results) / 4
        assert entry["gradclip/skipped"] == 0
        assert entry["grad_norm"] == pytest.approx(entry["gradclip/norm_pre"], rel=1e-5)
    assert 0 < sum(entry["gradclip/clip_fraction"] for entry in history) < 2
    for entry in made.state.log_history:
        assert ("loss" in entry) == ("gradclip/clip_fraction" in entry)  # not beside an evaluation
    seen = [
        ["gradclip/clip_fraction" in logs for logs in logger.logs if "loss" in logs]
        for logger in (first, last)
    ]
    # Loggers that the trainer makes itself stand before every callback of the user, as the first.
    assert seen == [[True] * 2] * 2


class Nested(TrainerCallback):
    """Logs something itself, whenever the trainer does."""

    def __init__(self):
        self.trainer = None

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.trainer.log({"extra": 1.0})


@pytest.mark.parametrize("trainer", TRAINERS)
def test_they_stand_beside_the_loss_also_where_another_callback_logs(tmp_path, trainer):
    nested = Nested()
    made = trainer(
        Model(),
        arguments(tmp_path),
        train_dataset=dataset(),
        callbacks=[nested, GradientClippingCallback(LIMIT)],
    )
    nested.trainer = made
    made.train()
    for entry in made.state.log_history:
        assert ("loss" in entry) == ("gradclip/clip_fraction" in entry)


# A NaN or an infinity.


@pytest.mark.parametrize(("trainer", "at_fault"), [(Trainer, 6), (ClippedTrainer, 1)])
def test_an_infinity_arrives_as_it_was_with_the_mixin(tmp_path, trainer, at_fault):
    """The Trainer's measurement, with max_grad_norm=0 too, makes a NaN of every gradient."""
    before = Keep()
    callback = GradientClippingCallback(LIMIT)
    after = Keep(callback)
    trained(tmp_path, callback, poisoned(trainer, 2, math.inf), others=[before, after])

    result = after.results[2].to_host()
    assert result.nonfinite == at_fault
    assert result.skipped
    gradients = before.gradients[2]
    wrong = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    assert len(wrong) == at_fault
    assert gradients["down.weight"].isinf().any() == (trainer is ClippedTrainer)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_nan_changes_neither_weights_nor_moments_nor_the_rate(tmp_path, trainer, optim):
    callback = GradientClippingCallback(LIMIT)
    keep = Keep(callback)
    made = trained(
        tmp_path, callback, poisoned(trainer, 3, math.nan), others=[keep], optim=optim,
        optim_args="momentum=0.9" if optim == "sgd" else None,
    )  # fmt: skip

    assert [bool(result.skipped) for result in keep.results] == [n == 3 for n in range(STEPS)]
    for name, weight in keep.weights[3].items():
        assert torch.equal(weight, keep.weights[2][name])
        assert not torch.equal(weight, keep.weights[4][name])
    assert keep.moments[2].keys() == keep.moments[3].keys()
    assert len(keep.moments[2]) == 6
    for number, moments in keep.moments[3].items():
        for name, moment in moments.items():
            assert torch.equal(moment, keep.moments[2][number][name])
    assert keep.rates[1] > keep.rates[2] == keep.rates[3] > keep.rates[4]
    entries = [entry for entry in made.state.log_history if "loss" in entry]
    assert [entry["gradclip/skipped"] for entry in entries] == [int(n == 3) for n in range(STEPS)]
    assert not made.accelerator.optimizer_step_was_skipped  # it speaks of the last step


def test_raise_comes_before_the_step(tmp_path):
    callback = GradientClippingCallback(LIMIT, nonfinite="raise")
    keep = Keep(callback)
    model = Model()
    made = poisoned(ClippedTrainer, 2, math.nan)(
        model, arguments(tmp_path), train_dataset=dataset(), callbacks=[keep, callback]
    )
    with pytest.raises(NonFiniteGradientError, match=r"down\.weight  \(1, 16\) float32   NaN: 1"):
        made.train()

    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, keep.weights[1][name])


def test_too_many_skips_are_an_error(tmp_path):
    callback = GradientClippingCallback(LIMIT, max_consecutive_skips=0)
    with pytest.raises(TooManySkipsError):
        trained(tmp_path, callback, poisoned(ClippedTrainer, 2, math.inf))


class Counting(torch.optim.SGD):
    """Counts its steps by itself, as schedule-free optimizers do."""

    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1


def test_an_optimizer_that_counts_by_itself_does_not_count_a_skip(tmp_path):
    model = Model()
    optimizer = Counting(model.parameters(), lr=0.01)
    poisoned(ClippedTrainer, 3, math.nan)(
        model,
        arguments(tmp_path),
        train_dataset=dataset(),
        callbacks=[GradientClippingCallback(LIMIT)],
        optimizers=(optimizer, None),
    ).train()
    assert optimizer.param_groups[0]["k"] == STEPS - 1
    assert "step" not in vars(optimizer) or hasattr(optimizer.step, "_wrapped_by_lr_sched")


# A loss scaler. The Trainer makes one on CUDA alone, so it is given one of the CPU.


def scaling(trainer, scaler):
    class Scaling(trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = scaler

    return Scaling


@pytest.mark.parametrize("measured", [False, True], ids=["scaled", "unscaled-before"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_under_a_loss_scaler(tmp_path, optim, measured):
    """Norms are those of unscaled gradients, whether the trainer's measurement unscaled or not."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    class Unscaling(scaling(ClippedTrainer, scaler)):
        def _get_grad_norm(self, model, grad_norm=None):
            if measured:
                scaler.unscale_(self.optimizer.optimizer)
            return super()._get_grad_norm(model, grad_norm)

    plain = trained(tmp_path, GradientClippingCallback(LIMIT), ClippedTrainer, optim=optim)
    ours = trained(tmp_path, GradientClippingCallback(LIMIT), Unscaling, optim=optim)

    assert losses(ours) == pytest.approx(losses(plain), rel=1e-6)
    for have, want in zip(ours.state.log_history[:-1], plain.state.log_history[:-1], strict=True):
        assert have["gradclip/norm_pre"] == pytest.approx(want["gradclip/norm_pre"], rel=1e-6)
    assert scaler.state_dict()["_growth_tracker"] == STEPS  # it scaled, and found no overflow


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_an_overflow_of_a_loss_scaler_is_skipped_and_not_counted(tmp_path, optim):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    callback = GradientClippingCallback(LIMIT, max_consecutive_skips=0)
    keep = Keep(callback)
    trained(
        tmp_path,
        callback,
        poisoned(scaling(ClippedTrainer, scaler), 2, math.inf),
        others=[keep],
        optim=optim,
    )

    assert [bool(result.skipped) for result in keep.results] == [n == 2 for n in range(STEPS)]
    assert scaler.get_scale() == 2.0**9
    for name, weight in keep.weights[2].items():
        assert torch.equal(weight, keep.weights[1][name])
        assert not torch.equal(weight, keep.weights[3][name])
    for number, moments in keep.moments[2].items():
        assert all(torch.equal(t, keep.moments[1][number][name]) for name, t in moments.items())
    assert keep.rates[0] > keep.rates[1] == keep.rates[2] > keep.rates[3]


def test_it_trains_again_after_a_step_that_was_unscaled_and_not_made(tmp_path):
    class Once(scaling(ClippedTrainer, torch.amp.GradScaler("cpu", init_scale=4.0))):
        bad = True

        def training_step(self, model, *args, **options):
            loss = super().training_step(model, *args, **options)
            if self.bad:
                self.bad = False
                self.model.down.weight.grad[0, 3] = math.inf
            return loss

    callback = GradientClippingCallback(LIMIT, nonfinite="raise")
    made = Once(Model(), arguments(tmp_path), train_dataset=dataset(), callbacks=[callback])
    with pytest.raises(NonFiniteGradientError):
        made.train()
    made.train()
    assert made.state.global_step == STEPS


def test_an_overflow_at_the_smallest_scale_counts(tmp_path):
    class Always(scaling(ClippedTrainer, torch.amp.GradScaler("cpu", init_scale=4.0))):
        def training_step(self, model, *args, **options):
            loss = super().training_step(model, *args, **options)
            self.model.down.weight.grad[0, 3] = math.inf
            return loss

    callback = GradientClippingCallback(LIMIT, max_consecutive_skips=1)
    with pytest.raises(TooManySkipsError, match="at step 3"):
        trained(tmp_path, callback, Always)  # scales 4, 2; then 1 twice


def test_the_mixin_alone_measures_as_before(tmp_path):
    own = trained(tmp_path, None, ClippedTrainer, max_grad_norm=LIMIT)
    wanted = trained(tmp_path, None, max_grad_norm=LIMIT)
    assert [entry.get("grad_norm") for entry in own.state.log_history] == [
        entry.get("grad_norm") for entry in wanted.state.log_history
    ]


# What the page says.


def documented(number):
    """Return the code before and after a diff of the page's section."""
    page = DOCS.read_text(encoding="utf-8")
    lines = re.findall(r"```diff\n(.*?)```", page, re.DOTALL)[number].splitlines()
    return [
        "\n".join(line[1:] for line in lines if not line.startswith(other)) for other in ("+", "-")
    ]


@pytest.mark.filterwarnings("ignore:'pin_memory'")  # there is no accelerator
@pytest.mark.parametrize("number", [0, 1])
def test_the_diff_of_the_page(tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    runs = []
    for code in documented(number):
        known = {
            "Trainer": Trainer,
            "TrainingArguments": TrainingArguments,
            "model": Model(),
            "dataset": dataset(20),
        }
        exec(code, known)
        runs.append(known["trainer"])
    own, ours = runs

    assert losses(ours) == pytest.approx(losses(own), rel=1e-6)
    assert len(losses(ours)) == 4
    for entry in ours.state.log_history[:-1]:
        assert 0 < entry["gradclip/norm_post"] <= 1.0 < entry["gradclip/norm_pre"]
        assert entry["gradclip/norm_pre"] == pytest.approx(entry["grad_norm"], rel=1e-5)
    assert "gradclip/norm_pre" not in own.state.log_history[0]


# Without transformers.


def test_importing_it_without_transformers_says_what_to_install():
    code = """
import sys
import gradclip, gradclip.integrations, gradclip.integrations.torch_optim
assert "transformers" not in sys.modules
sys.modules["transformers"] = None
from gradclip.errors import MissingDependencyError
try:
    import gradclip.integrations.transformers
except MissingDependencyError as error:
    assert error.code == "GC401" and "pip install 'gradclip[transformers]'" in str(error), error
else:
    raise AssertionError
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
