"""All ways into gradclip, and what each refuses: the rows of the grid, and the page that shows it.

``make ways-in`` runs this file: it writes the tables into ``docs/reference/integrations.md``.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TypeAlias

from features import FEATURES, Feature, Gradient
from trained import Trained

from gradclip.errors import (
    ArgumentTypeError,
    DoubleClippingError,
    GradClipError,
    NonFiniteGradientError,
)

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "integrations.md"

Train: TypeAlias = Callable[[Feature, list[Gradient], Path], Trained]
"""A driver: trains the tiny model on these gradients, and returns its weights after each step.

It goes on from what an earlier run left in the folder, and leaves there what the next one needs.
"""


@dataclass(frozen=True)
class Refusal:
    """An error in the place of a feature.

    Args:
        error: Its class.
        code: Its code.
        why: The reason, as the page says it.
    """

    error: type[GradClipError]
    code: str
    why: str


@dataclass(frozen=True)
class Absent:
    """A feature that a way in cannot have, with nothing to refuse: there is no test.

    Args:
        why: The reason, as the page says it.
    """

    why: str
    code: str = "none"


@dataclass(frozen=True)
class Fault:
    """A feature that a way in should have, and does not have yet: its test is expected to fail.

    Args:
        error: What the test fails with.
        why: The reason, as the page says it.
    """

    error: type[Exception]
    why: str
    code: str = "no"


@dataclass(frozen=True)
class Way:
    """A way into gradclip.

    Args:
        name: The head of its row.
        driver: The module and the function that train.
        needs: The package that it is a way in for; None for those that gradclip itself needs.
        cells: What does not work, by the name of the feature. All else does, and is tested.
    """

    name: str
    driver: tuple[str, str]
    needs: str | None = None
    cells: dict[str, Refusal | Fault | Absent] = field(default_factory=dict)

    def train(self) -> Train:
        """Import the driver, and the framework with it."""
        module, function = self.driver
        return getattr(import_module(module), function)


OWN = ["own policy", "own policy with a history", "own policy that skips", "history restored"]
ADAPTIVE = ["`AGCClip`", "`QuantileClip`", "`ZScoreClip`", "`EMAClip`, `on_spike`"]
BEYOND_NUMBERS = [
    "name patterns",
    "list by `param_group`",
    "`GuardClip`",
    "`skip_above`, `Schedule`",
    *ADAPTIVE,
    *OWN,
]
ONLY_NUMBERS = Refusal(
    ArgumentTypeError,
    "GC011",
    "`max_norm` is a number: `inf` measures, `clip_grad_value_` clamps, `GradientClipper` takes "
    "policies",
)
NO_STEP = Refusal(
    NonFiniteGradientError,
    "GC201",
    "the step is the loop's: `error_if_nonfinite=True` raises before it, otherwise it is made",
)
ONE_NORM = Refusal(
    DoubleClippingError,
    "GC101",
    "DeepSpeed clips inside its own step, by one fixed 2-norm of all gradients",
)
EACH_CALL = Absent("each call has its own limit")
NO_MEMORY = Absent("a function remembers nothing: `GradientClipper` counts")
NO_LOGGER = Absent("nothing logs in a loop of your own: `stats` and `last` have the numbers")
NOT_THEIRS = Absent("its loggers ask no hook: `arg.clip_result` and `stats` have the numbers")
NOT_SAVED = Fault(AssertionError, "RoboOrchardLab's checkpoints do not hold the history")

_no_logger = {"log names": NO_LOGGER}
_refused_by_function = ["`ValueClip`", "`ObserveClip`", *BEYOND_NUMBERS]
_refused_by_deepspeed = [
    "`policy` assigned",
    "`NormClip`, p = inf",
    "`ValueClip`",
    *BEYOND_NUMBERS,
]

WAYS = [
    Way(
        "`clip_grad_norm_`",
        ("ways_by_loop", "function"),
        cells={
            **dict.fromkeys(_refused_by_function, ONLY_NUMBERS),
            "`policy` assigned": EACH_CALL,
            "NaN withheld": NO_STEP,
            "`stats`": NO_MEMORY,
            "`record=`": NO_MEMORY,
            **_no_logger,
        },
    ),
    Way("`GradientClipper` and `withhold`", ("ways_by_loop", "clipper"), cells=_no_logger),
    Way("`attach`", ("ways_by_loop", "attached"), cells=_no_logger),
    Way("`attach`, fused optimizer", ("ways_by_loop", "attached_to_fused"), cells=_no_logger),
    Way("`AcceleratorClipper`", ("ways_by_loop", "on_accelerate"), cells=_no_logger),
    Way("hook of gradclip's trainer", ("ways_by_loop", "hook")),
    Way("transformers, callback", ("ways_by_transformers", "callback"), "transformers"),
    Way(
        "transformers, callback with the mixin",
        ("ways_by_transformers", "callback_with_mixin"),
        "transformers",
    ),
    Way("TRL, callback", ("ways_by_trl", "callback"), "trl"),
    Way("Lightning, automatic optimisation", ("ways_by_lightning", "automatic"), "lightning"),
    Way("Lightning, manual optimisation", ("ways_by_lightning", "manual"), "lightning"),
    Way("Fabric, `attach`", ("ways_by_lightning", "fabric"), "lightning", _no_logger),
    Way(
        "DeepSpeed, `lower` and `observe`",
        ("ways_by_deepspeed", "lowered"),
        "deepspeed",
        {**dict.fromkeys(_refused_by_deepspeed, ONE_NORM), **_no_logger},
    ),
    Way(
        "RoboOrchardLab",
        ("ways_by_robo_orchard", "adapter"),
        "robo_orchard_lab",
        {"history restored": NOT_SAVED, "log names": NOT_THEIRS},
    ),
]


def tables() -> str:
    """Return the grid as the page has it, and below it why a way in lacks a feature."""
    names = [feature.name for feature in FEATURES]
    grid = [_line("", *names), _line(*["---"] * (len(names) + 1))]
    lacking: dict[Refusal | Fault | Absent, list[str]] = {}
    for way in WAYS:
        codes = [way.cells[name].code if name in way.cells else "yes" for name in names]
        grid.append(_line(way.name, *codes))
        for cell in dict.fromkeys(way.cells.values()):
            lacking.setdefault(cell, []).append(way.name)
    reasons = [_line("way in", "", "error", "why"), _line(*["---"] * 4)]
    for cell, ways in lacking.items():
        error = f"`{cell.error.__name__}`" if isinstance(cell, Refusal) else ""
        reasons.append(_line("; ".join(ways), cell.code, error, cell.why))
    return "\n".join([*grid, "", *reasons])


def _line(*entries: str) -> str:
    return f"| {' | '.join(entries)} |"


def filled(page: str) -> str:
    """Return a page with the tables made anew."""
    return re.sub(
        r"(<!-- ways in: generated.*? -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{tables()}\n{found[2]}",
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
