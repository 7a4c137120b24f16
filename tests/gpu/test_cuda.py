"""What only a GPU can show: no host waits, CUDA graphs, races. ``make test-gpu`` runs these."""

from math import inf, nan

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import oracle
from gradclip import GradientClipper, NormClip, ObserveClip, ValueClip
from gradclip.diagnostics import read_norms, read_record
from gradclip.errors import CaptureError, TooManySkipsError

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),  # once in a process
]

BACKENDS = ("triton", "foreach")


def parameters(*shapes, dtypes=(torch.float32, torch.bfloat16)):
    found = []
    for number, shape in enumerate(shapes):
        dtype = dtypes[number % len(dtypes)]
        parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device="cuda"))
        parameter.grad = torch.randn(shape, device="cuda").to(dtype)
        found.append(parameter)
    return found


@pytest.fixture
def no_waiting():
    """The mode in which torch raises where the host would wait for the device."""

    def begin():
        torch.cuda.set_sync_debug_mode("error")

    yield begin
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", [1.0, {"*0": 1.0, "*": ValueClip(clip_value=0.1)}], ids=str)
def test_a_record_makes_no_host_wait(policy, backend, no_waiting, tmp_path):
    weights = parameters((300, 70), (5,), (1000,), (64, 64))
    named = [(f"layer{number}", weight) for number, weight in enumerate(weights)]
    clipper = GradientClipper(named, policy, backend=backend, record=tmp_path)
    expected = [float(weight.grad.double().norm()) for weight in weights]
    loss = torch.ones((), device="cuda")
    for step in range(100):
        if step == 2:  # it is compiled, and memory is there
            torch.cuda.synchronize()
            no_waiting()
        clipper.note(loss=loss)
        clipper.clip()
    torch.cuda.set_sync_debug_mode("default")
    clipper.close()
    assert [record.loss for record in read_record(tmp_path)] == [1.0] * 100
    found = read_norms(tmp_path)
    assert dict(zip(found.names, found.norms[0], strict=True)) == pytest.approx(
        {name: norm for (name, _), norm in zip(named, expected, strict=True)}, rel=5e-3
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "policy",
    [1.0, NormClip(max_norm=1.0, norm_type=inf), NormClip(max_norm=1.0, norm_type=3.0),
     ValueClip(clip_value=0.1), ObserveClip(), {"*0": 1.0, "*": ValueClip(clip_value=0.1)}],
    ids=str,
)  # fmt: skip
def test_the_host_never_waits(policy, backend, no_waiting):
    weights = parameters((300, 70), (5,), (1000,), (64, 64))
    named = [(f"layer{number}", weight) for number, weight in enumerate(weights)]
    clipper = GradientClipper(named, policy, backend=backend)
    clipper.clip()  # compiles, and allocates
    gradients = [weight.grad for weight in weights]
    moved = [torch.randn_like(gradient) for gradient in gradients]
    torch.cuda.synchronize()
    no_waiting()
    for step in range(12):
        for weight, gradient in zip(weights, moved if step % 2 else gradients, strict=True):
            weight.grad = gradient
        result = clipper.clip()
        result.norm_pre, result.skipped, result.coefficient  # noqa: B018 - computed, not read
        weights[0].grad = None


@pytest.mark.parametrize(
    ("policy", "most"), [(1.0, 4), ({"*0": 1.0, "*": ValueClip(clip_value=0.1)}, 6)], ids=str
)
@pytest.mark.parametrize("captured", [False, True])
def test_a_clip_is_a_few_operations_of_the_device(policy, most, captured):
    weights = parameters((300, 70), (5,), (1000,), dtypes=(torch.float32,))
    clipper = GradientClipper([(f"w{number}", w) for number, w in enumerate(weights)], policy)
    for _ in range(3):
        clipper.clip()
    call = clipper.clip
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            clipper.clip()
        call = graph.replay
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        call()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    done = [event.name for event in watched.events() if event.device_type == on_device]
    assert 0 < len(done) <= most, done


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_with_clipping_replays_in_a_cuda_graph(backend):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 300), torch.nn.Tanh(), torch.nn.Linear(300, 1))
    eager = model.cuda()
    captured = torch.nn.Sequential(
        torch.nn.Linear(8, 300), torch.nn.Tanh(), torch.nn.Linear(300, 1)
    ).cuda()
    captured.load_state_dict(eager.state_dict())
    batches = [torch.randn(16, 8, device="cuda") * scale for scale in (1, 30, 1, 0.1, 100, 1)]

    def make_step(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        clipper = GradientClipper(module, 0.5, backend=backend)

        def step(batch):
            optimizer.zero_grad(set_to_none=True)
            module(batch).square().mean().backward()
            result = clipper.clip()
            optimizer.step()
            return result

        return step

    plain, graphed = make_step(eager), make_step(captured)
    static = torch.zeros_like(batches[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    state = {name: value.clone() for name, value in captured.state_dict().items()}
    with torch.cuda.stream(side):
        for _ in range(3):
            graphed(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = graphed(static)
    captured.load_state_dict(state)
    for number, batch in enumerate(batches):
        wanted = plain(batch).to_host()
        static.copy_(batch)
        graph.replay()
        stats = result.to_host()
        assert stats.norm_pre == pytest.approx(wanted.norm_pre, rel=1e-5), number
        assert stats.coefficient == pytest.approx(wanted.coefficient, rel=1e-5), number
        # Other gradients move through the same clipper's memory between replays.
        torch.randn(1 << 20, device="cuda")
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(captured.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_a_capture_before_any_step_is_refused():
    (weight,) = parameters((100,))
    clipper = GradientClipper([weight], 1.0, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(CaptureError, match="two or three times"), torch.cuda.graph(graph):
        clipper.clip()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_host_that_runs_ahead_does_not_overwrite_addresses(backend):
    """Each step's gradients lie elsewhere, and the device is far behind."""
    (weight,) = parameters((4096,), dtypes=(torch.float32,))
    clipper = GradientClipper([weight], 1e9, nonfinite="propagate", backend=backend)
    clipper.clip()
    kept = [torch.full((4096,), float(step), device="cuda") for step in range(200)]
    torch.cuda._sleep(200_000_000)
    results = []
    for gradient in kept:
        weight.grad = gradient
        results.append(clipper.clip())
    assert [float(r.norm_pre) for r in results] == [64.0 * step for step in range(200)]


def test_skips_are_counted_four_steps_late_at_the_same_step_each_time():
    (weight,) = parameters((10,), dtypes=(torch.float32,))
    clipper = GradientClipper([weight], 1.0, max_consecutive_skips=3)
    for _ in range(7):
        weight.grad = torch.full((10,), nan, device="cuda")
        result = clipper.clip()
        assert weight.grad.tolist() == [0.0] * 10
        assert bool(result.skipped)
    weight.grad = torch.full((10,), nan, device="cuda")
    with pytest.raises(TooManySkipsError):
        clipper.clip()


def test_cpu_and_cuda_gradients_in_one_call():
    weights = [*parameters((300,), (40, 5)), torch.nn.Parameter(torch.zeros(50))]
    weights[2].grad = torch.randn(50)
    truth = oracle.norm([weight.grad.cpu() for weight in weights])
    result = GradientClipper(weights, 1.0).clip()
    assert result.norm_pre.device.type == "cuda"
    assert float(result.norm_pre) == pytest.approx(truth, rel=1e-6)
    assert oracle.norm([weight.grad.cpu() for weight in weights]) == pytest.approx(1.0, rel=4e-3)


def test_no_memory_grows_with_the_gradients():
    (weight,) = parameters((1 << 26,), dtypes=(torch.bfloat16,))
    clipper = GradientClipper([weight], 1.0)
    clipper.clip()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    clipper.clip()
    assert torch.cuda.max_memory_allocated() - before < weight.grad.nbytes / 100


def test_norms_of_one_hundred_million_elements():
    (weight,) = parameters((100_000_000,), dtypes=(torch.float32,))
    truth = float(weight.grad.double().norm())
    assert float(GradientClipper([weight], inf).clip().norm_pre) == pytest.approx(truth, rel=2e-7)
