"""E5: what does a NaN do to a run, and an infinity?

    python benchmarks/experiments/faults.py [--seeds 5] [--steps 250]

Writes ``benchmarks/results/experiment_faults.csv``. The transformer of ``wrong_scale.py``, by
AdamW. The loss is NaN at a third of the run, and infinite at half of it.
"""

from collections.abc import Iterator
from itertools import product
from math import inf, nan

from shared import Row, TorchClip, main, policies
from text import trained


def rows(seeds: int, steps: int) -> Iterator[Row]:
    compared = {"torch": TorchClip(1.0), **policies(1.0)}
    faults = {steps // 3: nan, steps // 2: inf}
    for (name, policy), seed in product(compared.items(), range(seeds)):
        loss, run = trained(policy, "AdamW", seed, steps, faults)
        yield {"policy": name, "seed": seed, "loss": loss, **run.columns()}


if __name__ == "__main__":
    main("faults", __doc__, rows, steps=250)
