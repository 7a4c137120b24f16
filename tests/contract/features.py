"""The features that every way in should have: the columns of the grid.

What becomes of a gradient is plain arithmetic here, in Python's float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import hypot, inf, isfinite, nan
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from tiny_model import MOMENTUM

from documented_policies import documented
from gradclip import (
    AGCClip,
    EMAClip,
    GuardClip,
    NormClip,
    ObserveClip,
    QuantileClip,
    Schedule,
    ValueClip,
    ZScoreClip,
)

Gradient: TypeAlias = dict[str, list[float]]
"""The numbers of each layer."""


@dataclass(frozen=True)
class Feature:
    """What is asked of a way in, and what the gradients of its steps then are.

    Args:
        name: The head of its column.
        clip: What a way in is given: ``max_norm`` or ``policy``.
        expected: From all gradients to those that are stepped on; None where no step is made.
        gradients: Those of each step.
        interrupted_after: So many steps are one run, and the rest is a run that loads what the
            first one saved; None for one run.
        told: What the way in says of these steps besides: ``"stats"``, ``"logged"`` for what
            reaches the framework's loggers, or ``"recorded"`` for what ``record=`` wrote; with the
            right values, by name.
        assigned: The number of a step, and the policy that is assigned after it.
    """

    name: str
    clip: dict[str, Any]
    expected: Callable[[Sequence[Gradient]], list[Gradient | None]]
    gradients: Sequence[Gradient]
    interrupted_after: int | None = None
    told: tuple[str, dict[str, float]] | None = None
    assigned: tuple[int, Any] | None = None

    def assign(self, way_in: Any, after: Sequence[object]) -> None:
        """Assign the policy to the object of a way in, if so many steps are over."""
        if self.assigned is not None and len(after) == self.assigned[0]:
            way_in.policy = self.assigned[1]

    def recording(self, folder: Path) -> "Feature":
        """Return the same, with a folder for its record where it has one."""
        if self.told is None or self.told[0] != "recorded":
            return self
        return replace(self, clip={**self.clip, "record": str(folder)})

    @property
    def fields(self) -> dict[str, Any]:
        """What a configuration is given: ``max_norm`` has a mode beside it there."""
        return {"clip_mode": "norm", **self.clip} if "max_norm" in self.clip else self.clip


STEPS = [
    {"body": [3.0, -4.0, 12.0], "head": [8.0, -6.0]},  # norms 13 and 10
    {"body": [0.25, 0.5, -0.5], "head": [0.25, 0.0]},  # small
    {"body": [30.0, 40.0, 0.0], "head": [-2.0, 1.0]},  # a spike in the body
    {"body": [20.0, -40.0, 40.0], "head": [10.0, 24.0]},  # a spike in both
    {"body": [0.5, -1.0, 1.0], "head": [0.75, -1.0]},
    {"body": [-12.0, 9.0, 8.0], "head": [3.0, -4.0]},
]
WITH_A_NAN = [STEPS[0], {"body": [1.0, nan, 2.0], "head": [3.0, 4.0]}, *STEPS[4:]]


def _all(gradient: Gradient) -> list[float]:
    return [value for layer in gradient.values() for value in layer]


def _largest(values: Sequence[float]) -> float:
    return max(abs(value) for value in values)


def _l2(values: Sequence[float]) -> float:
    return hypot(*values)


def _scaled(values: Sequence[float], limit: float, norm: float) -> list[float]:
    return [value * min(1.0, limit / norm) for value in values]


def together(
    gradients: Sequence[Gradient],
    limit: float,
    norm: Callable[[Sequence[float]], float] = _l2,
    skip_above: float = inf,
) -> list[Gradient | None]:
    """All layers have one norm; a step with a NaN, or above the last limit, is not made."""
    steps: list[Gradient | None] = []
    for gradient in gradients:
        size = norm(_all(gradient))
        made = isfinite(size) and size <= skip_above
        scaled = {name: _scaled(layer, limit, size) for name, layer in gradient.items()}
        steps.append(scaled if made else None)
    return steps


def by_layer(gradients: Sequence[Gradient], limits: dict[str, float]) -> list[Gradient | None]:
    """Each layer has a norm and a limit of its own."""
    return [
        {name: _scaled(layer, limits[name], _l2(layer)) for name, layer in gradient.items()}
        for gradient in gradients
    ]


def together_later(
    gradients: Sequence[Gradient], limit: float, later: float, after: int
) -> list[Gradient | None]:
    """All layers have one norm, and after some steps another limit."""
    return [*together(gradients[:after], limit), *together(gradients[after:], later)]


def by_element(gradients: Sequence[Gradient], limit: float) -> list[Gradient | None]:
    return [
        {name: [max(-limit, min(limit, value)) for value in layer] for name, layer in each.items()}
        for each in gradients
    ]


def unchanged(gradients: Sequence[Gradient]) -> list[Gradient | None]:
    return list(gradients)


def by_history(gradients: Sequence[Gradient]) -> list[Gradient | None]:
    """Each layer may have twice its usual norm: the moving mean of what was left of it."""
    mean: dict[str, float] = {}
    steps: list[Gradient | None] = []
    for gradient in gradients:
        step = {}
        for name, layer in gradient.items():
            norm = _l2(layer)
            limit = 2.0 * mean.get(name, inf)
            left = min(norm, limit)
            mean[name] = 0.9 * mean.get(name, left) + 0.1 * left
            step[name] = _scaled(layer, limit, norm)
        steps.append(step)
    return steps


def _by_limits(
    gradients: Sequence[Gradient], limit_of: Callable[[list[float]], float]
) -> list[Gradient | None]:
    """All layers have one norm, whose limit follows from those up to this one."""
    norms = [_l2(_all(gradient)) for gradient in gradients]
    return [
        {name: _scaled(layer, limit_of(norms[: n + 1]), norms[n]) for name, layer in each.items()}
        for n, each in enumerate(gradients)
    ]


def by_quantile(gradients: Sequence[Gradient]) -> list[Gradient | None]:
    """The upper quartile of the last three norms is the limit, after one."""
    return _by_limits(gradients, lambda n: np.quantile(n[-3:], 0.75) if len(n) > 1 else inf)


def by_score(gradients: Sequence[Gradient]) -> list[Gradient | None]:
    """The mean and one deviation is the limit, after two norms; half of each stays at a step."""

    def limit_of(norms: list[float]) -> float:
        if len(norms) <= 2:
            return inf
        mean, variance = float(np.mean(norms[:2])), float(np.var(norms[:2]))
        for norm in norms[2:]:
            limit = mean + variance**0.5 + 1e-6
            fed = min(norm, limit)
            mean = (mean + fed) / 2
            variance = (variance + (fed - mean) ** 2) / 2
        return limit

    return _by_limits(gradients, limit_of)


def by_average(gradients: Sequence[Gradient]) -> list[Gradient | None]:
    """1.5 times the average norm is the limit, after one; above it a step is not made, but once."""
    average, skips, steps = 0.0, 0, list[Gradient | None]()
    for gradient in gradients:
        norm = _l2(_all(gradient))
        limit = 1.5 * average or inf
        if norm > limit and not skips:
            skips += 1
            steps.append(None)
            continue
        skips = 0
        steps.append({name: _scaled(layer, limit, norm) for name, layer in gradient.items()})
        average = (average + min(norm, limit)) / 2 if average else norm
    return steps


def by_weights(gradients: Sequence[Gradient]) -> list[Gradient | None]:
    """Each layer may have half of the norm of its weights, and of 0.25 where these are smaller."""
    steps: list[Gradient | None] = []
    weights = velocity = {name: [0.0] * len(layer) for name, layer in gradients[0].items()}
    for gradient in gradients:
        step = {
            name: _scaled(layer, 0.5 * max(_l2(weights[name]), 0.25), _l2(layer))
            for name, layer in gradient.items()
        }
        velocity = {
            name: [MOMENTUM * v + g for v, g in zip(velocity[name], layer, strict=True)]
            for name, layer in step.items()
        }
        weights = {
            name: [w - v for w, v in zip(weights[name], layer, strict=True)]
            for name, layer in velocity.items()
        }
        steps.append(step)
    return steps


def falling(gradients: Sequence[Gradient]) -> list[Gradient | None]:
    """Each layer has the same limit, which falls to 1.0 in three steps; above 50 none is made."""
    steps: list[Gradient | None] = []
    made = 0
    for gradient in gradients:
        if _l2(_all(gradient)) > 50.0:
            steps.append(None)
            continue
        limit = max(1.0, 4.0 - made)
        steps += by_layer([gradient], dict.fromkeys(gradient, limit))
        made += 1
    return steps


def guarded(gradients: Sequence[Gradient]) -> list[Gradient | None]:
    """The head has a limit, and the rest has none; a step with a NaN is not made."""
    return [
        step if isfinite(_l2(_all(step or {}))) else None
        for step in by_layer(gradients, {"head": 0.7, "body": inf})
    ]


def _policy(name: str, **fields: float) -> dict[str, Any]:
    """Return a policy from outside the package."""
    return {"policy": documented()[name](**fields)}


# Each limit differs from the others, so that no column passes with the policy of another one.
FEATURES = [
    Feature("`max_norm=`", {"max_norm": 2.0}, partial(together, limit=2.0), STEPS),
    Feature(
        "name patterns",
        {"policy": {"head.*": 0.5, "*": 3.0}},
        partial(by_layer, limits={"head": 0.5, "body": 3.0}),
        STEPS,
    ),
    Feature(
        "list by `param_group`",
        {"policy": [3.25, 0.55]},
        partial(by_layer, limits={"body": 3.25, "head": 0.55}),
        STEPS,
    ),
    Feature(
        "`policy` assigned",
        {"policy": 2.25},
        partial(together_later, limit=2.25, later=1.75, after=3),
        STEPS,
        assigned=(3, 1.75),
    ),
    Feature(
        "`NormClip`",
        {"policy": NormClip(max_norm=1.0)},
        partial(together, limit=1.0),
        STEPS,
    ),
    Feature(
        "`NormClip`, p = inf",
        {"policy": NormClip(max_norm=1.5, norm_type=inf)},
        partial(together, limit=1.5, norm=_largest),
        STEPS,
    ),
    Feature(
        "`ValueClip`",
        {"policy": ValueClip(clip_value=0.75)},
        partial(by_element, limit=0.75),
        STEPS,
    ),
    Feature("`ObserveClip`", {"policy": ObserveClip()}, unchanged, STEPS),
    Feature(
        "`GuardClip`",
        {"policy": {"head.*": 0.7, "*": GuardClip()}},
        guarded,
        WITH_A_NAN,
    ),
    Feature(
        "`skip_above`, `Schedule`",
        {
            "policy": NormClip(
                max_norm=Schedule(points=((0, 4.0), (3, 1.0)), shape="linear"),
                scope="tensor",
                skip_above=50.0,
            )
        },
        falling,
        STEPS,
    ),
    Feature("`AGCClip`", {"policy": AGCClip(clip_factor=0.5, eps=0.25)}, by_weights, STEPS),
    Feature(
        "`QuantileClip`", {"policy": QuantileClip(q=0.75, window=3, warmup=1)}, by_quantile, STEPS
    ),
    Feature(
        "`ZScoreClip`",
        {"policy": ZScoreClip(z=1.0, decay=0.5, warmup=2, target="threshold")},
        by_score,
        STEPS,
    ),
    Feature(
        "`EMAClip`, `on_spike`",
        {
            "policy": EMAClip(
                ratio=1.5, decay=0.5, warmup=1, scope="group", on_spike="skip", max_spikes=1
            )
        },
        by_average,
        STEPS,
    ),
    Feature(
        "own policy",
        _policy("TensorLimit", max_norm=1.25),
        partial(by_layer, limits={"head": 1.25, "body": 1.25}),
        STEPS,
    ),
    Feature("own policy with a history", _policy("UsualNorm"), by_history, STEPS),
    Feature("NaN withheld", {"max_norm": 1.0}, partial(together, limit=1.0), WITH_A_NAN),
    Feature(
        "own policy that skips",
        _policy("SpikeSkip", max_norm=1.0, skip_above=40.0),
        partial(together, limit=1.0, skip_above=40.0),
        STEPS,
    ),
    Feature(
        "`stats`",
        {"max_norm": 2.5},
        partial(together, limit=2.5),
        WITH_A_NAN,
        told=(
            "stats",
            {
                "steps": 4,
                "clipped": 2,
                "skipped": 1,
                "nonfinite": 1,
                "p50": _l2(_all(STEPS[0])),
                "max": _l2(_all(STEPS[5])),
                "since": 0,
            },
        ),
    ),
    Feature(
        "log names",
        {"policy": {"head.*": 0.6, "*": 3.5}},
        partial(by_layer, limits={"head": 0.6, "body": 3.5}),
        STEPS,
        told=(
            "logged",
            {
                "gradclip/norm_pre": _l2(_all(STEPS[5])),
                "gradclip/norm_post": hypot(0.6, 3.5),
                "gradclip/norm_max": _l2(_all(STEPS[3])),
                "gradclip/clip_fraction": 5 / 6,
                "gradclip/skipped": 0,
                "gradclip/head.*/norm_pre": _l2(STEPS[5]["head"]),
                "gradclip/*/norm_pre": _l2(STEPS[5]["body"]),
            },
        ),
    ),
    Feature(
        "`record=`",
        {"max_norm": 2.25},
        partial(together, limit=2.25),
        WITH_A_NAN,
        interrupted_after=3,
        told=(
            "recorded",
            {
                "steps": 4,
                "last step": 3,
                "clipped": 2,
                "skipped": 1,
                "reasons": 1,
                "lr": 1.0,
                "norm_pre": _l2(_all(STEPS[5])),
                "norm_post": 2.25,
                "head.weight": _l2(STEPS[5]["head"]),
            },
        ),
    ),
    Feature("history restored", _policy("UsualNorm"), by_history, STEPS, interrupted_after=3),
]
