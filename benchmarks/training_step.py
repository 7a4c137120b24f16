"""What clipping adds to a real training step: the same steps without, with torch's and with ours.

    python benchmarks/training_step.py [--device cuda] [--rounds 15]

Writes ``benchmarks/results/training_step_cpu.csv`` or ``training_step_cuda.csv``. They take turns
on one model and one optimizer, at a limit that is not reached; what each adds is the difference to
the step without clipping in the same round. On a GPU the step is compiled. Ours reads ``skipped``
in each step, as the pipeline does. On a CPU the clock runs from the end of the backward pass, since
forward and backward passes vary by more than clipping takes.
"""

import argparse
from collections.abc import Callable, Iterator

import torch
from models import RobotPolicy
from timing import RESULTS, Function, machine, nothing, optional, paired, rounded, write
from torch import Tensor, nn

import gradclip

FAR = 1e6

Model = tuple[nn.Module, Callable[[], Tensor]]
"""And what computes its loss."""


def gpt2(device: str) -> Model | None:
    """GPT-2 124M, with 64 tokens on a CPU and 8 x 1024 on a GPU; None without transformers."""
    transformers = optional("transformers")
    if transformers is None:
        return None
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).to(device)
    tokens = torch.randint(0, 50257, (8, 1024) if device == "cuda" else (1, 64), device=device)
    return model, lambda: model(tokens, labels=tokens).loss


def robot_policy(device: str) -> Model:
    """A policy of 292 tensors, with a small image on a CPU and a batch of larger ones on a GPU."""
    model = RobotPolicy().to(device)
    shape = (32, 3, 224, 224) if device == "cuda" else (2, 3, 64, 64)
    image = torch.randn(shape, device=device)
    return model, lambda: model(image).square().mean()


def measure(
    name: str, model: nn.Module, loss: Callable[[], Tensor], device: str, rounds: int
) -> Iterator[dict[str, object]]:
    """Yield a line for the whole step, and one for what each way to clip adds to it."""
    on_gpu = device == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    clipper = gradclip.GradientClipper(model, FAR)
    parameters = list(model.parameters())
    forward = torch.compile(loss) if on_gpu else loss

    def backward() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            result = forward()
        result.backward()

    def ours() -> None:
        with gradclip.withhold(optimizer, bool(clipper.clip().skipped)):
            optimizer.step()

    def theirs() -> None:
        nn.utils.clip_grad_norm_(parameters, FAR)
        optimizer.step()

    def whole(end: Function) -> Function:
        return lambda: (backward(), end())

    ends: dict[str, Function] = {"none": optimizer.step, "torch": theirs, "gradclip": ours}
    steps = {who: whole(end) for who, end in ends.items()}
    times = paired(
        steps if on_gpu else ends,
        rounds,
        prepare=nothing if on_gpu else backward,
        device=device,
    )
    plain = times["none"] if on_gpu else paired({"none": steps["none"]}, rounds)["none"]
    about: dict[str, object] = {"model": name, "tensors": len(parameters)}
    yield {**about, "what": "step", "who": "none", **plain.columns()}
    added = {who: times[who] - times["none"] for who in ("torch", "gradclip")}
    for who, each in added.items():
        yield {**about, "what": "added", "who": who, **each.columns()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    device = arguments.device
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    for name, make in (("GPT-2 124M", gpt2), ("robot policy", robot_policy)):
        made = make(device)
        if made is None:
            continue
        for row in measure(name, *made, device, arguments.rounds):
            rows.append({**row, "machine": machine(device)})
            print(rounded(row))
        write(RESULTS / f"training_step_{device}.csv", rows)


if __name__ == "__main__":
    main()
