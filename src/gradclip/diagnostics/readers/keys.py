"""Which column is what: the names that training scripts give to norm, step, loss and rate."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import lru_cache

__all__ = ["LIMITS", "LOSSES", "NORMS", "RATES", "STEPS", "canonical", "is_part", "nearest", "rank"]

_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_BLANKS = re.compile(r"[\s\-_]+")
_TRUSTED = re.compile(r"(?:(?:train|trainer|training|optim|optimizer|metrics|time|gradclip)[/._])+")
_UNTRUSTED = re.compile(r"(?:eval|val|valid|validation|test)(?:[/._]|$)")

_GLOBAL = "global|total"
_BEFORE = "(?:pre|before)_?clip(?:ping)?|unclipped|raw"
_HINT = re.compile("norm|grad|grdn|step|it|num_|epoch|batch_idx|loss|lr|learning_rate|clip|thresh")
"""Each known name has one of these: most names have none, and a log may have very many."""

NORMS = (
    "norm_pre",
    rf"(?:(?:{_GLOBAL})_)?grad(?:ient)?_norm[_/](?:{_BEFORE})",
    rf"(?:{_BEFORE})_(?:(?:{_GLOBAL})_)?grad(?:ient)?_norm",
    "grad_norm",
    "gradient_norm",
    "global_grad_norm",
    "total_grad_norm",
    "grad_norm_total",
    r"grad_[\d.]+_norm_total",
    "total_norm",
    "preclip_global_norm",
    "gnorm",
    "grad_gnorm",
    "gradnorm",
    "grdn",
    "grad/norm",
    "grad/norm/total",
    "(?:train_)?l2_norm/grad/global",
    "norm",
    "grad",
    "grad_norm_avg",
    "grad_norm_val",
)
"""Norms of all gradients before clipping, the best first; each is a pattern of a whole name."""

STEPS = (
    "global_step",
    "global_step/max_steps",
    "step",
    "iteration",
    "iter",
    "it",
    "iter_num",
    "num_updates",
    "(?:current|completed)_steps",
    "(?:train|training|update|optimizer|opt)_step",
    "training_iteration",
    "total_timesteps",
    "num_timesteps",
    "batch_idx",
    "epoch",
)
"""What counts steps, the best first. Some scripts restart ``step`` with each epoch."""

LOSSES = (
    "loss",
    "total_loss",
    "loss_total",
    "lm_loss",
    "loss_avg",
    "loss_step",
    "training_loss",
    "pg_loss",
    "policy_loss",
    ".*loss",
)
"""Losses of training, the best first."""

RATES = ("learning_rate", "lr", r"lr[_/.].*", r"learning_rate[_/.].*")
"""Learning rates, the best first."""

LIMITS = (
    "max_grad_norm",
    "clip_grad",
    "clip_norm",
    "clip_grad_norm",
    "grad_clip",
    "grad_clip_norm",
    "gradient_clip_val",
    "gradient_clipping",
    "threshold",
)
"""Settings that say which limit the run had."""

_PART = re.compile(
    r"(?:(?P<of>.+)[/._])?(?:grad_norm|gradient_norm|gnorm|gradnorm)(?P<kind>\(.*\)|/.*)?"
)
_NO_NORM = re.compile(
    r"(?:^|[_/.(])(?:clip\w*|max|min|std|var|mean|param|params|weight\w*|post|ratio|threshold|limit|"
    r"target|eval|val|test|num|count)(?:$|[_/.)])"
)


def canonical(name: str) -> str:
    """Return a name in small letters, joined by underscores, without the run that W&B puts first.

    >>> canonical("run-1 - train/Grad Norm"), canonical("GradNorm(P)"), canonical("_step")
    ('train/grad_norm', 'grad_norm(p)', 'step')
    """
    name = _CAMEL.sub("_", name.rsplit(" - ", 1)[-1].strip())
    return _BLANKS.sub("_", name).strip("_").lower()


def rank(name: str, known: Sequence[str], *, last_part: bool = False) -> int | None:
    """Return the place of a name among known ones, the smaller the better, or None.

    Args:
        name: A column.
        known: Patterns of whole names, the best first.
        last_part: Whether anything may stand before the last slash, as in ``critic/lr``; a column
            without that is better.
    """
    whole = _readings(name)
    if not whole:
        return None
    places = [_place(each, tuple(known)) for each in whole]
    if last_part:
        last = _place(whole[0].rsplit("/", 1)[-1], tuple(known))
        places.append(None if last is None else len(known) + last)
    return min((each for each in places if each is not None), default=None)


@lru_cache(2**16)
def _readings(name: str) -> tuple[str, ...]:
    """Return what may be known of a name: all of it, and what is behind a prefix; or nothing."""
    plain = canonical(name)
    if _UNTRUSTED.match(plain) or not _HINT.search(plain):
        return ()
    trusted = _TRUSTED.match(plain)
    return (plain, plain[trusted.end() :]) if trusted else (plain,)


def _place(name: str, known: tuple[str, ...]) -> int | None:
    """Return the first pattern that a whole name has."""
    found = _as_one(known).fullmatch(name)
    return None if found is None or found.lastindex is None else found.lastindex - 1


@lru_cache
def _as_one(known: tuple[str, ...]) -> "re.Pattern[str]":
    """Return one pattern of them all, with a group for each: a log may have many columns."""
    return re.compile("|".join(f"({each})" for each in known))


def is_part(name: str) -> bool:
    """Return whether a column looks like the norm of a part of the gradients.

    >>> is_part("attack_grad_norm"), is_part("GradNorm(P)"), is_part("max_grad_norm")
    (True, True, False)
    """
    plain = canonical(name)
    found = _PART.fullmatch(plain)
    return found is not None and not _NO_NORM.search(plain)


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Return the columns whose names are most alike, the nearest first."""
    by_name: dict[str, str] = {}
    for each in names:
        by_name.setdefault(canonical(each), each)
    found = get_close_matches(canonical(name)[:80], by_name, n=3, cutoff=0.5)
    return [by_name[each] for each in found]
