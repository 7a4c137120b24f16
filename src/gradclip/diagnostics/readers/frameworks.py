"""Which framework wrote a log, by the names that only it has."""

import re
from collections.abc import Iterable

__all__ = ["framework_of"]

_PREFIX = re.compile(r"train/")
_OF_ONE_NAME = {
    "grdn": "lerobot",
    "gnorm": "fairseq",
    "number of skipped iterations": "megatron",
}
_OF_TRANSFORMERS = {"loss", "grad_norm", "learning_rate", "epoch"}
_OF_LIGHTNING = re.compile(r"lr-.*|.*_(?:step|epoch)|grad_[\d.]+_norm_total")


def framework_of(names: Iterable[str]) -> str | None:
    """Return the framework that writes these columns, or None."""
    plain = {_PREFIX.sub("", name) for name in names}
    for name, framework in _OF_ONE_NAME.items():
        if name in plain:
            return framework
    if plain >= _OF_TRANSFORMERS:
        return "transformers"
    if {"epoch", "step"} <= plain and any(_OF_LIGHTNING.fullmatch(name) for name in plain):
        return "lightning"
    return None
