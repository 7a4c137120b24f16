"""What the experiments share: the policies that are compared, the loop, and how lines are written.

Each experiment has a line for each run: a policy under one condition with one seed.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import gradclip
from gradclip import AGCClip, EMAClip, NormClip, QuantileClip, ZScoreClip, presets

sys.path.append(str(Path(__file__).parents[1]))
from timing import RESULTS, machine, rounded, write

Row = dict[str, object]
CHECKED_EACH = 25
"""Steps after which the weights are looked at: a run whose weights are lost is not continued."""


@dataclass(frozen=True)
class TorchClip:
    """``torch.nn.utils.clip_grad_norm_`` before each step."""

    max_norm: float


def policies(limit: float, *more: str) -> dict[str, Any]:
    """Return what is compared, by name.

    Args:
        limit: The fixed limit, where a policy has one. AGC leaves out the last layer, which gets
            this limit.
        more: Which there are besides those that are in each experiment.
    """
    always = {
        "none": None,
        "norm": NormClip(max_norm=limit),
        "zscore": ZScoreClip(),
        "ema": EMAClip(),
        "quantile": QuantileClip(),
        "agc": {"head.*": NormClip(max_norm=limit), "*": AGCClip()},
    }
    others = {
        "zscore, cap": ZScoreClip(cap=limit),
        "zscore, skip": ZScoreClip(on_spike="skip"),
        "ema, skip": EMAClip(on_spike="skip"),
        "quantile 0.99, skip": QuantileClip(q=0.99, on_spike="skip"),
        "zclip_paper": presets.zclip_paper(),
        "adagc_paper": presets.adagc_paper(),
        "autoclip": presets.autoclip(),
    }
    return always | {name: others[name] for name in more}


@dataclass
class Begun:
    """A training that can begin.

    Args:
        model: What is trained.
        optimizer: Of its parameters.
        loss_at: Returns the loss of a step.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_at: Callable[[int], Tensor]


@dataclass
class Run:
    """What became of a run.

    Args:
        steps: How many steps were asked for.
        clipped: At how many of them something was clipped.
        skipped: How many were not made.
        lost: Whether weights became NaN or infinite, or gradclip ended the run, since the
            gradients of 25 steps in a row were not finite.
        last: Of each step that was made in the last tenth, the norm after clipping as a part of
            the norm before.
    """

    steps: int = 0
    clipped: int = 0
    skipped: int = 0
    lost: bool = False
    last: list[float] = field(default_factory=list)

    def columns(self) -> Row:
        """Return the columns that every line has."""
        share = self.clipped / self.steps
        return {"clipped": share, "skipped": self.skipped, "lost": self.lost}


def train(begun: Begun, policy: Any, steps: int) -> Run:
    """Train, and clip.

    Args:
        begun: Its optimizer is made of ``model.named_parameters()``, so that patterns of names
            work.
        policy: One of ``policies``, or a ``TorchClip``.
        steps: How many steps.
    """
    run = Run()
    model, optimizer, handle = begun.model, begun.optimizer, None
    if policy is not None and not isinstance(policy, TorchClip):
        handle = gradclip.attach(optimizer, policy)
    for step in range(steps):
        optimizer.zero_grad()
        begun.loss_at(step).backward()
        if isinstance(policy, TorchClip):
            norm = clip_grad_norm_(model.parameters(), policy.max_norm)
            run.clipped += bool(norm > policy.max_norm)
        run.steps += 1
        try:
            optimizer.step()
        except gradclip.errors.TooManySkipsError:
            run.lost = True
            break
        if handle is not None and step >= steps * 9 // 10 and not handle.last.skipped:
            run.last.append(float(handle.last.norm_post / handle.last.norm_pre))
        if run.steps % CHECKED_EACH == 0 and not is_finite(model):
            break
    if handle is not None:
        run.clipped, run.skipped = handle.stats.clipped, handle.stats.skipped
    run.lost = run.lost or not is_finite(model)
    return run


def is_finite(model: nn.Module) -> bool:
    return all(bool(each.isfinite().all()) for each in model.parameters())


def main(name: str, doc: str, rows: Callable[[int, int], Iterator[Row]], steps: int) -> None:
    """Run an experiment and write its lines.

    Args:
        name: Of the CSV file.
        doc: What ``--help`` says.
        rows: Yields a line for each run; it is told how many seeds and steps.
        steps: Of each run, unless the command says otherwise.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=steps)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # some policies are meant to clip every step here
    torch.set_num_threads(1)
    where = {"steps": arguments.steps, "machine": f"{machine('cpu')}{_scikit_learn()}"}
    listed = []
    for row in rows(arguments.seeds, arguments.steps):
        listed.append({**row, **where})
        print(rounded(row), flush=True)
        write(RESULTS / f"experiment_{name}.csv", listed)


def _scikit_learn() -> str:
    import sklearn  # noqa: PLC0415 - as above

    return f", scikit-learn {sklearn.__version__}"
