"""What policies that follow the run, and AGC, take on a CPU beside a clip by norm.

    python benchmarks/policies.py [--rounds 200] [--agc-rounds 11]

Writes ``benchmarks/results/policies_cpu.csv``. Each policy takes turns with ``NormClip`` of the
same scope on the gradients of 300 small tensors, past its warm-up: ``over_ms`` is the median of the
differences, round by round, and ``over_cpu_ms`` that of the computing times, with its quartiles and
mean: work of others on the machine disturbs these less. AGC takes turns with torch's
``clip_grad_norm_`` on the shapes of GPT-2. "within": gradients stay as they are, and nothing clips.
"varying": the norm of each tensor is another one at each call, lognormal, so that a part of them
clips.
"""

import argparse
import statistics
from collections.abc import Iterator

import torch
from models import Shapes, gpt2_124m
from timing import RESULTS, Function, machine, nothing, paired, rounded, write
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from gradclip import AGCClip, EMAClip, GradientClipper, NormClip, QuantileClip, ZScoreClip

SMALL: Shapes = [(8, 8)] * 300
LARGE: Shapes = gpt2_124m()
WARM_UP = 130
FAR = 1e6

Row = dict[str, object]


def parameters(shapes: Shapes, gradient: float) -> list[Parameter]:
    """Return random weights with random gradients of a deviation."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in shapes:
        parameter = Parameter(torch.randn(shape, generator=generator) * 0.02)
        parameter.grad = torch.randn(shape, generator=generator) * gradient
        made.append(parameter)
    return made


def varying(weights: list[Parameter]) -> Function:
    """Return what gives each gradient another norm than before, around that of now."""
    generator = torch.Generator().manual_seed(0)
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    kept = [gradient.clone() for gradient in gradients]

    def vary() -> None:
        factors = torch.exp(0.2 * torch.randn(len(kept), generator=generator))
        torch._foreach_copy_(gradients, kept)
        torch._foreach_mul_(gradients, factors.tolist())

    return vary


def adaptive(scope: str, what: str, rounds: int) -> Iterator[Row]:
    """Yield the lines of the policies with one scope."""
    policies = {
        "norm": NormClip(max_norm=FAR, scope=scope),
        "zscore": ZScoreClip(scope=scope),
        "ema": EMAClip(scope=scope),
        "quantile": QuantileClip(scope=scope),
    }
    weights = parameters(SMALL, 0.01)
    functions = {who: GradientClipper(weights, each).clip for who, each in policies.items()}
    prepare = varying(weights) if what == "varying" else nothing
    times = paired(functions, rounds, prepare=prepare, warm_up=WARM_UP)
    norm = times["norm"]
    for who, each in times.items():
        line: Row = {"policy": who, "scope": scope, "what": what, "tensors": len(SMALL)}
        line |= each.columns(None if who == "norm" else norm)
        if who != "norm":
            over = each - norm
            low, middle, high = statistics.quantiles(over.cpu, n=4, method="inclusive")
            line |= {"over_ms": over.ms, "over_cpu_ms": middle}
            line |= {"over_cpu_ms_q1": low, "over_cpu_ms_q3": high}
            line["over_cpu_ms_mean"] = statistics.mean(over.cpu)
        yield line


def agc(rounds: int) -> Iterator[Row]:
    """Yield the lines of AGC."""
    weights = parameters(LARGE, 1e-6)
    times = paired(
        {
            "torch": lambda: clip_grad_norm_(weights, FAR),
            "agc": GradientClipper(weights, AGCClip()).clip,
        },
        rounds,
    )
    for who, each in times.items():
        line = {"policy": who, "scope": "unit", "what": "within", "tensors": len(LARGE)}
        yield line | each.columns(None if who == "torch" else times["torch"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--agc-rounds", type=int, default=11)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    scopes = [(scope, what) for scope in ("group", "tensor") for what in ("within", "varying")]
    for lines in (
        *(adaptive(*each, arguments.rounds) for each in scopes),
        agc(arguments.agc_rounds),
    ):
        for line in lines:
            rows.append({**line, "machine": machine("cpu")})
            print(rounded(rows[-1]))
    write(RESULTS / "policies_cpu.csv", rows)


if __name__ == "__main__":
    main()
