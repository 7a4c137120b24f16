"""E6: what does a policy do when the loss becomes ten times as large, for good?

    python benchmarks/experiments/rescaled.py [--seeds 5] [--steps 250]

Writes ``benchmarks/results/experiment_rescaled.csv``. The transformer of ``wrong_scale.py``. From
half of the run on the loss is multiplied by 10, as when somebody sums over ten batches what was a
mean. AdamW does not mind: it divides by what gradients usually are. SGD begins at a tenth of its
learning rate, so that it could go ten times as fast afterwards. ``clipped_at_end`` is the share of
clipped steps among the last tenth of the run, and ``coefficient_at_end`` the median of what they
are multiplied by.
"""

from collections.abc import Iterator
from itertools import product
from statistics import fmean, median

from shared import Row, main, policies
from text import trained


def rows(seeds: int, steps: int) -> Iterator[Row]:
    skipping = ("zscore, skip", "ema, skip", "quantile 0.99, skip")
    compared = policies(1.0, *skipping, "zclip_paper", "adagc_paper", "autoclip")
    larger = dict.fromkeys(range(steps // 2, steps), 10.0)
    runs = product(("AdamW", "slow SGD"), compared.items(), range(seeds))
    for optimizer, (name, policy), seed in runs:
        loss, run = trained(policy, optimizer, seed, steps, larger)
        about: Row = {"optimizer": optimizer, "policy": name, "seed": seed, "loss": loss}
        last = run.last or [1.0]
        at_end: Row = {
            "clipped_at_end": fmean([each < 1 for each in last]),
            "coefficient_at_end": median(last),
        }
        yield {**about, **at_end, **run.columns()}


if __name__ == "__main__":
    main("rescaled", __doc__, rows, steps=250)
