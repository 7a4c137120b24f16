"""Does an advice that was made of the first half of a run hold for the second half?

    python benchmarks/experiments/next_steps.py [--seeds 5] [--steps 500]

The runs of E1, at each learning rate, and of E2, with each optimizer, train without clipping. The
norms of these steps are given to ``gradclip.suggest``. As many steps follow under the policy that
it suggests. A line for each run has the share of steps that the advice expects to be clipped, the
share that was, and the share of a second run that goes on without clipping and has norms above the
limit. At the end it says how many are within 5 points.
"""

import argparse
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import digits
import recurrent
import text
import torch
from shared import Begun
from wrong_scale import FACTOR, THREE

import gradclip
from gradclip import ObserveClip
from gradclip.clipping.policies import Policy
from gradclip.diagnostics.advice import Advice
from gradclip.errors import TooManySkipsError

POINTS = 0.05


class Followed(NamedTuple):
    """The norms of some steps, their losses, and which were clipped."""

    norms: list[float]
    losses: list[float]
    clipped: list[bool]


def runs(seeds: int, steps: int) -> Iterator[tuple[str, Callable[[], Begun]]]:
    """Yield the name of each run, and what begins it."""
    three = {int(part * steps): FACTOR for part in THREE}
    for seed in range(seeds):
        for lr in recurrent.LEARNING_RATES:
            yield f"E1 lr {lr}", partial(digits.begun, recurrent.Recurrent, lr, seed)
        for optimizer in ("AdamW", "SGD"):
            for name, factors in (("none", {}), ("three", three)):
                yield f"E2 {optimizer}, {name}", partial(text.begun, optimizer, seed, factors)


def follow(begun: Begun, policy: Policy, steps: range) -> Followed:
    """Train for some steps."""
    found = Followed([], [], [])
    handle = gradclip.attach(begun.optimizer, policy)
    for step in steps:
        begun.optimizer.zero_grad()
        loss = begun.loss_at(step)
        loss.backward()
        try:
            begun.optimizer.step()
        except TooManySkipsError:
            break
        found.norms.append(float(handle.last.norm_pre))
        found.losses.append(float(loss.detach()))
        found.clipped.append(bool(handle.last.clipped))
    handle.remove()
    return found


def compare(begin: Callable[[], Begun], steps: int) -> tuple[Advice, float | None, float | None]:
    """Return the advice, and the shares of the later steps with clipping and without it."""
    begun, later = begin(), range(steps, 2 * steps)
    first = follow(begun, ObserveClip(), range(steps))
    advice = gradclip.suggest(first.norms, losses=first.losses)
    if advice.policy is None:
        return advice, None, None
    clipped = follow(begun, advice.policy, later).clipped
    begun = begin()
    follow(begun, ObserveClip(), range(steps))
    limit = getattr(advice.policy, "max_norm", None) or advice.policy.cap
    above = [norm > limit for norm in follow(begun, ObserveClip(), later).norms]
    return advice, *(sum(each) / len(each) if each else None for each in (clipped, above))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    torch.set_num_threads(1)
    apart: dict[str, list[float]] = {"clipped": [], "not clipped": []}
    for name, begin in runs(arguments.seeds, arguments.steps):
        advice, *shares = compare(begin, arguments.steps)
        expected = advice.clip_fraction_settled
        codes = " ".join(each.code for each in advice.warnings)
        print(name, advice.kind, "expected", expected, "was", *shares, codes, flush=True)
        for far, share in zip(apart.values(), shares, strict=True):
            if expected is not None and share is not None:
                far.append(abs(share - expected))
    for name, far in apart.items():
        near = sum(each <= POINTS for each in far)
        print(f"{near} of {len(far)} runs that went on {name} are within 5 points")


if __name__ == "__main__":
    main()
