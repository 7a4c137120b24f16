"""Lightning's Trainer, clipped by a callback: where in the step, and what it equals."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_runs import (
    BATCHES,
    CLOSE,
    LIMIT,
    QUIET,
    SAME,
    Keep,
    Manual,
    Net,
    adamw,
    fit,
    fused_adamw,
    half,
    momentum,
    weights,
)

from gradclip import NormClip, ValueClip
from gradclip.integrations.lightning import GradientClippingCallback

pytestmark = QUIET


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
def test_without_a_scaler_the_step_begins_when_the_gradients_are_clipped(make):
    """Lightning gives the step a closure, which runs before: a withheld step never begins."""
    events = []
    fit(NotedNet(make, events), Noted(events), batches=2)
    assert events == [*MICRO, *CLIP, *STEP] * 2


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
    window = [*MICRO, "forward", "backward", *CLIP, *STEP]
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


# Manual optimisation.


def test_lightning_refuses_to_clip_under_manual_optimisation():
    with pytest.raises(MisconfigurationException, match="not supported for manual optimization"):
        fit(Manual(), gradient_clip_val=LIMIT)


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
