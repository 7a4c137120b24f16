"""Small models on a CPU: the function, the object, the attachment and other packages against torch.

    python benchmarks/small.py [--threads 1] [--rounds 400] [--training]

Writes ``benchmarks/results/small_cpu.csv``. Each way takes turns with torch's function, call by
call, on gradients that were just written. An attachment clips inside the step, so its times are
those of clipping and the step of SGD, and torch's are those of its function and the same step
behind it: ``faster`` is the ratio of these. ``faster_without_step`` is what clipping alone takes:
the ratio of the medians, less what a plain step takes.

With ``--training`` a forward and a backward pass come before each call, untimed, as in a loop: then
the caches of the processor hold something else than the code of the last clip.
"""

import argparse
from collections.abc import Iterator
from functools import partial

import torch
from peers import peers
from timing import RESULTS, Function, machine, paired, read, rounded, write
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import gradclip

CASES = {
    4: [(64, 64), (64,)] * 2,
    12: [(64, 64), (64,)] * 6,
    30: [(32, 32), (32,)] * 15,
}
LIMIT = 1.0
WARM_UP = 20
WAYS = ("function", "object", "attach", "autoclip", "smartclip")


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


def contenders(way: str, sets: dict[str, list[Tensor]]) -> dict[str, Function] | None:
    """Return what takes turns, each with parameters of its own; None for a package not here."""
    theirs, ours = sets["torch"], sets["other"]
    if way == "attach":
        stepped, attached, alone = (torch.optim.SGD(each, lr=1e-9) for each in sets.values())
        gradclip.attach(attached, LIMIT)

        def both() -> None:
            clip_grad_norm_(theirs, LIMIT)
            stepped.step()

        return {"torch": both, "other": attached.step, "step": alone.step}
    if way == "function":
        other: Function = partial(gradclip.clip_grad_norm_, ours, LIMIT)
    elif way == "object":
        other = gradclip.GradientClipper(ours, LIMIT).clip
    else:
        installed = peers(ours, LIMIT)
        if way not in installed:
            return None
        other = installed[way].clip
    return {"torch": partial(clip_grad_norm_, theirs, LIMIT), "other": other}


def renewal(sets: dict[str, list[Tensor]], *, clips: bool, training: bool) -> Function:
    """Return what writes the gradients anew before each call.

    Args:
        sets: The parameters of each that takes turns.
        clips: Whether every call clips.
        training: Whether a forward and a backward pass come first.
    """
    layers = [torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64)]
    model, data = torch.nn.Sequential(*layers), torch.zeros(32, 64)
    written = [[p.grad for p in each] for each in sets.values()]
    fresh = [gradient.clone() for gradient in written[0]]
    if clips:
        fresh[0].view(-1)[0] = 1.1 * LIMIT

    def renew() -> None:
        if training:
            model(data).square().mean().backward()
        for gradients in written:
            torch._foreach_copy_(gradients, fresh)

    return renew


def measure(
    way: str, tensors: int, what: str, dtype: torch.dtype, rounds: int, *, training: bool
) -> Iterator[dict[str, object]]:
    """Yield the line of one way, or none."""
    sets = {who: parameters(CASES[tensors], dtype) for who in ("torch", "other", "step")}
    functions = contenders(way, sets)
    if functions is None:
        return
    prepare = renewal(sets, clips=what == "clips", training=training)
    times = paired(functions, rounds, prepare=prepare, warm_up=WARM_UP)
    theirs, ours = times["torch"], times["other"]
    line: dict[str, object] = {
        "way": way,
        "tensors": tensors,
        "dtype": str(dtype).removeprefix("torch."),
        "what": what,
        "between": between(training=training),
        "torch_ms": theirs.ms,
        **ours.columns(theirs),
    }
    if way == "attach":
        step = times["step"].ms
        line["faster_without_step"] = (theirs.ms - step) / (ours.ms - step)
    yield line


def between(*, training: bool) -> str:
    return "a backward pass" if training else "nothing"


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
    # The lines of other numbers of threads stay, and those with something else between the calls.
    threads, training = f" {arguments.threads} threads", arguments.training
    kept = [
        row
        for row in read(path)
        if threads not in row["machine"] or row["between"] != between(training=training)
    ]
    rows: list[dict[str, object]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for way in WAYS:
            for tensors in CASES:
                for what in ("within", "clips"):
                    rounds = arguments.rounds
                    for line in measure(way, tensors, what, dtype, rounds, training=training):
                        rows.append({**line, "machine": machine("cpu")})
                        print(rounded(line))
    write(path, rows, kept)


if __name__ == "__main__":
    main()
