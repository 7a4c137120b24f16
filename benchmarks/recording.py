"""What a record adds to the steps of the demo, on the CPU: paired, with and without.

``python benchmarks/recording.py`` trains the model of ``gradclip demo`` twice side by side, one
step of each in turn, clipped by ``gradclip.attach``; one of them has ``record=``.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import gradclip
from gradclip.cli.demo_model import BATCH, LENGTH, CharacterModel

CHARACTERS = 96


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=64 * 12)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        without, recorded = trainer(None), trainer(Path(folder, "run"))
        for _ in range(20):
            without(), recorded()
        times = [(without(), recorded()) for _ in range(steps)]
    # A batch of 64 steps is written together: sums over 64 steps are compared.
    batches = [times[at : at + 64] for at in range(0, steps, 64)]
    pairs = [tuple(map(sum, zip(*batch, strict=True))) for batch in batches]
    ratio = statistics.median(with_record / plain for plain, with_record in pairs)
    plain = statistics.median(plain / 64 for plain, _ in pairs)
    print(f"a step takes {1e3 * plain:.2f} ms; with a record {ratio:.4f} times that")


if __name__ == "__main__":
    main()
