"""What a record adds to the steps of the demo on the CPU, and how large one of 1e6 steps is.

    python benchmarks/recording.py [--steps 768] [--long 1000000]

Writes ``benchmarks/results/recording_cpu.csv``. The model of ``gradclip demo`` is trained twice
side by side, one step of each in turn, clipped by ``gradclip.attach``; one of them has ``record=``.
Then a long record of 300 parameters is written, read, and summed up.
"""

import argparse
import resource
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timing import RESULTS, machine, write
from torch.nn.functional import cross_entropy

import gradclip
from gradclip import diagnostics
from gradclip.cli.demo_model import BATCH, LENGTH, CharacterModel
from gradclip.record.writer import Batch, Layout, Place, Writer

CHARACTERS = 96
PARAMETERS = 300
BATCHED = 64
"""Steps that are written together."""


def trainer(record: Path | None) -> Callable[[], float]:
    """Return what makes a step of the demo, and the seconds of the thread that it took."""
    torch.manual_seed(0)
    model = CharacterModel(CHARACTERS)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=3e-3)
    handle = gradclip.attach(optimizer, 1.0, record=record)
    order = torch.Generator().manual_seed(0)

    def step() -> float:
        batch = torch.randint(CHARACTERS, (BATCH, LENGTH + 1), generator=order)
        started = time.thread_time()
        optimizer.zero_grad()
        scores = model(batch[:, :-1])
        loss = cross_entropy(scores.flatten(0, 1), batch[:, 1:].T.flatten())
        loss.backward()
        handle.note(loss=loss)
        optimizer.step()
        return time.thread_time() - started

    return step


def paired(steps: int) -> dict[str, float]:
    """Return milliseconds of a step, and how many times that it takes with a record."""
    with tempfile.TemporaryDirectory() as folder:
        without, recorded = trainer(None), trainer(Path(folder, "run"))
        for _ in range(20):
            without(), recorded()
        times = [(without(), recorded()) for _ in range(steps)]
    # Steps are written together: sums over them are compared.
    batches = [times[at : at + BATCHED] for at in range(0, steps, BATCHED)]
    pairs = [tuple(map(sum, zip(*batch, strict=True))) for batch in batches]
    ratio = statistics.median(with_record / plain for plain, with_record in pairs)
    return {
        "a step, ms": 1e3 * statistics.median(plain / BATCHED for plain, _ in pairs),
        "a step with a record, times that": ratio,
    }


def written(folder: Path, steps: int) -> None:
    """Write a record of so many steps, of which every 100th is an event."""
    names = [f"layers.{number}.weight" for number in range(PARAMETERS)]
    writer = Writer(folder)
    number = writer.join()
    writer.begin(number, 0, Place(0, 1), {"called": "a benchmark"}, resumes=False)
    writer.lay_out(
        number, Layout(names, [4096] * PARAMETERS, [2.0] * PARAMETERS, [1.0] * PARAMETERS), 0
    )
    norms = torch.randn(BATCHED, PARAMETERS).half().tolist()
    packed = [struct.pack(f"<{PARAMETERS}e", *each) for each in norms]
    for first in range(0, steps, BATCHED):
        part = range(first, min(first + BATCHED, steps))
        lines = [
            {
                "step": step,
                "loss": 2.0 + 1e-6 * step,
                "lr": 3e-4,
                "norm_pre": 1.0 + step % 977 / 991,
                "norm_post": 1.0,
                "threshold": 1.0,
                "coefficient": 1 / (1.0 + step % 977 / 991),
                "clipped": True,
                "elapsed_ms": 12.3456 + step % 83 / 89,
            }
            for step in part
        ]
        rows = [(step, packed[step - first]) for step in part]
        odd = [row for row in rows if row[0] % 100 == 0]
        events = [{"event": "spike", "step": step, "norm_pre": 31.4} for step, _ in odd]
        writer.write(number, first, Batch(lines, rows, odd, events))
    writer.leave(number)


def long(steps: int) -> dict[str, float]:
    """Return what a long record takes on disk, and what it takes to read."""
    with tempfile.TemporaryDirectory() as folder:
        written(Path(folder, "run"), steps)
        size = sum(each.stat().st_size for each in Path(folder, "run").iterdir())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.process_time()
        diagnostics.summarise(diagnostics.read_steps(Path(folder, "run")))
        took = time.process_time() - began
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "steps of the long record": steps,
        "its size, MB": size / 1e6,
        "to read and sum it up, s of one core": took,
        "memory beyond that before, MB": (after - before) / 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=BATCHED * 12)
    parser.add_argument("--long", type=int, default=1_000_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = paired(arguments.steps) | long(arguments.long)
    rows = [
        {"what": what, "value": value, "machine": machine("cpu")} for what, value in found.items()
    ]
    for what, value in found.items():
        print(f"{what}: {value:.4g}")
    write(RESULTS / "recording_cpu.csv", rows)


if __name__ == "__main__":
    main()
