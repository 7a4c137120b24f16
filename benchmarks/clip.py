"""Time and accuracy of clipping against ``torch.nn.utils``, for the shapes of real models.

    python benchmarks/clip.py [--device cuda] [--rounds 15] [--only "GPT-2"]

Writes ``benchmarks/results/clip_cpu.csv`` or ``clip_cuda.csv``: a line for each model, what is done
to its gradients, and who does it. "read" is the floor of what does not write: on a CPU one pass of
a 2-norm over all gradients in one piece of memory, on a GPU half the time of copying as many
bytes. Errors are those of the returned norm, relative to a float64 sum.
"""

import argparse
import gc
from collections.abc import Callable, Iterator
from math import inf

import torch
from accelerate import Accelerator
from gradients import LIMIT, Gradients
from models import Case, cases
from timing import RESULTS, Function, finish, machine, paired, read, replayed, write
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import gradclip

FEW = 400
"""Tensors up to which compiling torch's function takes minutes at most."""

Row = dict[str, object]


def contenders(case: Case, what: str, parameters: list[Tensor], device: str) -> dict[str, Function]:
    """Return who does it, by name."""
    limit = LIMIT if what == "clips" else 1e6
    if what == "value":
        policy: object = gradclip.ValueClip(clip_value=1e6)
        return {
            "torch": lambda: clip_grad_value_(parameters, 1e6),
            "function": lambda: gradclip.clip_grad_value_(parameters, 1e6),
            "object": gradclip.GradientClipper(parameters, policy).clip,
        }
    p = inf if what == "inf-norm" else 2.0
    policy = gradclip.NormClip(max_norm=limit, norm_type=p)
    found: dict[str, Function] = {
        "torch": lambda: clip_grad_norm_(parameters, limit, p),
        "function": lambda: gradclip.clip_grad_norm_(parameters, limit, p),
        "object": gradclip.GradientClipper(parameters, policy).clip,
    }
    if what == "within":
        accelerator = Accelerator(cpu=device == "cpu")
        found["torch, tensor by tensor"] = lambda: clip_grad_norm_(parameters, limit, foreach=False)
        found["accelerate"] = lambda: accelerator.clip_grad_norm_(parameters, limit)
        if len(case.shapes) <= FEW:
            compiled = torch.compile(clip_grad_norm_)
            found["torch, compiled"] = lambda: compiled(parameters, limit)
    return found


def floor(case: Case, device: str) -> Function:
    """Return a function that takes as long as reading the gradients once, or twice that."""
    memory = torch.empty(case.nbytes // 4, device=device).normal_()
    if device == "cuda":
        target = torch.empty_like(memory)
        return lambda: target.copy_(memory)
    lanes = memory[: len(memory) // 128 * 128].view(-1, 128)
    return lambda: torch.linalg.vector_norm(lanes, dim=1)


def measure(case: Case, device: str, rounds: int) -> Iterator[Row]:
    """Yield the lines of one model."""
    rounds = max(3, min(rounds, int(rounds * 2e9 / case.nbytes)))
    gradients = Gradients(case, device)
    about: Row = {
        "model": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "tensors": len(case.shapes),
        "elements": case.elements,
    }
    if device == "cuda":
        copying = replayed({"copy": floor(case, device)}, rounds)["copy"]
        yield {**about, "what": "read", "who": "floor", "ms": copying / 2}
    truth = gradients.norm()
    for what in ("within", "clips", "inf-norm", "value"):
        functions = contenders(case, what, gradients.parameters, device)
        if what == "within" and device == "cpu" and case.nbytes < 8e9:
            functions["floor"] = floor(case, device)  # takes turns with the others
        prepare: Callable[[], object] = gradients.spike if what == "clips" else lambda: None
        columns = {"ms": paired(functions, rounds, prepare=prepare, device=device)}
        if device == "cuda":
            columns |= on_cuda(functions, gradients, prepare, rounds)
        errors = norm_errors(gradients, truth) if what == "within" else {}
        for who in functions:
            numbers = {name: times[who] for name, times in columns.items() if who in times}
            done = "read" if who == "floor" else what
            yield {**about, "what": done, "who": who, **numbers, "error": errors.get(who, "")}
        del functions
        gc.collect()


def on_cuda(
    functions: dict[str, Function], gradients: Gradients, prepare: Function, rounds: int
) -> dict[str, dict[str, float]]:
    """Return what is measured on a GPU only: device time, and host time in two situations."""

    def elsewhere() -> None:
        gradients.move()
        prepare()

    def returned(before: Function) -> dict[str, float]:
        return paired(functions, rounds, prepare=before, device="cuda", until_returned=True)

    # Compiled functions have graphs of their own, and accelerate's is torch's.
    captured = {k: f for k, f in functions.items() if k in {"torch", "function", "object"}}
    return {
        "host_ms": returned(prepare),
        "host_moved_ms": returned(elsewhere),
        "device_ms": replayed(captured, rounds, prepare=prepare),
    }


def norm_errors(gradients: Gradients, truth: float) -> dict[str, float]:
    theirs = float(clip_grad_norm_(gradients.parameters, 1e6))
    ours = float(gradclip.clip_grad_norm_(gradients.parameters, 1e6))
    return {"torch": abs(theirs / truth - 1), "object": abs(ours / truth - 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--only", default="", help="models whose name has this; the others' lines stay"
    )
    arguments = parser.parse_args()
    device = arguments.device
    path = RESULTS / f"clip_{device}.csv"
    kept: list[Row] = [{**row} for row in read(path) if arguments.only not in row["model"]]
    rows: list[Row] = []
    for case in cases():
        if arguments.only not in case.name:
            continue
        if not fits(case, device):
            print(f"{case.name}: not enough memory here, left out")
            continue
        for row in measure(case, device, arguments.rounds):
            rows.append({**row, "machine": machine(device)})
            print({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
        finish(device)
        torch.compiler.reset()
        gc.collect()
        write(path, [*kept, *rows] if arguments.only else rows)


def fits(case: Case, device: str) -> bool:
    """Return whether there is memory for the gradients and for what measures the floor."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] > 3.2 * case.nbytes
    with open("/proc/meminfo") as file:  # noqa: PTH123
        available = next(int(line.split()[1]) * 1024 for line in file if "MemAvailable" in line)
    return available > case.nbytes * (2.2 if case.nbytes < 8e9 else 1.1)


if __name__ == "__main__":
    main()
