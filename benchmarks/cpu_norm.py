"""Time and accuracy of clipping on the CPU against ``torch.nn.utils``, in one paired run.

    python benchmarks/cpu_norm.py [--rounds 15]

Writes ``benchmarks/results/cpu_norm.csv``. Times are medians of A B A B ... rounds in which nothing
clips; "read" is one dot product over each gradient, the floor of reading the memory once. Errors
are those of the returned norm, relative to a float64 sum.
"""

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import gradclip

RESULTS = Path(__file__).parent / "results" / "cpu_norm.csv"


def gpt2_124m() -> list[tuple[int, ...]]:
    """Shapes of the 148 parameters of GPT-2 124M."""
    width, shapes = 768, [(50257, 768), (1024, 768)]
    for _ in range(12):
        shapes += [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
        shapes += [
            (width,),
            (width,),
            (width, 4 * width),
            (4 * width,),
            (4 * width, width),
            (width,),
        ]
    return [*shapes, (width,), (width,)]


CASES: dict[str, tuple[list[tuple[int, ...]], torch.dtype]] = {
    "gpt2_124m_fp32": (gpt2_124m(), torch.float32),
    "gpt2_124m_bf16": (gpt2_124m(), torch.bfloat16),
    "one_tensor_1e8_fp32": ([(100_000_000,)], torch.float32),
    "tensors_3168_of_64_fp32": ([(64,)] * 3168, torch.float32),
    "mlp_4_tensors_fp32": ([(64, 64), (64,), (64, 64), (64,)], torch.float32),
}


def parameters_of(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    parameters = []
    for shape in shapes:
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=True)
        parameter.grad = (torch.randn(shape) * 1e-2).to(dtype)
        parameters.append(parameter)
    return parameters


def paired(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each function, called in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round_ >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(shapes: list[tuple[int, ...]], dtype: torch.dtype, rounds: int) -> dict[str, float]:
    parameters = parameters_of(shapes, dtype)
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = [gradient.view(-1) for gradient in gradients]
    clipper = gradclip.GradientClipper(parameters, 1e30)
    truth = sum(float(g.double().square().sum()) for g in gradients) ** 0.5
    times = paired(
        {
            "torch_ms": lambda: torch.nn.utils.clip_grad_norm_(parameters, 1e30),
            "function_ms": lambda: gradclip.clip_grad_norm_(parameters, 1e30),
            "object_ms": clipper.clip,
            "read_ms": lambda: [gradient.dot(gradient) for gradient in flat],
        },
        rounds,
    )
    return {
        **times,
        "torch_over_object": times["torch_ms"] / times["object_ms"],
        "object_over_read": times["object_ms"] / times["read_ms"],
        "torch_error": abs(float(torch.nn.utils.get_total_norm(gradients)) / truth - 1),
        "error": abs(float(gradclip.get_total_norm(gradients)) / truth - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    machine = f"{platform.machine()} {torch.get_num_threads()} threads torch {torch.__version__}"
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer: csv.DictWriter[str] | None = None
        for case, (shapes, dtype) in CASES.items():
            row = {name: f"{value:.4g}" for name, value in measure(shapes, dtype, rounds).items()}
            line = {"case": case, **row, "machine": machine}
            print(line)
            if writer is None:
                writer = csv.DictWriter(file, list(line), lineterminator="\n")
                writer.writeheader()
            writer.writerow(line)


if __name__ == "__main__":
    main()
