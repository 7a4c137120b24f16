"""E6: what does a policy do when the loss becomes ten times as large, for good?

    python benchmarks/experiments/rescaled.py [--seeds 5] [--steps 300]

Writes ``benchmarks/results/experiment_rescaled.csv``. The transformer of ``wrong_scale.py``. From
half of the run on the loss is multiplied by 10, as when somebody sums over ten batches what was a
mean. AdamW does not mind: it divides by what gradients usually are. SGD begins at a tenth of its
learning rate, so that it could go ten times as fast afterwards. ``clipped_at_end`` is the share of
clipped steps among the last tenth of the run, and ``coefficient_at_end`` the median of what they
are multiplied by.
"""

from collections.abc import Iterator
from itertools import product
from statistics import median

from shared import Row, main, policies
from text import trained

from gradclip import EMAClip, QuantileClip, ZScoreClip


def rows(seeds: int, steps: int) -> Iterator[Row]:
    compared = {
        **policies(1.0),
        "zscore, skip": ZScoreClip(on_spike="skip"),
        "ema, skip": EMAClip(on_spike="skip"),
        "quantile, skip": QuantileClip(q=0.99, on_spike="skip"),
    }
    larger = dict.fromkeys(range(steps // 2, steps), 10.0)
    end = max(1, steps // 10)
    for optimizer, (name, policy), seed in product(
        ("AdamW", "slow SGD"), compared.items(), range(seeds)
    ):
        loss, run = trained(policy, optimizer, seed, steps, larger)
        about: Row = {"optimizer": optimizer, "policy": name, "seed": seed, "loss": loss}
        last = run.coefficients[-end:] or [1.0]
        about |= {"clipped_at_end": run.clipped(end), "coefficient_at_end": median(last)}
        yield {**about, **run.columns()}


if __name__ == "__main__":
    main("rescaled", __doc__, rows, steps=300)
