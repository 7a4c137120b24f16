"""What ``gradclip run`` costs: the same loop, watched and not, in turn, in one process.

A multi-layer perceptron with two tensors a layer; larger batches make longer steps. It is run in
blocks of 16 steps: watched, not watched, and so on. "Adds" is the mean over pairs of blocks without
a tenth of the pairs at each end; "counts" is what the watch counts by itself, which has no noise of
the steps.

    python benchmarks/observing.py [--pairs 40] [--batch 64] [--layers 100] [--clips] [--every N]
    python benchmarks/observing.py --write    # three such runs, into results/observing_cpu.csv
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median
from time import perf_counter, thread_time

import torch
from timing import RESULTS, machine, write
from torch import nn

from gradclip.observe.session import Session, begin

STEPS, WIDTH = 16, 64
CASES = (["--batch", "16"], ["--batch", "64"], ["--batch", "64", "--clips"])


def block(session: Session, step: "Step", *, watched: bool) -> tuple[float, float]:
    session.is_paused = not watched
    step()
    began, began_here = perf_counter(), thread_time()
    for _ in range(STEPS):
        step()
    return perf_counter() - began, thread_time() - began_here


class Step:
    """The loop's body."""

    def __init__(self, batch: int, count: int, *, clips: bool) -> None:
        torch.manual_seed(0)
        layers = [layer for _ in range(count) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
        self.net, self.clips = nn.Sequential(*layers), clips
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3)
        self.inputs = torch.randn(batch, WIDTH)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.net(self.inputs).square().mean().backward()
        if self.clips:
            nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--layers", type=int, default=100)
    parser.add_argument("--clips", action="store_true")
    parser.add_argument("--every", type=int)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.write:
        write(RESULTS / "observing_cpu.csv", [case(each, args.pairs) for each in CASES])
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        session = begin(Path(folder), {}, args.every)
        step = Step(args.batch, args.layers, clips=args.clips)
        for _ in range(10):
            block(session, step, watched=True)
        session.watch.governor.left = 0.0  # as in a long run: the free seconds are spent
        for _ in range(10):
            block(session, step, watched=True)
        counted = session.watch.seconds
        pairs = []
        for number in range(args.pairs):
            first = block(session, step, watched=number % 2 == 0)
            second = block(session, step, watched=number % 2 == 1)
            pairs.append((first, second) if number % 2 == 0 else (second, first))
        session.is_paused = True
        counts = (session.watch.seconds - counted) / (args.pairs * (STEPS + 1))
        own, here = (median(off[n] for _, off in pairs) / STEPS for n in (0, 1))
        wall, cpu = (trimmed([on[n] - off[n] for on, off in pairs]) / STEPS for n in (0, 1))
        found = {
            "clips": args.clips,
            "tensors": 2 * args.layers,
            "batch": args.batch,
            "pairs": args.pairs,
            "a step, ms": 1e3 * own,
            "its computing time, ms": 1e3 * here,
            "watching adds, ms": 1e3 * wall,
            "watching adds, %": 100 * wall / own,
            "computing time it adds, ms": 1e3 * cpu,
            "computing time it adds, %": 100 * cpu / here,
            "it counts, ms": 1e3 * counts,
            "it counts, %": 100 * counts / own,
            "measured every": session.watch.governor.every,
        }
        print(json.dumps(found))
        session.end()


def case(options: list[str], pairs: int) -> dict[str, object]:
    """Measure in a process of its own: a process is watched once."""
    command = [sys.executable, __file__, "--pairs", str(pairs), *options]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    rounded = {
        name: float(f"{value:.3g}") if isinstance(value, float) else value
        for name, value in json.loads(said).items()
    }
    print(rounded)
    return {**rounded, "machine": machine("cpu")}


def trimmed(values: list[float]) -> float:
    cut = len(values) // 10
    return mean(sorted(values)[cut : len(values) - cut])


if __name__ == "__main__":
    main()
