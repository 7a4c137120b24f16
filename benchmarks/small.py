"""Small models on a CPU: the function, the object and the attachment against torch's function.

    python benchmarks/small.py [--threads 1] [--rounds 400] [--training]

Writes ``benchmarks/results/small_cpu.csv``. Each way takes turns with torch's, call by call, on
gradients that were just written. Two ratios are quoted, since a busy machine disturbs both: of the
wall's time, the median over pairs of calls; and of the time that this thread computed, over blocks
of calls. An attachment clips inside the step, so its times are those of clipping and the step of
SGD, and torch's are those of its function and the same step behind it: ``faster`` is the ratio of
these sums. ``faster_without_step`` is the ratio of what clipping alone takes: torch's function
against what is left of the attachment's time without that step.

With ``--training`` a forward and a backward pass come before each call, untimed, as in a loop: then
the caches of the processor hold something else than the code of the last clip. What they compute
hides what a clip does, so there is no ratio of that.
"""

import argparse
import statistics
import time

import torch
from timing import RESULTS, Function, machine, read, write
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import gradclip

CASES = {
    4: [(64, 64), (64,)] * 2,
    12: [(64, 64), (64,)] * 6,
    30: [(32, 32), (32,)] * 15,
}
LIMIT = 1.0
BLOCK = 20
WARMUP = 20


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Return parameters with gradients whose norm is a fifth of the limit."""
    generator = torch.Generator().manual_seed(0)
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    made: list[Tensor] = []
    for shape in shapes:
        parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        gradient = torch.randn(shape, generator=generator) * (0.2 * LIMIT / elements**0.5)
        parameter.grad = gradient.to(dtype)
        made.append(parameter)
    return made


def contenders(
    way: str, shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> tuple[dict[str, Function], dict[str, list[Tensor]]]:
    """Return what takes turns, and the parameters of each; the step is that behind torch's."""
    sets = {who: parameters(shapes, dtype) for who in ("torch", "gradclip")}
    theirs, ours = sets["torch"], sets["gradclip"]
    if way == "function":
        return {
            "torch": lambda: clip_grad_norm_(theirs, LIMIT),
            "gradclip": lambda: gradclip.clip_grad_norm_(ours, LIMIT),
        }, sets
    if way == "object":
        return {
            "torch": lambda: clip_grad_norm_(theirs, LIMIT),
            "gradclip": gradclip.GradientClipper(ours, LIMIT).clip,
        }, sets
    stepped, attached = (torch.optim.SGD(each, lr=1e-9) for each in (theirs, ours))
    gradclip.attach(attached, LIMIT)
    return {
        "torch": lambda: clip_grad_norm_(theirs, LIMIT),
        "step": stepped.step,
        "gradclip": attached.step,
    }, sets


class Turns:
    """Calls whose gradients are written anew before each.

    Args:
        functions: What takes turns, by name.
        sets: The parameters of each.
        clips: Whether every call clips.
        training: Whether a forward and a backward pass come before each call.
    """

    def __init__(
        self,
        functions: dict[str, Function],
        sets: dict[str, list[Tensor]],
        *,
        clips: bool,
        training: bool,
    ) -> None:
        self._functions = functions
        layers = [torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64)]
        self._between = torch.nn.Sequential(*layers) if training else None
        self._data = torch.zeros(32, 64)
        self._written = {who: [p.grad for p in each] for who, each in sets.items()}
        self._fresh = [p.grad.clone() for p in sets["torch"] if p.grad is not None]
        if clips:
            self._fresh[0].view(-1)[0] = 1.1 * LIMIT

    def _renew(self, who: str) -> None:
        if self._between is not None:
            self._between(self._data).square().mean().backward()
        torch._foreach_copy_(self._written[who], self._fresh)

    def each(self) -> dict[str, float]:
        """Return what a call of each takes; the step is on what torch's function left."""
        times: dict[str, float] = {}
        for who, function in self._functions.items():
            if who in self._written:
                self._renew(who)
            start = time.perf_counter_ns()
            function()
            times[who] = time.perf_counter_ns() - start
        return times

    def block(self, who: str) -> float:
        """Return what a call computes, without what writing the gradients does."""
        names = ("torch", "step") if who == "torch" and "step" in self._functions else (who,)
        start = time.thread_time_ns()
        for _ in range(BLOCK):
            self._renew(who)
        middle = time.thread_time_ns()
        for _ in range(BLOCK):
            self._renew(who)
            for name in names:
                self._functions[name]()
        return (time.thread_time_ns() - middle - (middle - start)) / BLOCK


def measure(
    way: str, tensors: int, what: str, dtype: torch.dtype, rounds: int, *, training: bool
) -> dict[str, object]:
    """Return one line."""
    functions, sets = contenders(way, CASES[tensors], dtype)
    turns = Turns(functions, sets, clips=what == "clips", training=training)
    rows = [turns.each() for _ in range(rounds + WARMUP)][WARMUP:]
    wall = {who: [row[who] for row in rows] for who in functions}
    clip, step = statistics.median(wall["torch"]), statistics.median(wall.get("step", [0.0]))
    wall["torch"] = [row["torch"] + row.get("step", 0.0) for row in rows]
    blocks = [{who: turns.block(who) for who in sets} for _ in range(max(5, rounds // BLOCK))]
    cpu = {who: [row[who] for row in blocks] for who in sets}
    ours = statistics.median(wall["gradclip"])
    return {
        "way": way,
        "tensors": tensors,
        "dtype": str(dtype).removeprefix("torch."),
        "what": what,
        "between": "a backward pass" if training else "nothing",
        "times": "clipping and the step" if step else "clipping",
        "torch_us": statistics.median(wall["torch"]) / 1e3,
        "gradclip_us": ours / 1e3,
        "faster": ratio(wall),
        "faster_cpu": "" if training else ratio(cpu),
        "faster_without_step": clip / (ours - step) if step else "",
    }


def ratio(times: dict[str, list[float]]) -> float:
    """Return the median of torch's time over ours, pair by pair."""
    pairs = zip(times["torch"], times["gradclip"], strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--training", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # A loop has an optimizer, and the first one loads torch.compile, which makes each call of
    # gradclip dearer.
    torch.optim.SGD(parameters(CASES[4], torch.float32), lr=1e-9)
    path = RESULTS / "small_cpu.csv"
    where = machine("cpu")
    training = arguments.training
    between = "a backward pass" if training else "nothing"
    # The lines of other conditions stay.
    kept = [row for row in read(path) if (row["machine"], row["between"]) != (where, between)]
    rows: list[dict[str, object]] = [{**row} for row in kept]
    for dtype in (torch.float32, torch.bfloat16):
        for way in ("function", "object", "attach"):
            for tensors in CASES:
                for what in ("within", "clips"):
                    line = measure(way, tensors, what, dtype, arguments.rounds, training=training)
                    rows.append({**line, "machine": where})
                    print({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in line.items()})
    write(path, rows)


if __name__ == "__main__":
    main()
