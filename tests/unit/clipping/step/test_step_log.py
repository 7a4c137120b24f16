"""``stats`` of a clipper: right on every path, and nothing for it at the step itself."""

import copy
import gc
import math
import pickle
from weakref import ref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from documented_policies import documented
from gradclip import GradientClipper, NormClip, ObserveClip, ValueClip, attach
from gradclip.clipping.step.rows import StepLog
from gradclip.record.ring import BATCH, FIRST, LAG

NAN, INF = math.nan, math.inf
NORMS = [3.0, 0.5, NAN, 8.0, 1.0, INF, 2.0]


def parameters(count=2, size=4):
    return [(f"w{number}", nn.Parameter(torch.zeros(size))) for number in range(count)]


def fill(pairs, norm):
    """Give all gradients together a norm, or a NaN or an infinity to the first."""
    elements = sum(p.numel() for _, p in pairs)
    for number, (_, parameter) in enumerate(pairs):
        value = norm / math.sqrt(elements)
        if not math.isfinite(norm) and number:
            value = 1.0
        parameter.grad = torch.full_like(parameter, value)


POLICIES = {
    "norm": 2.5,
    "infinite": INF,
    "observe": ObserveClip(),
    "norm inf": NormClip(max_norm=0.9, norm_type=INF),
    "norm 3": NormClip(max_norm=1.8, norm_type=3.0),
    "value": ValueClip(clip_value=0.5),
    "patterns": {"w0": 1.5, "*": None},
    "two orders": {"w0": NormClip(max_norm=1.0, norm_type=1.0), "w1": 1.5},
    "by tensor": documented()["TensorLimit"](max_norm=1.5),
    "with history": documented()["UsualNorm"](),
    "skips": documented()["SpikeSkip"](max_norm=1.0, skip_above=5.0),
}


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("policy", POLICIES)
def test_they_are_what_the_results_say(path, policy, nonfinite):
    pairs = parameters()
    clipper = GradientClipper(pairs, POLICIES[policy], nonfinite=nonfinite)
    results = []
    for norm in NORMS * 5:
        fill(pairs, norm)
        results.append(clipper.clip().to_host())
    stats = clipper.stats
    finite = sorted(each.norm_pre for each in results if math.isfinite(each.norm_pre))
    assert stats.steps == len(results)
    assert stats.skipped == sum(each.skipped for each in results)
    assert stats.clipped == sum(each.clipped for each in results)
    assert stats.nonfinite == len(results) - len(finite)
    assert stats.max == pytest.approx(finite[-1], rel=1e-6)
    assert stats.p50 == pytest.approx(finite[len(finite) // 2], rel=1e-6)
    assert clipper.stats == stats


def test_a_loss_scale_is_divided_out():
    pairs = parameters()
    clipper = GradientClipper(pairs, 2.0)
    fill(pairs, 40.0)
    clipper.clip(grad_scale=8.0)
    assert clipper.stats.max == pytest.approx(5.0)


def test_a_parameter_that_comes_later_changes_no_row():
    pairs = parameters()
    optimizer = torch.optim.SGD([pairs[0]], lr=0.1)
    clipper = GradientClipper(optimizer, documented()["TensorLimit"](max_norm=1.0))
    fill(pairs[:1], 3.0)
    clipper.clip()
    optimizer.add_param_group({"params": [pairs[1]]})
    fill(pairs, 4.0)
    clipper.clip()
    assert (clipper.stats.steps, clipper.stats.clipped) == (2, 2)
    assert clipper.stats.max == pytest.approx(4.0)


class Operations(TorchDispatchMode):
    """Counts operations of torch."""

    count = reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def operations(pairs, clipper, steps):
    """Return how many operations each of these steps made, and how many numbers it read."""
    counts = []
    fill(pairs, 4.0)
    for _ in range(steps):
        for _, parameter in pairs:  # where they lie: gradients that moved are looked at again
            parameter.grad.fill_(4.0)
        with Operations() as made:
            clipper.clip()
        counts.append((made.count, made.reads))
    return counts


@pytest.mark.parametrize("policy", ["norm", "observe", "norm inf", "value", "patterns"])
def test_a_step_costs_no_operation_more(path, policy, monkeypatch):
    """But where many are read together: on the CPU every 64 steps, elsewhere without waiting."""
    steps = FIRST + BATCH + LAG + 4
    pairs = parameters(count=4)
    counts = operations(pairs, GradientClipper(pairs, POLICIES[policy]), steps)
    with monkeypatch.context() as patch:
        patch.setattr(StepLog, "push", lambda self, *_, **__: None)
        without = operations(pairs, GradientClipper(pairs, POLICIES[policy]), steps)
    more = [step for step in range(steps) if counts[step] != without[step]]
    together = [FIRST - 1, FIRST - 1 + BATCH]
    if path == "read" and policy != "patterns":
        del together[1]  # after the first step of a small model its numbers are on the host anyway
    late = [step + LAG for step in together] if path == "unread" else []
    assert more == sorted(together + late)
    assert all(counts[step][0] - without[step][0] < 20 for step in more)
    assert [reads for _, reads in counts] == [reads for _, reads in without]


def test_on_an_accelerator_numbers_are_read_some_steps_late(unread):
    pairs = parameters()
    clipper = GradientClipper(pairs, 1.0, nonfinite="propagate")
    fill(pairs, 2.0)
    reads = []
    for _ in range(FIRST + BATCH + LAG + 1):
        clipper.clip()
        reads.append(unread.reads)
    first = FIRST - 1 + LAG
    assert [step for step in range(1, len(reads)) if reads[step] > reads[step - 1]] == [
        first,
        first + BATCH,
    ]


def test_no_gradient_is_kept_alive(path):
    pairs = parameters()
    clipper = GradientClipper(pairs, {"w0": 1.0, "w1": ValueClip(clip_value=0.1)})
    gone = []
    for norm in NORMS:
        fill(pairs, norm)
        gone += [ref(p.grad) for _, p in pairs]
        clipper.clip()
        for _, parameter in pairs:
            parameter.grad = None
    gc.collect()
    assert [each() for each in gone] == [None] * len(gone)
    assert clipper.stats.steps == len(NORMS)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copied_clipper_counts_on_by_itself(way, path):
    pairs = parameters()
    clipper = GradientClipper(pairs, 1.0)
    for norm in NORMS:
        fill(pairs, norm)
        clipper.clip()
    other = way(clipper)
    assert other.stats == clipper.stats
    fill(pairs, 4.0)
    clipper.clip()
    assert (clipper.stats.steps, other.stats.steps) == (len(NORMS) + 1, len(NORMS))


def test_a_loaded_state_numbers_the_steps():
    pairs = parameters()
    first = GradientClipper(pairs, 1.0)
    for _ in range(5):
        fill(pairs, 2.0)
        first.clip()
    second = GradientClipper(pairs, 1.0)
    second.load_state_dict(first.state_dict())
    second.clip()
    assert (second.stats.steps, second.stats.since) == (1, 5)


def test_an_attachment_tells_them():
    pairs = parameters()
    optimizer = torch.optim.SGD(pairs, lr=0.1)
    handle = attach(optimizer, max_norm=1.0)
    for norm in NORMS:
        fill(pairs, norm)
        optimizer.step()
    stats = handle.stats
    assert (stats.steps, stats.clipped, stats.skipped, stats.nonfinite) == (7, 3, 2, 2)
    assert stats.max == pytest.approx(8.0)
    handle.remove()
    assert handle.stats == stats


@pytest.mark.parametrize(("bad", "level"), [(9, "ERROR"), (3, None)])
def test_a_loop_of_which_most_steps_were_not_made_says_so_at_its_end(bad, level, caplog):
    """A loop of one's own has no end that gradclip sees, but that its optimizer is gone."""
    pairs = parameters()
    optimizer = torch.optim.SGD(pairs, lr=0.1)
    handle = attach(optimizer, 1.0)
    for step in range(12):
        fill(pairs, NAN if step < bad else 1.0)
        optimizer.step()
    del optimizer, handle
    gc.collect()
    said = [(each.levelname, each.message) for each in caplog.records]
    assert [name for name, _ in said] == ([level] if level else [])
    assert not said or f"gradclip.attach: {bad} of 12 steps were not made" in said[0][1]
