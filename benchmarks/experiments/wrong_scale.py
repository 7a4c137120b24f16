"""E2: what do a few batches cost whose loss is a thousand times too large?

    python benchmarks/experiments/wrong_scale.py [--seeds 5] [--steps 250]

Writes ``benchmarks/results/experiment_wrong_scale.csv``. A small transformer learns the characters
of CPython's help texts. The loss of some batches is multiplied by 1000: of three in the later run,
or of one at the tenth step, when policies that learn their limit do not have it yet. ``loss`` is
that on the last tenth of the text.
"""

from collections.abc import Iterator
from itertools import product

from shared import Row, main, policies
from text import trained

FACTOR = 1000.0
THREE = (1 / 2, 2 / 3, 5 / 6)
"""As parts of the run."""
CONDITIONS = (
    ("AdamW", "none"),
    ("AdamW", "three"),
    ("AdamW", "step 10"),
    ("SGD", "three"),
)


def rows(seeds: int, steps: int) -> Iterator[Row]:
    wrong = {
        "none": {},
        "three": {int(part * steps): FACTOR for part in THREE},
        "step 10": {9: FACTOR},
    }
    runs = product(CONDITIONS, policies(1.0, "zscore, cap").items(), range(seeds))
    for (optimizer, batches), (name, policy), seed in runs:
        loss, run = trained(policy, optimizer, seed, steps, wrong[batches])
        about: Row = {"optimizer": optimizer, "wrong": batches, "policy": name, "seed": seed}
        yield {**about, "loss": loss, **run.columns()}


if __name__ == "__main__":
    main("wrong_scale", __doc__, rows, steps=250)
