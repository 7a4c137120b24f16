"""Time and accuracy of clipping on a CPU against ``torch.nn.utils``, for the shapes of real models.

    python benchmarks/clip.py [--rounds 15] [--only "GPT-2"] [--compile]

Writes ``benchmarks/results/clip_cpu.csv``: a line for each model, what is done to its gradients,
and who does it. "read" is the floor of what does not write: one pass of a 2-norm over all gradients
in one piece of memory. Errors are those of the returned norm, relative to a float64 sum. With
``--compile`` torch's function is compiled too, which takes up to a minute for each model. What
a GPU takes, ``benchmarks/gpu_check.py`` measures.
"""

import argparse
import gc
from collections.abc import Iterator
from math import inf

import torch
from accelerate import Accelerator
from gradients import LIMIT, Gradients
from models import Case, cases
from peers import peers
from timing import RESULTS, Function, machine, nothing, paired, read, rounded, write
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import gradclip

FAR = 1e6
"""A limit that is not reached."""

FEW_TENSORS = 400
"""Up to so many tensors, compiling torch's function takes minutes at most."""

TINY = 1e6
"""Elements below which ten times as many rounds are measured."""

SMALL = 2e8
"""Elements up to which other packages are measured: one takes seconds for so many in bfloat16."""

LARGE = 8e9
"""Bytes from which there is no memory for what measures the floor."""

Row = dict[str, object]


def contenders(
    case: Case, what: str, parameters: list[Tensor], *, compiles: bool
) -> dict[str, Function]:
    """Return who does it, by name."""
    if what == "value":
        policy: object = gradclip.ValueClip(clip_value=FAR)
        return {
            "torch": lambda: clip_grad_value_(parameters, FAR),
            "function": lambda: gradclip.clip_grad_value_(parameters, FAR),
            "object": gradclip.GradientClipper(parameters, policy).clip,
        }
    limit = LIMIT if what == "clips" else FAR
    p = inf if what == "inf-norm" else 2.0
    policy = gradclip.NormClip(max_norm=limit, norm_type=p)
    found: dict[str, Function] = {
        "torch": lambda: clip_grad_norm_(parameters, limit, p),
        "function": lambda: gradclip.clip_grad_norm_(parameters, limit, p),
        "object": gradclip.GradientClipper(parameters, policy).clip,
    }
    if what != "inf-norm" and case.elements <= SMALL:
        others = peers(parameters, limit)
        found |= {name: peer.clip for name, peer in others.items()}
    if what == "within":
        accelerator = Accelerator(cpu=True)
        found["torch, tensor by tensor"] = lambda: clip_grad_norm_(parameters, limit, foreach=False)
        found["accelerate"] = lambda: accelerator.clip_grad_norm_(parameters, limit)
        if compiles and len(case.shapes) <= FEW_TENSORS:
            compiled = torch.compile(clip_grad_norm_)
            found["torch, compiled"] = lambda: compiled(parameters, limit)
        if case.nbytes < LARGE:
            found["floor"] = one_read(case)
    return found


def one_read(case: Case) -> Function:
    """Return a function that takes as long as reading the gradients once."""
    memory = torch.empty(case.nbytes // 4).normal_()
    lanes = memory[: len(memory) // 128 * 128].view(-1, 128)
    return lambda: torch.linalg.vector_norm(lanes, dim=1)


def measure(case: Case, rounds: int, *, compiles: bool) -> Iterator[Row]:
    """Yield the lines of one model."""
    many = 10 * rounds if case.elements < TINY else rounds
    rounds = max(3, min(many, int(rounds * 2e9 / case.nbytes)))
    gradients = Gradients(case, "cpu")
    about: Row = {
        "model": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "tensors": len(case.shapes),
        "elements": case.elements,
    }
    errors = norm_errors(case, gradients)
    for what in ("within", "clips", "inf-norm", "value"):
        functions = contenders(case, what, gradients.parameters, compiles=compiles)
        prepare: Function = nothing
        if what == "clips":
            gradients.spike()
            prepare = gradients.spike
            if case.elements <= SMALL:  # clipped again and again, they would vanish
                gradients.keep()
                prepare = gradients.restore
        times = paired(functions, rounds, prepare=prepare)
        for who, each in times.items():
            line = {**about, "what": "read" if who == "floor" else what, "who": who}
            line |= each.columns(None if who == "torch" else times["torch"])
            yield line | {"error": errors.get(who, "") if what == "within" else ""}
        del functions
        gc.collect()


def norm_errors(case: Case, gradients: Gradients) -> dict[str, float]:
    """Return the relative error of the norm that each finds; nothing is changed."""
    truth, parameters = gradients.norm(), gradients.parameters
    norms = {
        "torch": float(clip_grad_norm_(parameters, FAR)),
        "function": float(gradclip.clip_grad_norm_(parameters, FAR)),
        "object": float(gradclip.GradientClipper(parameters, FAR).clip().norm_pre),
    }
    others = peers(parameters, FAR) if case.elements <= SMALL else {}
    for name, peer in others.items():
        peer.clip()
        norms[name] = peer.norm()
    return {who: abs(norm / truth - 1) for who, norm in norms.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--only", default="", help="models whose name has this; the others' lines stay"
    )
    parser.add_argument("--compile", action="store_true", help="torch's function compiled, too")
    arguments = parser.parse_args()
    path = RESULTS / "clip_cpu.csv"
    kept = [row for row in read(path) if arguments.only not in row["model"]]
    rows: list[Row] = []
    for case in cases():
        if arguments.only not in case.name:
            continue
        if not fits(case):
            print(f"{case.name}: not enough memory here, left out")
            continue
        for row in measure(case, arguments.rounds, compiles=arguments.compile):
            rows.append({**row, "machine": machine("cpu")})
            print(rounded(row))
        if arguments.compile:
            torch.compiler.reset()
        gc.collect()
        write(path, rows, kept)


def fits(case: Case) -> bool:
    """Return whether there is memory for the gradients and for what measures the floor."""
    with open("/proc/meminfo") as file:  # noqa: PTH123
        available = next(int(line.split()[1]) * 1024 for line in file if "MemAvailable" in line)
    return available > case.nbytes * (2.2 if case.nbytes < LARGE else 1.1)


if __name__ == "__main__":
    main()
