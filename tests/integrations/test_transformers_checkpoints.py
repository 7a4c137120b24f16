"""transformers.Trainer: the history of the clipper is in its checkpoints."""

import json

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer
from transformers_runs import (
    LIMIT,
    STEPS,
    ClippedTrainer,
    Keep,
    Model,
    arguments,
    dataset,
    trained,
)

from gradclip.clipping import GradientClipper, Policy
from gradclip.clipping.policies import Decision, PolicyState
from gradclip.errors import (
    StateError,
)
from gradclip.integrations.transformers import GradientClippingCallback, history


class Recent(Policy):
    """Half of the mean of the norms so far, for each tensor: a policy with a history."""

    scope = "tensor"
    clip_mode: str = "recent"

    def initial_state(self, scopes):
        zeros = torch.zeros(len(scopes.names), dtype=torch.float64, device=scopes.device)
        steps = torch.zeros((), dtype=torch.int64, device=scopes.device)
        return PolicyState({"total": zeros}, {"steps": steps})

    def decide(self, seen, state):
        total = state.per_scope["total"] + seen.norms_S
        steps = state.shared["steps"] + 1
        mean = total / steps / 2
        return Decision(mean, mean, PolicyState({"total": total}, {"steps": steps}))


def test_a_history_goes_through_json_and_back():
    pairs = [(name, torch.nn.Parameter(torch.zeros(2))) for name in ("head.weight", "a")]
    for _, weight in pairs:
        weight.grad = torch.tensor([3.0, 4.0])
    clipper = GradientClipper(pairs, {"head.*": 1.0, "*": Recent()})
    clipper.clip()
    saved = json.loads(json.dumps(history.exported(clipper), sort_keys=True))
    other = GradientClipper(pairs, {"head.*": 1.0, "*": Recent()})
    history.restore(other, saved, None)
    assert str(other.state_dict()) == str(clipper.state_dict())
    assert "5." in str(other.state_dict()["states"]["*"]["per_scope"]["total"])


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


@pytest.mark.parametrize("policy", [LIMIT, {"*": Recent()}])
def test_it_resumes_where_the_first_group_of_the_optimizer_is_empty(tmp_path, policy):
    """As where biases and norms alone are trained: the trainer puts those into the second."""

    def made():
        model = Model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
        return Trainer(
            model,
            arguments(tmp_path, save_strategy="steps", save_steps=3),
            train_dataset=dataset(),
            callbacks=[GradientClippingCallback(policy)],
        )

    made().train()
    again = made()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.stateful_callbacks["gradclip"]["step"] == STEPS


def test_a_history_that_does_not_fit_says_how_to_go_on(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    trained(tmp_path, GradientClippingCallback(LIMIT), **options)
    made = Trainer(
        Model(),
        arguments(tmp_path, **options),
        train_dataset=dataset(),
        callbacks=[GradientClippingCallback({"up.*": 1.0, "*": LIMIT})],
    )
    path = tmp_path / "checkpoint-3" / "trainer_state.json"
    with pytest.raises(StateError, match=r"take stateful_callbacks\.gradclip out of the"):
        made.train(resume_from_checkpoint=str(path.parent))
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["gradclip"]
    path.write_text(json.dumps(state))
    made.train(resume_from_checkpoint=str(path.parent))
    assert made.state.global_step == STEPS
