"""Every policy in a training: attached, replayed, resumed, skipped, under a scaler, accumulated."""

import io
from itertools import cycle
from math import inf, nan

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from every_policy import ADAPTIVE, BY_NORMS, EVERY, FOLLOWING, PAPERS, SKIPPING, SPIKING, quick
from gradclip import ObserveClip, attach, replay
from gradclip.clipping.kernels import device
from gradclip.integrations.accelerate import AcceleratorClipper

OPTIMIZERS = {
    "plain": lambda named: torch.optim.SGD(named, lr=0.02, momentum=0.9),
    "fused": lambda named: torch.optim.AdamW(named, lr=0.02, fused=True),
}
FACTORS = {14: 100.0, 15: 100.0, 22: nan, 23: inf}
"""What the loss of a step is multiplied by: two spikes in a row, and what no step is made of."""

every = pytest.mark.parametrize("name", EVERY)
kinds = pytest.mark.parametrize("kind", OPTIMIZERS)


class Training:
    """A model of three tensors that learns noise, so that its gradients do not vanish.

    Args:
        policy: What is attached to its optimizer.
        kind: Which optimizer.
        attached: Whether anything is attached.
    """

    def __init__(self, policy, kind="plain", attached=True):
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 1, bias=False)})
        self.optimizer = OPTIMIZERS[kind](self.model.named_parameters())
        self.handle = attach(self.optimizer, policy) if attached else None

    def loss(self, step, factor=None):
        """Return the loss of a batch; at every seventh one tensor has no gradient."""
        generator = torch.Generator().manual_seed(step)
        inputs, targets = torch.randn(2, 8, 3, generator=generator)
        found = self.model["a"](inputs).tanh()
        if step % 7:
            found = self.model["b"](found)
        factor = FACTORS.get(step, 1.0) if factor is None else factor
        return (found - 3 * targets[:, :1]).square().mean() * factor

    def step(self, step):
        """Make a step, and return what was done about its gradients."""
        self.optimizer.zero_grad()
        self.loss(step).backward()
        self.optimizer.step()
        return self.handle.last

    def steps(self, steps):
        return [self.step(step) for step in steps]

    def numbers(self):
        """Return all numbers that there are: weights, moments, counters, histories."""
        clipper = self.handle.clipper.state_dict()
        kept = [self.model.state_dict(), self.optimizer.state_dict()["state"], clipper["states"]]
        return tensors_of(kept), clipper["committed_steps"]


def tensors_of(kept):
    if isinstance(kept, torch.Tensor):
        return [kept.detach().clone()]
    values = kept.values() if isinstance(kept, dict) else kept
    if isinstance(values, str | int | float | bool):
        return []
    return [tensor for each in values for tensor in tensors_of(each)]


def assert_same(found, expected):
    for mine, theirs in zip(found[0], expected[0], strict=True):
        assert torch.equal(mine, theirs)
    assert found[1] == expected[1]


@pytest.mark.parametrize("name", BY_NORMS)
def test_replay_says_bit_for_bit_what_was_done_in_a_training(name):
    """An infinity gave NaN gradients in ZClip."""
    run = Training(BY_NORMS[name])
    rows = run.steps(range(30))
    found = replay(torch.stack([row.measured_S for row in rows]), BY_NORMS[name])
    for mine, theirs in (
        (found.thresholds, [row.thresholds_S for row in rows]),
        (found.coefficients, [row.coefficients_S for row in rows]),
        (found.norms_post, [row.remaining_S for row in rows]),
    ):
        assert torch.equal(mine.nan_to_num(-1), torch.stack(theirs).nan_to_num(-1))
    writes = BY_NORMS[name].writes
    assert found.skipped.tolist() == [bool(row.skipped) for row in rows]
    assert found.skipped[[14, 15, 22, 23]].tolist() == [name in SKIPPING] * 2 + [writes] * 2
    is_sound = all(bool(weight.isfinite().all()) for weight in run.model.parameters())
    assert is_sound == writes


@every
def test_a_resumed_training_goes_on_bit_for_bit(name):
    """Saved after the first of two spikes: what was skipped in a row is saved too."""
    policy = EVERY[name]
    if name in SPIKING:
        policy = policy.model_copy(update={"max_spikes": 1})
    run = Training(policy, "fused")
    run.steps(range(15))
    file = io.BytesIO()
    parts = {"model": run.model, "optimizer": run.optimizer, "clipper": run.handle.clipper}
    torch.save({part: each.state_dict() for part, each in parts.items()}, file)
    file.seek(0)
    again = Training(policy, "fused")
    for part, state in torch.load(file, weights_only=True).items():
        {"model": again.model, "optimizer": again.optimizer, "clipper": again.handle.clipper}[
            part
        ].load_state_dict(state)
    for step in range(15, 65):
        assert str(again.step(step).to_host()) == str(run.step(step).to_host())
    if policy != ObserveClip():
        assert_same(again.numbers(), run.numbers())


@kinds
@pytest.mark.parametrize("name", SKIPPING)
def test_a_step_that_is_skipped_leaves_a_training_as_if_it_had_not_been(name, kind):
    run, without = Training(EVERY[name], kind), Training(EVERY[name], kind)
    rows = run.steps(range(30))
    assert all(bool(row.skipped) for row in rows[14:16])
    without.steps([*range(14), *range(16, 30)])
    assert_same(run.numbers(), without.numbers())


@pytest.mark.parametrize(("name", "kind"), [*zip(EVERY, cycle(OPTIMIZERS))])
def test_under_a_scaler_and_autocast_a_policy_does_as_without(name, kind):
    """The norms are those of unscaled gradients; an overflow is no step."""
    run, plain = Training(EVERY[name], kind), Training(EVERY[name], kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in [*range(3, 13), -1, *range(13, 18)]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = run.loss(step, inf if step < 0 else None)
            other = None if step < 0 else plain.loss(step)
        run.optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(run.optimizer)
        scaler.update()
        if other is not None:
            plain.optimizer.zero_grad()
            other.backward()
            plain.optimizer.step()
    assert scaler.get_scale() == 2.0**9
    (found, steps), (expected, wanted) = run.numbers(), plain.numbers()
    assert steps == wanted
    # A fused optimizer divides by a scale that has the coefficient in it.
    exact = {"rtol": 0, "atol": 0} if kind == "plain" else {"rtol": 1e-3, "atol": 1e-5}
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **exact)


@every
def test_a_history_is_of_steps_and_not_of_micro_batches(name):
    policy = EVERY[name]
    run, expected = Training(policy, attached=False), Training(policy)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(run.model, run.optimizer)
    clipper = AcceleratorClipper(accelerator, optimizer, policy, model=model)
    for step in range(12):
        expected.optimizer.zero_grad()
        for micro in (step, step + 100):
            with accelerator.accumulate(model):
                accelerator.backward(run.loss(micro))
                clipper.clip()
                optimizer.step()
                optimizer.zero_grad()
            (expected.loss(micro) / 2).backward()
        expected.optimizer.step()
    run.handle = clipper
    assert clipper.clipper.step == 12
    assert_same(run.numbers(), expected.numbers())
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Reads(TorchDispatchMode):
    """Counts how often a number is read from a tensor."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@kinds
@pytest.mark.parametrize("name", [name for name in EVERY if name != "value"])
def test_a_fused_optimizer_is_told_on_the_device_and_for_any_other_one_number_is_read(
    name, kind, unread, monkeypatch
):
    """Published policies read the host at each step, or once for each parameter.

    What steps came to is copied while the device goes on, once for each.
    """
    copies = []
    monkeypatch.setattr(device, "HostCopy", copies.append)
    run = Training(EVERY[name], kind)
    run.steps(range(4, 13))
    writes = name != "observe"
    del copies[:]
    for step in (13, 14, 15, 22, 23):
        run.optimizer.zero_grad()
        run.loss(step).backward()
        with Reads() as reads:
            run.optimizer.step()
        assert reads.count == (writes and kind == "plain"), step
    assert len(copies) == (5 if writes else 0)


class Level(nn.Module):
    """Three tensors whose gradients are what a step says, whatever the weights are."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.zeros(4)) for _ in range(3))

    def forward(self, step):
        generator = torch.Generator().manual_seed(step)
        scatter = torch.randn(3, generator=generator).mul(0.2).exp()
        sizes = scatter * torch.tensor([0.5, 1.5, 0.05]) * (10.0 if step >= 20 else 1.0)
        return sum(
            (weight * size).sum() for weight, size in zip(self.parameters(), sizes, strict=True)
        )


def risen(policy, steps):
    """Train with a level that rises tenfold for good; return what was done at each step."""
    model = Level()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.01)
    handle, rows = attach(optimizer, policy), []
    for step in range(steps):
        optimizer.zero_grad()
        model(step).backward()
        optimizer.step()
        rows.append(handle.last)
    skipped = "".join(str(int(row.skipped)) for row in rows)
    assert ("1" in skipped) == (policy.on_spike == "skip")
    assert max(map(len, skipped.split("0"))) <= 3
    return torch.stack([row.coefficients_S for row in rows])


@pytest.mark.filterwarnings("error:.*clipped .* steps in a row")
@pytest.mark.parametrize("on_spike", ["clip", "skip"])
@pytest.mark.parametrize("name", FOLLOWING)
def test_a_level_that_rises_for_good_neither_sticks_nor_ends_a_training(name, on_spike):
    last = risen(quick(ADAPTIVE[name](on_spike=on_spike)), 130)[-40:]
    made = last[last > 0]  # one step of four, where a policy is stuck
    assert len(made) > 0.75 * last.numel()
    assert made.mean() > 0.9


@pytest.mark.parametrize("on_spike", ["clip", "skip"])
@pytest.mark.parametrize("name", PAPERS)
def test_the_policies_of_papers_end_no_training_at_another_level(name, on_spike):
    """ZClip clips it for ever, AdaGC for two thousand steps, and that warns."""
    policy = ADAPTIVE[name]()
    other = {"on_spike": on_spike, "warmup": min(6, policy.warmup)}
    last = risen(policy.model_copy(update=other), 60)[-20:]
    assert last.max() > 0.01
