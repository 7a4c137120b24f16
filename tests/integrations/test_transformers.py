"""transformers.Trainer and TRL: the callback clips, in runs that are real and short."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
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
)

import gradclip
from gradclip import ClipResult, GradientClipper, NormClip, ValueClip
from gradclip.clipping import Policy
from gradclip.clipping.policies import Decision
from gradclip.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    DoubleClippingError,
    NonFiniteGradientError,
    StateError,
    TooManySkipsError,
)
from gradclip.integrations.transformers import GradientClippingCallback

DOCS = Path(__file__).parents[2] / "docs" / "integrations.md"


def trained(folder, callback, trainer=Trainer, *, optimizers=(None, None), others=(), **options):
    """Train a model; return the trainer."""
    model = Model()
    made = trainer(
        model,
        arguments(folder, **options),
        train_dataset=dataset(),
        callbacks=[*others, callback] if callback else [*others],
        optimizers=optimizers,
    )
    made.train()
    return made


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
        assert have["clip/norm_pre"] == pytest.approx(want["grad_norm"], rel=1e-5)
        assert have["clip/norm_post"] <= LIMIT
    assert sum(entry["clip/fraction"] for entry in ours.state.log_history[:-1]) >= STEPS / 2
    assert callback.last.to_host().norm_pre == ours.state.log_history[-2]["clip/norm_pre"]


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
        assert entry["clip/norm_pre"] == float(results[-1].norm_pre)
        assert entry["clip/norm_post"] == float(results[-1].norm_post)
        assert entry["clip/fraction"] == sum(bool(each.clipped) for each in results) / 4
        assert entry["clip/skipped"] == 0
        assert entry["grad_norm"] == pytest.approx(entry["clip/norm_pre"], rel=1e-5)
    assert 0 < sum(entry["clip/fraction"] for entry in history) < 2
    for entry in made.state.log_history:
        assert ("loss" in entry) == ("clip/fraction" in entry)  # not beside an evaluation
    seen = [
        ["clip/fraction" in logs for logs in logger.logs if "loss" in logs]
        for logger in (first, last)
    ]
    # Loggers that the trainer makes itself stand before every callback of the user.
    assert seen == [[trainer is ClippedTrainer] * 2, [True] * 2]


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
    assert [entry["clip/skipped"] for entry in entries] == [int(n == 3) for n in range(STEPS)]
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
        assert have["clip/norm_pre"] == pytest.approx(want["clip/norm_pre"], rel=1e-6)
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


def test_an_overflow_at_the_smallest_scale_counts(tmp_path):
    class Always(scaling(ClippedTrainer, torch.amp.GradScaler("cpu", init_scale=4.0))):
        def training_step(self, model, *args, **options):
            loss = super().training_step(model, *args, **options)
            self.model.down.weight.grad[0, 3] = math.inf
            return loss

    callback = GradientClippingCallback(LIMIT, max_consecutive_skips=1)
    with pytest.raises(TooManySkipsError, match="at step 3"):
        trained(tmp_path, callback, Always)  # scales 4, 2; then 1 twice


# Checkpoints.


class Recent(Policy):
    """Half of the mean of the norms so far, for each tensor: a policy with a history."""

    scope = "tensor"
    clip_mode: str = "recent"

    def initial_state(self, scopes, device):
        zeros = torch.zeros(scopes, dtype=torch.float64, device=device)
        return {"total": zeros, "steps": torch.zeros((), dtype=torch.int64, device=device)}

    def decide(self, norms_S, counts, state):
        total = torch.where(counts, state["total"] + norms_S, state["total"])
        steps = state["steps"] + counts.to(torch.int64)
        mean = total / steps / 2
        return Decision(mean, mean, {"total": total, "steps": steps})


@pytest.mark.parametrize("restores", [False, True])
def test_a_run_resumes_with_the_clippers_history(tmp_path, caplog, restores):
    policy = {"up.*": Recent(), "down.*": Recent(), "*": 1.0}  # in a file, sorted otherwise
    options = {
        "save_strategy": "steps",
        "save_steps": 3,
        "restore_callback_states_from_checkpoint": restores,
    }
    whole = GradientClippingCallback(policy)
    keep = Keep(whole)
    wanted = trained(tmp_path, whole, ClippedTrainer, others=[keep], **options)

    again = GradientClippingCallback(policy)
    kept = Keep(again)
    made = ClippedTrainer(
        Model(), arguments(tmp_path, **options), train_dataset=dataset(), callbacks=[again, kept]
    )
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    assert made.state.global_step == STEPS
    assert len(kept.results) == STEPS - 3
    for have, want in zip(kept.results, keep.results[3:], strict=True):
        assert have.to_host() == want.to_host()
    for have, want in zip(made.model.parameters(), wanted.model.parameters(), strict=True):
        assert torch.equal(have, want)
    saved = made.state.stateful_callbacks["gradclip"]
    assert saved == wanted.state.stateful_callbacks["gradclip"]
    assert saved["step"] == STEPS

    # transformers makes callbacks anew of what it saved of them, and finds none of that name.
    assert (
        "not included in current configuration. Ignoring. (gradclip)" in caplog.text
    ) == restores

    other = GradientClippingCallback(1.0)
    with pytest.raises(StateError, match="recent"):
        ClippedTrainer(
            Model(), arguments(tmp_path, **options), train_dataset=dataset(), callbacks=[other]
        ).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_damaged_history_is_an_error(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    trained(tmp_path, GradientClippingCallback({"*": Recent()}), **options)
    path = tmp_path / "checkpoint-3" / "trainer_state.json"
    path.write_text(path.read_text().replace("float64", "float65"))
    made = Trainer(
        Model(),
        arguments(tmp_path, **options),
        train_dataset=dataset(),
        callbacks=[GradientClippingCallback({"*": Recent()})],
    )
    with pytest.raises(StateError, match="float65"):
        made.train(resume_from_checkpoint=str(path.parent))


def test_a_checkpoint_without_a_history_begins_one(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    trained(tmp_path, None, max_grad_norm=LIMIT, **options)
    callback = GradientClippingCallback(LIMIT)
    keep = Keep(callback)
    made = Trainer(
        Model(), arguments(tmp_path, **options), train_dataset=dataset(), callbacks=[callback, keep]
    )
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    assert made.state.stateful_callbacks["gradclip"]["step"] == STEPS - 3 == len(keep.results)


# One owner.


def refused(trainer):
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with pytest.raises(DoubleClippingError) as caught:
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(map(torch.equal, trainer.model.parameters(), before))
    assert caught.value.code == "GC101"
    return str(caught.value)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize(("options", "seen"), [({}, "1.0"), ({"max_grad_norm": 0.25}, "0.25")])
def test_a_trainer_that_clips_is_refused_before_the_first_step(tmp_path, trainer, options, seen):
    args = arguments(tmp_path)
    args.max_grad_norm = options.get("max_grad_norm", type(args)(str(tmp_path)).max_grad_norm)
    callback = GradientClippingCallback(NormClip(max_norm=LIMIT))
    said = refused(trainer(Model(), args, train_dataset=dataset(), callbacks=[callback]))

    assert f"Trainer    max_grad_norm = {seen}    (TrainingArguments; 1.0 where it is not" in said
    assert "gradclip   policy        = NormClip(clip_mode='norm', max_norm=0.5" in said
    assert "TrainingArguments(..., max_grad_norm=0)" in said
    assert said.endswith("No parameters were changed.")
    assert callback.last is None


def test_a_second_clipper_of_gradclip_is_refused(tmp_path):
    model = Model()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.01)
    options = {"train_dataset": dataset(), "optimizers": (optimizer, None)}
    callback = GradientClippingCallback(LIMIT)
    made = Trainer(model, arguments(tmp_path), callbacks=[callback], **options)
    with gradclip.attach(optimizer, 1.0):
        said = refused(made)
    assert "gradclip.attach; GradientClippingCallback would clip them again" in said

    made.train()  # it was taken off
    assert made.state.global_step == STEPS
    gradclip.attach(optimizer, 1.0).remove()  # after training the optimizer is free

    made.add_callback(GradientClippingCallback(1.0))
    with pytest.raises(DoubleClippingError, match="GradientClippingCallback; GradientClippingCal"):
        made.train()


def test_nothing_can_be_attached_while_it_trains(tmp_path):
    class Attaching(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **_):
            gradclip.attach(optimizer, 1.0)

    with pytest.raises(DoubleClippingError, match="by GradientClippingCallback"):
        trained(tmp_path, GradientClippingCallback(LIMIT), others=[Attaching()])


def test_it_trains_twice(tmp_path):
    callback = GradientClippingCallback(LIMIT)
    made = trained(tmp_path, callback)
    made.train()
    assert made.state.stateful_callbacks["gradclip"]["step"] == STEPS


@pytest.mark.parametrize(
    ("error", "args", "options"),
    [
        (ArgumentValueError, (-1.0,), {}),
        (ArgumentTypeError, ("1.0",), {}),
        (ArgumentValueError, (1.0,), {"nonfinite": "ignore"}),
        (ArgumentTypeError, (1.0,), {"max_consecutive_skips": 1.5}),
        (ArgumentValueError, (1.0,), {"backend": "cuda"}),
    ],
)
def test_wrong_arguments_are_refused_when_it_is_made(error, args, options):
    with pytest.raises(error):
        GradientClippingCallback(*args, **options)


def test_the_mixin_alone_measures_as_before(tmp_path):
    own = trained(tmp_path, None, ClippedTrainer, max_grad_norm=LIMIT)
    wanted = trained(tmp_path, None, max_grad_norm=LIMIT)
    assert [entry.get("grad_norm") for entry in own.state.log_history] == [
        entry.get("grad_norm") for entry in wanted.state.log_history
    ]


def test_other_stateful_callbacks_are_still_restored(tmp_path):
    options = {
        "save_strategy": "steps",
        "save_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "restore_callback_states_from_checkpoint": True,
    }
    for resumes in (False, True):
        stopping = EarlyStoppingCallback(5)
        made = ClippedTrainer(
            Model(),
            arguments(tmp_path, **options),
            train_dataset=dataset(),
            eval_dataset=dataset(2),
            callbacks=[stopping, GradientClippingCallback(LIMIT)],
        )
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4") if resumes else None)
    assert {"EarlyStoppingCallback", "gradclip"} <= made.state.stateful_callbacks.keys()
    assert made.state.stateful_callbacks["gradclip"]["step"] == STEPS


# What the page says.


def documented(number):
    """Return the code before and after a diff of the page's section."""
    section = DOCS.read_text().split("\n## transformers and TRL\n")[1].split("\n## ")[0]
    lines = re.findall(r"```diff\n(.*?)```", section, re.DOTALL)[number].splitlines()
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
        assert 0 < entry["clip/norm_post"] <= 1.0 < entry["clip/norm_pre"]
        assert entry["clip/norm_pre"] == pytest.approx(entry["grad_norm"], rel=1e-5)
    assert "clip/norm_pre" not in own.state.log_history[0]


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
