"""``record=``: what the results say, on every path, and nothing for it at the step itself."""

import copy
import gc
import math
import pickle
from contextlib import nullcontext
from weakref import ref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradclip
from documented_policies import documented
from gradclip import AGCClip, GradientClipper, NormClip, ObserveClip, ValueClip
from gradclip.diagnostics import read_events, read_header, read_norms, read_record
from gradclip.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    NonFiniteGradientError,
    RecordError,
)
from gradclip.record.ring import BATCH, FIRST, LAG

NAN, INF = math.nan, math.inf
NORMS = [3.0, 0.5, NAN, 8.0, 1.0, INF, 2.0, 30.0]
FIELDS = ("norm_pre", "norm_post", "threshold", "coefficient", "clipped", "skipped", "nonfinite")


def parameters(dtype=torch.float32):
    shapes = ((3, 2), (2,), (4, 2))
    return [(f"w{n}", nn.Parameter(torch.ones(s, dtype=dtype))) for n, s in enumerate(shapes)]


def fill(pairs, norm, step):
    """Give gradients a norm, each another part of it; a NaN or an infinity to the second."""
    elements = sum(p.numel() for _, p in pairs)
    for number, (_, parameter) in enumerate(pairs):
        value = norm if math.isfinite(norm) else 1.0
        parameter.grad = torch.full_like(parameter, value / math.sqrt(elements) * (1 + number / 4))
        if number == 1 and not math.isfinite(norm):
            parameter.grad[1] = norm
    if step == 4:
        pairs[0][1].grad = None


POLICIES = {
    "norm": 2.5,
    "observe": ObserveClip(),
    "norm inf": NormClip(max_norm=0.9, norm_type=INF),
    "norm 1": NormClip(max_norm=4.0, norm_type=1.0),
    "norm 3": NormClip(max_norm=1.8, norm_type=3.0),
    "value": ValueClip(clip_value=0.5),
    "patterns": {"w0": 1.5, "w1": None, "*": ValueClip(clip_value=0.25)},
    "two orders": {"w0": NormClip(max_norm=1.0, norm_type=INF), "*": 1.5},
    "by tensor": documented()["TensorLimit"](max_norm=1.5),
    "by unit": {"w1": 1.0, "*": AGCClip(units={"w*": 0})},
    "skips": documented()["SpikeSkip"](max_norm=1.0, skip_above=5.0),
}


def same(found, wanted):
    return found == pytest.approx(wanted, rel=2e-6, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_record_says_what_the_results_say(path, policy, dtype, tmp_path):
    pairs = parameters(dtype)
    clipper = GradientClipper(pairs, POLICIES[policy], record=tmp_path / "run")
    results, norms = [], []
    order = {"norm inf": INF, "norm 1": 1.0, "norm 3": INF}.get(policy, 2.0)
    orders = {"w0": INF if policy == "two orders" else order, "w1": order, "w2": order}
    for step, norm in enumerate(NORMS * 4):
        fill(pairs, norm, step)
        norms.append(
            {n: 0.0 if p.grad is None else float(p.grad.norm(orders[n])) for n, p in pairs}
        )
        results.append(clipper.clip().to_host())
    clipper.close()
    records = read_record(tmp_path / "run")
    assert [record.step for record in records] == list(range(len(results)))
    for record, wanted in zip(records, results, strict=True):
        assert record.reason == wanted.skip_reason
        for found, stats in (
            (record, wanted),
            *((record.groups[name], stats) for name, stats in wanted.groups.items()),
        ):
            for name in FIELDS:
                assert same(getattr(found, name), getattr(stats, name)), (record.step, name)
    found = read_norms(tmp_path / "run")
    assert set(found.names) == {"w0", "w2"} if policy == "patterns" else {"w0", "w1", "w2"}
    for of_step, wanted in zip(found.norms, norms, strict=True):
        for name, one in zip(found.names, of_step, strict=True):
            assert one == pytest.approx(wanted[name], rel=5e-3, nan_ok=True), name


def train(folder, steps=range(90), **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.5, momentum=0.9)
    handle = gradclip.attach(optimizer, 0.3, record=folder, **options)
    for _ in steps:
        optimizer.zero_grad()
        loss = model(torch.randn(4, 3)).square().mean()
        loss.backward()
        handle.note(loss=loss)
        optimizer.step()
    return handle, model


def test_a_run_is_the_same_bit_for_bit(tmp_path):
    _, plain = train(None)
    handle, recorded = train(tmp_path)
    handle.remove()
    for one, other in zip(plain.parameters(), recorded.parameters(), strict=True):
        assert torch.equal(one, other)
    steps = read_record(tmp_path)
    assert len(steps) == 90
    assert all(step.loss is not None and step.lr == 0.5 and step.elapsed_ms for step in steps)
    (said,) = read_header(tmp_path)["optimizers"]
    assert (said["called"], said["kind"]) == ("gradclip.attach", "SGD")
    assert said["norms"][0]["sizes"] == [24, 8, 8, 1]


class Reads(TorchDispatchMode):
    """Counts how often the host asks for a number."""

    def __init__(self):
        super().__init__()
        self.reads = self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["norm", "value", "patterns", "by tensor"])
def test_an_accelerator_is_not_waited_for(unread, policy, tmp_path):
    counts = {}
    for folder in (None, tmp_path / "run"):
        pairs = parameters()
        clipper = GradientClipper(pairs, POLICIES[policy], record=folder)
        counts[folder] = []
        for _ in range(FIRST + BATCH + LAG + 2):
            fill(pairs, 4.0, 0)
            clipper.note(lr=0.1)
            with Reads() as made:
                clipper.clip()
            counts[folder].append((made.reads, made.operations))
    plain, recorded = counts.values()
    assert [reads for reads, _ in recorded] == [reads for reads, _ in plain]
    # All of it every 64 steps; what is copied then is read some steps later.
    more = [
        step
        for step in range(1, len(plain))
        if recorded[step][1] - plain[step][1] > recorded[1][1] - plain[1][1]
    ]
    assert set(more) <= {n * BATCH + FIRST - 1 + late for n in range(2) for late in (0, LAG)}
    clipper.close()
    assert len(read_record(tmp_path / "run")) == len(plain)


def test_events_name_the_parameters_and_the_reasons(tmp_path):
    pairs = parameters()
    clipper = GradientClipper(pairs, 1.0, record=tmp_path)
    for step, norm in enumerate((2.0, NAN, 50.0, 2.0)):
        fill(pairs, norm, step)
        if step == 3:
            clipper.policy = 0.5
        clipper.clip(overflow_expected=step == 1)
    clipper.close()
    nonfinite, skip, spike, limit = read_events(tmp_path)
    assert nonfinite == {"event": "nonfinite", "step": 1, "tensors": 1, "parameters": ["w1"]}
    assert skip == {"event": "skip", "step": 1, "reason": "overflow"}
    assert (spike["event"], spike["step"], spike["threshold"]) == ("spike", 2, 1.0)
    assert (limit["step"], "max_norm=0.5" in limit["policy"]) == (3, True)


def test_a_loss_is_the_mean_of_its_window_and_a_number(tmp_path):
    pairs = parameters()
    clipper = GradientClipper(pairs, 1.0, record=tmp_path)
    total = torch.tensor(3.0)
    fill(pairs, 1.0, 0)
    clipper.note(loss=1.0, lr=torch.tensor(0.25))
    clipper.note(loss=total)
    total += 5.0
    clipper.clip()
    clipper.clip()
    for loss in ("low", 10**400):
        with pytest.raises(ArgumentTypeError, match=f"loss is of type {type(loss).__name__}"):
            clipper.note(loss=loss)
    with pytest.raises(ArgumentValueError, match="lr is a tensor of shape"):
        clipper.note(lr=torch.zeros(2))
    clipper.close()
    first, second = read_record(tmp_path)
    assert (first.loss, first.lr, second.loss, second.lr) == (2.0, 0.25, None, None)
    GradientClipper(pairs, 1.0).note(loss=1.0)  # nothing records it


def test_a_loss_that_is_told_after_its_step_is_noticed(tmp_path):
    pairs = parameters()
    clipper = GradientClipper(pairs, 1.0, record=tmp_path)
    for _ in range(3):
        fill(pairs, 2.0, 0)
        clipper.clip()
        clipper.note(loss=1.0)
    with pytest.warns(UserWarning, match="one step late: call it before"):
        clipper.clip()


def test_a_run_goes_on_behind_its_state_and_another_one_is_refused(tmp_path):
    handle, _ = train(tmp_path)
    state = handle.clipper.state_dict()
    for _ in range(5):
        handle.optimizer.step()
    handle.remove()
    assert len(read_record(tmp_path)) == 95
    pairs = parameters()
    again = GradientClipper(pairs, 0.3, record=tmp_path)
    fill(pairs, 4.0, 0)
    before = [p.grad.clone() for _, p in pairs]
    with pytest.raises(RecordError, match="Three ways out"):
        again.clip()
    for (_, parameter), kept in zip(pairs, before, strict=True):
        assert torch.equal(parameter.grad, kept)
    again.load_state_dict(state)
    again.clip()
    again.clip()
    again.close()
    assert [record.step for record in read_record(tmp_path)] == list(range(92))
    again.clip()  # goes on by itself
    again.close()
    assert len(read_record(tmp_path)) == 93
    assert [part["first_step"] for part in read_header(tmp_path)["optimizers"][0]["norms"]] == [
        0,
        90,
    ]


def test_two_clippers_share_a_folder(tmp_path):
    pairs = parameters(), parameters()
    one, other = (GradientClipper(each, 1.0, record=tmp_path) for each in pairs)
    for each in pairs:
        fill(each, 1.0, 0)
    for clipper in (one, other, one):
        clipper.clip()
    one.close()
    other.close()
    assert sorted(record.optimizer for record in read_record(tmp_path)) == [0, 0, 1]


def test_parameters_of_one_name_are_kept_apart(tmp_path):
    pairs = [("w", parameter) for _, parameter in parameters()]
    clipper = GradientClipper(pairs, ObserveClip(), record=tmp_path)
    fill(pairs, 4.0, 0)
    clipper.clip()
    clipper.close()
    found = read_norms(tmp_path)
    assert found.names == ["w", "w (2)", "w (3)"]
    assert found.norms[0] == pytest.approx([float(p.grad.norm()) for _, p in pairs], rel=5e-3)


def test_an_error_leaves_a_record_of_the_steps_before_it(tmp_path):
    pairs = parameters()
    clipper = GradientClipper(pairs, 1.0, record=tmp_path, nonfinite="raise")
    for step, norm in enumerate((1.0, 2.0, NAN)):
        fill(pairs, norm, step)
        raised = pytest.raises(NonFiniteGradientError) if step == 2 else nullcontext()
        with raised:
            clipper.clip()
    assert len(read_record(tmp_path)) == 2
    (event,) = read_events(tmp_path)
    assert (event["event"], event["step"], event["code"]) == ("error", 2, "GC201")


@pytest.mark.parametrize("way", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_records_nothing(way, tmp_path):
    pairs = parameters()
    clipper = GradientClipper(pairs, 1.0, record=tmp_path)
    fill(pairs, 1.0, 0)
    clipper.clip()
    other = way(clipper)
    assert other._engine.recorder.asks is False
    clipper.close()
    assert len(read_record(tmp_path)) == 1


def test_a_name_that_no_disk_takes_is_told_before_the_first_step(tmp_path):
    pairs = parameters()
    clipper = GradientClipper(pairs, 1.0, record=tmp_path / ("x" * 300))
    with pytest.raises(RecordError, match=r"name too long\. Give another folder"):
        clipper.clip()


def test_a_fork_writes_what_it_opened_itself(tmp_path, monkeypatch):
    pairs = parameters()
    fill(pairs, 1.0, 0)
    opened, closed = (GradientClipper(pairs, 1.0, record=tmp_path / name) for name in "ab")
    opened.clip()
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: -1)
        for clipper in (opened, closed):
            for _ in range(2 * FIRST):
                fill(pairs, 2.0, 0)
                clipper.clip()
            clipper.close()
    opened.close()
    assert len(read_record(tmp_path / "a")) == 1
    assert len(read_record(tmp_path / "b")) == 2 * FIRST


def test_a_record_stays_where_it_was_when_the_working_folder_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = parameters()
    clipper = GradientClipper(pairs, 1.0, record="run")
    fill(pairs, 1.0, 0)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    clipper.clip()
    clipper.close()
    assert len(read_record(tmp_path / "run")) == 1


@pytest.mark.parametrize(
    ("folder", "error"),
    [
        (3, ArgumentTypeError),
        ("x.jsonl", ArgumentValueError),
        ("", ArgumentValueError),
        ("a\0b", ArgumentValueError),
    ],
)
def test_a_record_is_a_folder(folder, error):
    with pytest.raises(error, match=r"record=.*expected a (path|folder)"):
        GradientClipper(parameters(), 1.0, record=folder)


@pytest.mark.parametrize("recorded", [False, True])
def test_what_is_clipped_may_go_and_is_written_then(recorded, tmp_path):
    handle, model = train(tmp_path if recorded else None)
    gone = ref(handle.optimizer), ref(handle.clipper), ref(model)
    del handle, model
    gc.collect()
    assert [each() for each in gone] == [None] * 3
    assert not recorded or len(read_record(tmp_path)) == 90
