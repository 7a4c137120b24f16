"""What clipping adds to a real training step: the same steps without, with torch's and with ours.

    python benchmarks/training_step.py [--device cuda] [--rounds 15]

Writes ``benchmarks/results/training_step_cpu.csv`` or ``training_step_cuda.csv``. The three take
turns, each first in every third round, on one model and one optimizer, at a limit that is not
reached; what is added is the median of the differences to the step without clipping in the same
round. On a GPU the step is compiled. Ours reads ``skipped`` in each step, as the pipeline does. On
a CPU the clock runs from the end of the backward pass, since forward and backward passes vary by
more than clipping takes.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from models import RobotPolicy
from timing import RESULTS, finish, machine, write
from torch import Tensor, nn

import gradclip

FAR = 1e6


def gpt2(device: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """GPT-2 124M, with 64 tokens on a CPU and 8 x 1024 on a GPU."""
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415 - slow to import

    model = GPT2LMHeadModel(GPT2Config()).to(device)
    tokens = torch.randint(0, 50257, (8, 1024) if device == "cuda" else (1, 64), device=device)
    return model, lambda: model(tokens, labels=tokens).loss


def robot_policy(device: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A policy of 292 tensors, with a small image on a CPU and a batch of larger ones on a GPU."""
    model = RobotPolicy().to(device)
    shape = (32, 3, 224, 224) if device == "cuda" else (2, 3, 64, 64)
    image = torch.randn(shape, device=device)
    return model, lambda: model(image).square().mean()


def turns(names: list[str], round_: int) -> list[str]:
    """Return who comes first in this round, and who then: what was before matters to a step."""
    start = round_ % len(names)
    return names[start:] + names[:start]


def measure(
    name: str, model: nn.Module, loss: Callable[[], Tensor], device: str, rounds: int
) -> dict[str, object]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    clipper = gradclip.GradientClipper(model, FAR)
    parameters = list(model.parameters())
    forward = torch.compile(loss) if device == "cuda" else loss

    def ours() -> None:
        with gradclip.withhold(optimizer, bool(clipper.clip().skipped)):
            optimizer.step()

    def theirs() -> None:
        nn.utils.clip_grad_norm_(parameters, FAR)
        optimizer.step()

    steps = {"none": optimizer.step, "torch": theirs, "gradclip": ours}
    times: dict[str, list[float]] = {who: [] for who in steps}
    whole: list[float] = []
    for round_ in range(rounds + 2):
        for who in turns(list(steps), round_):
            step = steps[who]
            finish(device)
            start = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                result = forward()
            result.backward()
            behind = start if device == "cuda" else time.perf_counter()
            step()
            finish(device)
            end = time.perf_counter()
            if round_ >= 2:
                times[who].append((end - behind) * 1e3)
                whole.append((end - start) * 1e3)
    plain = statistics.median(whole)

    def added(who: str) -> float:
        return statistics.median(a - b for a, b in zip(times[who], times["none"], strict=True))

    return {
        "model": name,
        "tensors": len(parameters),
        "step_ms": plain,
        "torch_added_ms": added("torch"),
        "gradclip_added_ms": added("gradclip"),
        "gradclip_added_percent": 100 * added("gradclip") / plain,
        "machine": machine(device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for name, make in (("GPT-2 124M", gpt2), ("robot policy", robot_policy)):
        model, loss = make(arguments.device)
        rows.append(measure(name, model, loss, arguments.device, arguments.rounds))
        print(rows[-1])
    write(RESULTS / f"training_step_{arguments.device}.csv", rows)


if __name__ == "__main__":
    main()
