"""All that a GPU can tell of gradclip in a few minutes, the most valuable first.

    make gpu-check                               # this, and then the tests that need a GPU
    PYTHONPATH=src python benchmarks/gpu_check.py

Prints as it measures. Writes ``benchmarks/results/clip_gpu.csv`` after each part, a line for each
measurement. A part that fails prints why, and the next one runs. The floor is the time in which
the memory can be read once: a norm takes at least one, clamping, which reads and writes, two, and
clipping, which reads, reads again and writes, three.

The Triton kernels are measured; ``GRADCLIP_BACKEND=foreach`` measures torch's functions instead.
"""

import gc
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import inf, nan
from pathlib import Path
from typing import NamedTuple

import torch
from gradients import Gradients
from models import Case, Shapes, cases
from timing import RESULTS, Function, Times, machine, nothing, paired, replayed, write
from torch.autograd import DeviceType
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.profiler import ProfilerActivity, profile

import gradclip
from gradclip import GradientClipper, NormClip, ObserveClip, ValueClip
from gradclip.clipping.kernels import triton_plan

FAR = 1e6
"""A limit that is not reached."""

POLICIES = {
    "clips": 0.1,
    "within": FAR,
    "p = inf": NormClip(max_norm=1e-4, norm_type=inf),
    "p = 3": NormClip(max_norm=0.01, norm_type=3.0),
    "value": ValueClip(clip_value=1e-4),
    "observe": ObserveClip(),
    "two groups": {"*0": 0.01, "*": 0.05},
}
"""Limits for gradients with a norm of 0.2."""

MEASURED = [
    ("GPT-2 124M", torch.float32),
    ("language model 1.5 G", torch.bfloat16),
    ("GPT-2 124M", torch.bfloat16),
    ("robot policy", torch.float32),
    ("language model 1.5 G", torch.float32),
    ("mixture of experts 1.7 G", torch.bfloat16),
    ("ResNet-50", torch.float32),
    ("language model 8 G", torch.bfloat16),
]


@dataclass(frozen=True)
class Sizes:
    """How much is measured: enough for a GPU, where nothing else is said.

    Args:
        rounds: Measurements of each time; fewer of large models.
        detailed: How many models are measured kernel by kernel, and with other chunks.
        memory: Elements that are read and copied to find the bandwidth.
        smoke: Shapes of the gradients that are clipped by every policy.
        chunks: Elements of a program, to try.
        programs: Programs of the pass that scales, for each multiprocessor, to try.
        layers: Linear layers of the model that is trained: two tensors each.
        width: Its width.
        batch: Its inputs.
        in_a_row: Steps between two looks at the clock, so that the host can run ahead.
    """

    rounds: int = 15
    detailed: int = 2
    memory: int = 1 << 29
    smoke: tuple[tuple[int, ...], ...] = ((300, 70), (5,), (64, 64), (1 << 20,))
    chunks: tuple[int, ...] = (1 << 13, 1 << 14, 1 << 15, 1 << 16)
    programs: tuple[int, ...] = (4, 8, 64, 1 << 13)
    layers: int = 74
    width: int = 1024
    batch: int = 2048
    in_a_row: int = 8


class Gpu:
    """The device: where tensors are, and what is measured or held in a way of its own there."""

    name = "cuda"

    def machine(self) -> str:
        return machine(self.name)

    def graph_ms(
        self, functions: dict[str, Function], rounds: int, prepare: Function = nothing
    ) -> dict[str, Times]:
        """Return what the device takes for each, without the host."""
        return replayed(functions, rounds, prepare=prepare)

    def kernels_us(self, function: Function) -> list[tuple[str, float]]:
        """Return what runs on the device, in order, with its microseconds."""
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            function()
            torch.cuda.synchronize()
        events = [e for e in profiled.events() if e.device_type == DeviceType.CUDA]
        events.sort(key=lambda event: event.time_range.start)
        return [(event.name, event.time_range.elapsed_us()) for event in events]

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Raise where the host would wait for the device."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode")
            try:
                torch.cuda.set_sync_debug_mode("error")
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def release(self) -> None:
        """Give back the memory that nobody uses."""
        torch.cuda.empty_cache()


class Check:
    """What is known so far, printed and written.

    Args:
        device: Where it is measured.
        measured: Gradients of which models, the most valuable first.
        path: The CSV file.
        sizes: How much is measured.
    """

    def __init__(
        self, device: Gpu, measured: list[Case], path: Path, sizes: Sizes | None = None
    ) -> None:
        self.device = device
        self.measured = measured
        self.sizes = sizes or Sizes()
        self.bytes_per_ms = nan
        self._path = path
        self._machine = device.machine()
        self._begun = time.perf_counter()
        self._part = ""
        self._rows: list[dict[str, object]] = []
        self.say(self._machine)

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self._begun:5.1f} s] {text}", flush=True)

    def tell(self, what: str, how: str, values: Mapping[str, float], unit: str) -> None:
        """Print and keep numbers of one kind.

        Args:
            what: What was done.
            how: How it was measured.
            values: By who did it.
            unit: Of the values.
        """
        told = []
        for who, value in values.items():
            self._keep(what, how, who, {"value": value, "unit": unit})
            told.append(f"{who} {value:.4g} {unit}".strip())
        self.say(f"{self._part}, {what}, {how}: {'; '.join(told)}")

    def tell_times(
        self, what: str, how: str, times: Mapping[str, Times], floor: float | None = None
    ) -> None:
        """Print and keep times.

        Args:
            what: What was done.
            how: How it was measured.
            times: By who did it.
            floor: Milliseconds that none can be below, if that is known.
        """
        told = []
        for who, each in times.items():
            floors = {"floors": each.ms / floor} if floor else {}
            self._keep(what, how, who, {**each.columns(), **floors})
            told.append(f"{who} {each.ms:.4g} ms")
            told[-1] += f" = {each.ms / floor:.2f} x" if floor else ""
        self.say(f"{self._part}, {what}, {how}: {'; '.join(told)}")

    def _keep(self, what: str, how: str, who: str, columns: dict[str, object]) -> None:
        row = {"part": self._part, "what": what, "how": how, "who": who, **columns}
        self._rows.append({**row, "machine": self._machine})

    def run(self) -> list[str]:
        """Run every part; return the names of those that failed."""
        failed = []
        for name, part in parts(self):
            self._part = name
            try:
                gc.collect()
                self.device.release()
                part()
            except Exception:  # noqa: BLE001 - whatever it is, the other parts tell something
                traceback.print_exc()
                self.say(f"{name} failed")
                failed.append(name)
            write(self._path, self._rows)
        return failed


def parts(check: Check) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield all there is to measure, by name."""
    for name, policy in POLICIES.items():
        yield f"smoke, {name}", partial(smoke, check, policy)
    yield "bandwidth", partial(bandwidth, check)
    for number, case in enumerate(check.measured):
        yield title(case), partial(clipping, check, case, detailed=number < check.sizes.detailed)
    for case in check.measured[: check.sizes.detailed]:
        yield f"sweep, {title(case)}", partial(sweep, check, case)
    yield "step", partial(step, check)


def title(case: Case) -> str:
    return f"{case.name} {str(case.dtype).removeprefix('torch.')}"


# --- the parts --------------------------------------------------------------------------------


def smoke(check: Check, policy: object) -> None:
    """Clip by one policy, from the first call on without a wait, and compare with torch's.

    The second call, on the same gradients, takes the short way.
    """
    shapes: Shapes = list(check.sizes.smoke)
    found, norms, seconds = {}, {}, {}
    for backend in ("triton", "foreach"):
        gradients = Gradients(Case("smoke", shapes, torch.float32), check.device.name)
        named = [(f"w{number}", weight) for number, weight in enumerate(gradients.parameters)]
        clipper = GradientClipper(named, policy, backend=backend)
        gradients.keep()
        start = time.perf_counter()
        norms[backend], found[backend] = [], []
        for _ in range(2):
            gradients.restore()
            with check.device.no_waiting():
                result = clipper.clip()
            norms[backend].append(float(result.norm_pre))
            found[backend].append([gradient.clone() for gradient in gradients.gradients()])
        seconds[backend] = time.perf_counter() - start
    check.tell("clips twice", "wall, with compiling", seconds, "s")
    pairs = zip(norms["triton"], norms["foreach"], strict=True)
    difference = max(abs(ours / theirs - 1) for ours, theirs in pairs)
    check.tell("clips twice", "difference of the norm", {"triton": difference}, "")
    assert difference < 1e-6
    torch.testing.assert_close(found["triton"], found["foreach"], rtol=2e-6, atol=0)


def bandwidth(check: Check) -> None:
    """Find out how fast the memory is, which every other time is compared with."""
    memory = torch.empty(check.sizes.memory, device=check.device.name).normal_()
    target = torch.empty_like(memory)
    ways = {"read": memory.sum, "copy": lambda: target.copy_(memory)}
    ms = check.device.graph_ms(ways, check.sizes.rounds)
    check.bytes_per_ms = memory.nbytes / ms["read"].ms
    speed = {
        "read": memory.nbytes / ms["read"].ms / 1e6,
        "copy": 2 * memory.nbytes / ms["copy"].ms / 1e6,
    }
    check.tell("one piece of memory", "graph", speed, "GB/s")


def clipping(check: Check, case: Case, *, detailed: bool) -> None:
    """Measure all that is done to the gradients of one model."""
    gradients = Gradients(case, check.device.name)
    norm = gradients.norm()
    gradients.keep()
    for task in tasks(gradients.parameters, norm, norm / case.elements**0.5):
        prepare = gradients.restore if task.passes > 1 else nothing
        measure(check, case, task, prepare)
        if task.what == "within":
            tell_errors(check, task, norm)
            moved = paired(
                task.functions,
                rounds_of(check, case),
                prepare=gradients.move,
                device=check.device.name,
                until_returned=True,
            )
            check.tell_times(task.what, "host, all gradients moved", moved)
        if detailed:
            prepare()
            for number, (kernel, us) in enumerate(
                check.device.kernels_us(task.functions["object"])
            ):
                check.tell(task.what, "kernel", {f"{number} {kernel[:60]}": us}, "us")


class Task(NamedTuple):
    """One thing to do to gradients.

    Args:
        what: Its name.
        passes: How many floors it takes at least; it changes the gradients if more than one.
        functions: By who does it: "torch", "function" and "object".
    """

    what: str
    passes: int
    functions: dict[str, Function]


def tasks(parameters: list[torch.Tensor], norm: float, deviation: float) -> list[Task]:
    """Return what is measured of gradients with that norm and that standard deviation."""

    def by_norm(what: str, passes: int, limit: float) -> Task:
        functions: dict[str, Function] = {
            "torch": lambda: clip_grad_norm_(parameters, limit),
            "function": lambda: gradclip.clip_grad_norm_(parameters, limit),
            "object": GradientClipper(parameters, limit).clip,
        }
        return Task(what, passes, functions)

    def by_value(what: str, passes: int, limit: float) -> Task:
        functions: dict[str, Function] = {
            "torch": lambda: clip_grad_value_(parameters, limit),
            "function": lambda: gradclip.clip_grad_value_(parameters, limit),
            "object": GradientClipper(parameters, ValueClip(clip_value=limit)).clip,
        }
        return Task(what, passes, functions)

    return [
        by_norm("within", 1, FAR),
        by_norm("clips", 3, norm / 2),
        by_value("value, none over", 1, FAR),
        by_value("value, 4.6 % over", 2, 2 * deviation),
    ]


def measure(check: Check, case: Case, task: Task, prepare: Function) -> None:
    """Take the times of one task: of the device alone, until it is done, and of the host."""
    rounds, functions = rounds_of(check, case), task.functions
    floor = task.passes * case.nbytes / check.bytes_per_ms

    captured = {name: functions[name] for name in ("torch", "object")}
    graph = check.device.graph_ms(captured, rounds, prepare)
    check.tell_times(task.what, "graph", graph, floor)
    faster = graph["torch"].ms / graph["object"].ms
    check.tell(task.what, "graph, torch / object", {"": faster}, "x")
    for how, returned in (("eager", False), ("host", True)):
        times = paired(
            functions,
            rounds,
            prepare=prepare,
            device=check.device.name,
            until_returned=returned,
        )
        check.tell_times(task.what, how, times)


def rounds_of(check: Check, case: Case) -> int:
    """Return how often a time of one model is taken."""
    rounds = check.sizes.rounds
    return min(rounds, max(5, int(rounds * 2e9 / case.nbytes)))


def tell_errors(check: Check, task: Task, norm: float) -> None:
    """Compare the norms with the float64 truth."""
    returned = {
        "torch": task.functions["torch"](),
        "function": task.functions["function"](),
        "object": task.functions["object"]().norm_pre,
    }
    errors = {who: abs(float(value) / norm - 1) for who, value in returned.items()}
    check.tell(task.what, "error of the norm", errors, "")


def sweep(check: Check, case: Case) -> None:
    """Time chunks of other sizes, and other numbers of programs."""
    gradients = Gradients(case, check.device.name)
    limits = {"within": FAR, "clips": gradients.norm() / 2}
    gradients.keep()
    for chunk, programs in product(check.sizes.chunks, check.sizes.programs):
        with work(chunk, programs):
            # New ones: a clipper keeps the chunks of the shapes that it has seen.
            functions: dict[str, Function] = {
                what: GradientClipper(gradients.parameters, limit).clip
                for what, limit in limits.items()
            }
            ms = check.device.graph_ms(functions, rounds_of(check, case), gradients.restore)
            check.tell_times(f"chunks of {chunk}, {programs} programs each", "graph", ms)


@contextmanager
def work(chunk: int, programs: int) -> Iterator[None]:
    """Change how many elements a program gets, and how many programs scale."""
    before = triton_plan.CHUNK, triton_plan.PROGRAMS
    try:
        triton_plan.CHUNK, triton_plan.PROGRAMS = chunk, programs
        yield
    finally:
        triton_plan.CHUNK, triton_plan.PROGRAMS = before


def step(check: Check) -> None:
    """Find out what clipping adds to a training step, by how the flag is told to the optimizer."""
    sizes, device = check.sizes, check.device.name
    layers = [torch.nn.Linear(sizes.width, sizes.width) for _ in range(sizes.layers)]
    model = torch.nn.Sequential(*layers).to(device)
    batch = torch.randn(sizes.batch, sizes.width, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    clipper = GradientClipper(model, FAR)

    def torchs() -> None:
        clip_grad_norm_(model.parameters(), FAR)
        optimizer.step()

    def read_before() -> None:
        with gradclip.withhold(optimizer, bool(clipper.clip().skipped)):
            optimizer.step()

    def unread() -> None:
        with gradclip.withhold(optimizer, clipper.clip().skipped):
            optimizer.step()

    def read_after() -> None:
        skipped = clipper.clip().skipped
        with gradclip.withhold(optimizer, skipped):
            optimizer.step()
        bool(skipped)

    def steps(end: Function) -> None:
        for _ in range(sizes.in_a_row):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            end()

    ends: dict[str, Function] = {
        "none": optimizer.step,
        "torch": torchs,
        "flag read before the step": read_before,
        "flag not read": unread,
        "flag read after the step": read_after,
    }
    functions: dict[str, Function] = {who: partial(steps, end) for who, end in ends.items()}
    times = paired(functions, sizes.rounds, device=device)
    each = {who: many / sizes.in_a_row for who, many in times.items()}
    check.tell_times("fused AdamW", "wall", each)
    plain = each.pop("none")
    added = {who: 100 * (one - plain).ms / plain.ms for who, one in each.items()}
    check.tell("fused AdamW", "added", added, "%")


def chosen() -> list[Case]:
    """Return the models that are measured."""
    known = {(case.name, case.dtype): case for case in cases()}
    return [known[each] for each in MEASURED]


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("gpu_check.py needs a CUDA device")
    # By default torch's functions would take the place of a kernel that fails.
    os.environ.setdefault("GRADCLIP_BACKEND", "triton")
    failed = Check(Gpu(), chosen(), RESULTS / "clip_gpu.csv").run()
    sys.exit(f"failed: {'; '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
