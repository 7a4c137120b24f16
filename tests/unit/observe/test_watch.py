"""What a watch sees of steps that are made in unusual ways; each case in a process of its own."""

import math
import re
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from gradclip.diagnostics import read_events, read_header, read_norms, read_steps
from gradclip.diagnostics.blame import blame, outstanding
from gradclip.diagnostics.known import known
from gradclip.diagnostics.runs import read_runs
from processes import alone


def watched(make, folder):
    """Run a loop in a fresh process, watched; return what it returned and what was said."""
    return alone(_watched, make, str(folder))


def _watched(make, folder):
    import contextlib  # noqa: PLC0415 - it runs in another process
    import io  # noqa: PLC0415

    from gradclip.observe.session import begin  # noqa: PLC0415

    session = begin(Path(folder), {}, 1)
    returned = make()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        session.end()
    return returned, said.getvalue()


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def loss_of(net, step=0):
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    return (net(x) - x.sum(1, keepdim=True)).square().mean()


def norm_of(net):
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in net.parameters()))


def one_clip_of_two_optimizers():
    net = model()
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (net[0], net[2])]
    norms = []
    for step in range(3):
        net.zero_grad()
        loss_of(net, step).backward()
        norms.append(norm_of(net))
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        for each in optimizers:
            each.step()
    return norms


def test_a_clip_of_two_optimizers_has_its_own_norm(tmp_path):
    norms, said = watched(one_clip_of_two_optimizers, tmp_path)
    assert said.count("3 of 3 steps (100 %) were clipped") == 2
    for optimizer in range(2):
        steps = [each for each in read_steps(tmp_path) if each.optimizer == optimizer]
        assert [each.norm_pre for each in steps] == pytest.approx(norms, rel=1e-5)
        assert read_norms(tmp_path, optimizer=optimizer).names == [
            f"{2 * optimizer}.weight",
            f"{2 * optimizer}.bias",
        ]


def closures():
    net = model()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=4)
    found = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        found.append((loss.item(), norm_of(net)))
        return loss

    firsts = []
    for _ in range(3):
        found.clear()
        optimizer.step(closure)
        firsts.append(found[0])
    return firsts


def test_a_closure_is_measured_at_its_first_end(tmp_path):
    firsts, _ = watched(closures, tmp_path)
    steps = read_steps(tmp_path)
    assert [each.loss for each in steps] == pytest.approx([loss for loss, _ in firsts])
    assert [each.norm_pre for each in steps] == pytest.approx([n for _, n in firsts], rel=1e-5)


def infinity_norms():
    net, largest = model(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        largest.append(max(p.grad.abs().max().item() for p in net.parameters()))
        nn.utils.clip_grad_norm_(net.parameters(), 0.5, norm_type=math.inf)
        optimizer.step()
    return max(largest)


def test_what_is_said_at_the_end_is_of_the_norm_that_is_limited(tmp_path):
    largest, said = watched(infinity_norms, tmp_path)
    assert f"at the largest norm, {largest:.3g} at step" in said
    assert "none is suggested: the script limits the norm of order inf" in said


def spikes(clips, leaves_out):
    from gradclip.observe import watch  # noqa: PLC0415 - in the process that is watched

    if leaves_out:
        watch.Governor.is_due = lambda _, step: step % 2 == 0
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-5)
    for step in range(100):
        optimizer.zero_grad()
        loss = net[2](net[1](net[0](torch.ones(1, 4)))).square().sum()
        (loss * (math.nan if step == 80 else 1)).backward()
        if step % 10 == 4:
            net[0].weight.grad *= 1000
        if clips:
            nn.utils.clip_grad_norm_(net.parameters(), 20.0)
        optimizer.step()


def spikes_of_a_script():
    spikes(clips=False, leaves_out=False)


def half_of_the_steps():
    spikes(clips=False, leaves_out=True)


def clipped_spikes():
    spikes(clips=True, leaves_out=False)


def test_the_layer_of_the_spikes_comes_first_and_what_a_nan_did_is_told(tmp_path):
    _, said = watched(spikes_of_a_script, tmp_path)
    assert "  layer   layer 0 makes the spikes, most by 0.weight: " in said
    (run,) = map(known, read_runs(tmp_path))
    assert blame(run, outstanding(run)).verdict == "makes"
    assert (
        "20 steps with a NaN or an infinity, first step 80, in all 4 parameters. Step 80 was made, "
        "so the weights have"
    ) in said
    assert "gradclip.GuardClip()" in said


def test_steps_with_a_nan_are_not_among_those_that_could_be_clipped(tmp_path):
    _, said = watched(clipped_spikes, tmp_path)
    assert "8 of the 80 steps that had a limit and a finite norm (10 %) were clipped" in said
    assert re.search(r"suggested is .*, which would have clipped .* of 80 steps\n", said)


def test_what_was_not_measured_is_told(tmp_path):
    _, said = watched(half_of_the_steps, tmp_path)
    assert (
        "  steps   50 of 100 steps were measured, so the largest spikes may be missing: gradclip "
        "run --every 1 measures all\n"
    ) in said
    assert "10 of the 50 measured steps with a NaN" in said
    assert "Step 80 or one before it was made" in said


def thinned():
    from gradclip.observe import watch  # noqa: PLC0415 - in the process that is watched

    net, clones, clone = model(), [], torch.Tensor.clone
    torch.Tensor.clone = lambda self, *a, **k: clones.append(1) or clone(self, *a, **k)
    watch.Governor.is_due = lambda _, step: step % 8 == 0
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for step in range(24):
        optimizer.zero_grad()
        loss = loss_of(net, step)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses[::8], len(clones)


def test_steps_that_are_not_measured_cost_no_copy_of_the_loss(tmp_path):
    (losses, copies), _ = watched(thinned, tmp_path)
    assert [each.loss for each in read_steps(tmp_path)] == pytest.approx(losses)
    assert copies == 3


def gradclip_itself():
    import gradclip  # noqa: PLC0415
    from gradclip.clipping import functional  # noqa: PLC0415 - the wrapped one

    net, norms = model(), []
    attached = torch.optim.SGD(net.parameters(), lr=0.1)
    warnings.filterwarnings("error", message=".* has step hooks")  # ours only look
    gradclip.attach(attached, 0.5, nonfinite="skip")
    for step in range(4):
        attached.zero_grad()
        loss_of(net, step).backward()
        if step == 2:
            net[2].bias.grad.fill_(math.nan)
        norms.append(norm_of(net))
        attached.step()
    net = model(1)
    by_hand = torch.optim.SGD(net.parameters(), lr=0.1)
    clipper = gradclip.GradientClipper(net, 0.25)
    for step in range(3):
        by_hand.zero_grad()
        loss_of(net, step).backward()
        norms.append(norm_of(net))
        if step < 2:
            clipper.clip()
        else:
            functional.clip_grad_norm_(net.parameters(), max_norm=0.125)
        by_hand.step()
    return norms


def test_what_gradclip_clips_is_recorded_once(tmp_path):
    norms, said = watched(gradclip_itself, tmp_path)
    steps = list(read_steps(tmp_path))
    assert [(each.optimizer, each.step) for each in steps] == [
        *((0, step) for step in range(4)),
        *((1, step) for step in range(3)),
    ]
    assert [each.threshold for each in steps] == [0.5] * 4 + [0.25, 0.25, 0.125]
    assert [each.skipped for each in steps] == [False, False, True] + [False] * 4
    assert steps[2].reason == "nonfinite"
    finite = [each for each in norms if math.isfinite(each)]
    assert [s.norm_pre for s in steps if not s.skipped] == pytest.approx(finite, rel=1e-5)
    (nonfinite,) = [each for each in read_events(tmp_path) if each["event"] == "nonfinite"]
    assert nonfinite["parameters"] == ["2.bias"]
    assert "1 step not made (1 for nonfinite)" in said


class Wrapping(torch.optim.Optimizer):
    """Hands its steps on, and knows no hooks of its own."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self._optimizer_step_pre_hooks = {}
        self._optimizer_step_post_hooks = {}

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self._patch_step_function()  # as Optimizer.zero_grad does where __init__ was not called
        self.optimizer.zero_grad(set_to_none)


class Ahead(torch.optim.SGD):
    """Makes its step by the step of its base class."""

    def step(self, closure=None):
        return super().step(closure)


def wrapped_and_derived():
    net = model()
    torch.optim.SGD(net.parameters(), lr=0.1)
    for optimizer in (
        Wrapping(torch.optim.Adam(net.parameters(), lr=0.1)),
        Ahead(net.parameters(), lr=0.1),
    ):
        for step in range(3):
            optimizer.zero_grad()
            loss_of(net, step).backward()
            optimizer.step()


def test_a_step_inside_a_step_is_one(tmp_path):
    watched(wrapped_and_derived, tmp_path)
    steps = read_steps(tmp_path)
    assert [(each.optimizer, each.step) for each in steps] == [
        (number, step) for number in range(2) for step in range(3)
    ]
    kinds = [each["kind"] for each in read_header(tmp_path)["optimizers"]]
    assert kinds == ["Adam", "Ahead"]


def errors_and_more_steps():
    net, shown = model(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    hook = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    loss_of(net).backward()
    net[0].bias.grad.fill_(math.nan)
    for wrong, kind in (
        (optimizer.step, ZeroDivisionError),
        (lambda: optimizer.step(lambda: 1 / 0), ZeroDivisionError),
        (lambda: net(torch.ones(2, 4)).backward(), RuntimeError),
        (lambda: nn.utils.clip_grad_norm_(net.parameters(), 1, error_if_nonfinite=True), Exception),
        (lambda: nn.utils.clip_grad.clip_grad_value_(3, 1.0), TypeError),
    ):
        with pytest.raises(kind) as caught:
            wrong()
        shown += [frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)]
        hook.remove()
    optimizer.step()
    return shown


def test_errors_are_shown_without_our_frames_and_hide_no_other_step(tmp_path):
    shown, said = watched(errors_and_more_steps, tmp_path)
    assert any(path.endswith("clip_grad.py") for path in shown)
    assert not any("observe/w" in path for path in shown)
    assert len(read_steps(tmp_path)) == 2
    assert "stopped early" not in said


def something_breaks():
    from gradclip.observe import watch  # noqa: PLC0415

    def broken(*_):
        raise RuntimeError("no norms today")

    watch.norms_of = broken
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()
    return loss_of(net).item()


def test_a_fault_of_ours_stops_no_training(tmp_path):
    loss, said = watched(something_breaks, tmp_path)
    assert math.isfinite(loss)
    assert "watching stopped early" in said
    assert "no norms today" in said
