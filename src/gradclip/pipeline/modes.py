"""Training and evaluation: the modes of a model, and of an optimizer that has them.

A schedule-free optimizer (Defazio et al. 2024, arXiv:2405.15682) steps at other weights than those
that are to be used. Its ``eval()`` puts the latter in place, and its ``train()`` the former back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from gradclip.integrations.wrapped import behind_accelerate

__all__ = ["evaluating", "evaluating_optimizer", "switch_optimizer"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation, and every module back to the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating_optimizer(optimizer: Any) -> Iterator[None]:
    """Let an optimizer that has modes put the weights in place that are to be used."""
    trains = _trains(optimizer)
    if trains:
        switch_optimizer(optimizer, train=False)
    try:
        yield
    finally:
        if trains:
            switch_optimizer(optimizer, train=True)


def switch_optimizer(optimizer: Any, *, train: bool) -> None:
    """Switch the mode of an optimizer, if it has any."""
    inner: Any = None if optimizer is None else behind_accelerate(optimizer)
    if _has_modes(inner):
        inner.train() if train else inner.eval()


def _has_modes(optimizer: Any) -> bool:
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def _trains(optimizer: Any) -> bool:
    """Whether an optimizer has modes, and is not in that of evaluation already."""
    inner: Any = None if optimizer is None else behind_accelerate(optimizer)
    if not _has_modes(inner):
        return False
    told = [group["train_mode"] for group in inner.param_groups if "train_mode" in group]
    return bool(all(told) and getattr(inner, "train_mode", True))
