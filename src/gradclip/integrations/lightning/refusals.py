"""What the callback for Lightning refuses, before the first step."""

from typing import Any

import torch

from gradclip.clipping.policies import any_writes, as_policies
from gradclip.errors import ArgumentTypeError, DoubleClippingError

_NOTHING = "  No step was made, and no gradient was changed."
_PACKAGES = ("lightning", "pytorch_lightning")


def refuse_other_clipping(trainer: Any, pl_module: Any, policy: object) -> None:
    """Refuse a training in which something else clips as well.

    Args:
        trainer: A ``Trainer`` that is about to fit.
        pl_module: The ``LightningModule``.
        policy: What the callback clips to.

    Raises:
        DoubleClippingError: GC101, for DeepSpeed, ``gradient_clip_val``, or a
            ``configure_gradient_clipping`` that Lightning would call.
    """
    ours = f"  gradclip   GradientClippingCallback({policy!r})\n"
    if getattr(trainer.strategy, "strategy_name", None) == "deepspeed":
        raise DoubleClippingError(
            "DeepSpeed clips these gradients by itself\n"
            f"  DeepSpeed  gradient_clipping = {trainer.gradient_clip_val or 0.0}    "
            "(from Trainer(gradient_clip_val=...), unless its configuration has another)\n"
            f"{ours}"
            "  It clips inside engine.step(), so no callback can run between backward and update.\n"
            '  Leave the callback out: Trainer(strategy="deepspeed", gradient_clip_val=...).\n'
            f"{_NOTHING}"
        )
    if not any_writes(as_policies(policy)[0]):
        return  # Lightning clips after the callback has measured
    if trainer.gradient_clip_val:
        where, without = (
            _argument(trainer),
            "Trainer(..., callbacks=[...]) without gradient_clip_val",
        )
    elif pl_module.automatic_optimization and (theirs := _override(pl_module)):
        where, without = theirs, "a LightningModule without configure_gradient_clipping"
    else:
        return
    raise DoubleClippingError(
        "Lightning would clip these gradients too\n"
        f"  Lightning  {where}\n"
        f"{ours}"
        "  Lightning clips right after the callback, and a second limit silently changes what the "
        "first one means.\n"
        "  Keep one of them:\n"
        f"    the callback, and {without}\n"
        "    or Lightning's, and no callback\n"
        f"{_NOTHING}"
    )


def _argument(trainer: Any) -> str:
    label = f"gradient_clip_val={trainer.gradient_clip_val!r}"
    if trainer.gradient_clip_algorithm is not None:
        label += f', gradient_clip_algorithm="{trainer.gradient_clip_algorithm.value}"'
    return f"Trainer({label})"


def _override(pl_module: Any) -> str | None:
    """Return the name of the module's own ``configure_gradient_clipping``, if it has one."""
    name = "configure_gradient_clipping"
    if name in vars(pl_module):
        return f"{type(pl_module).__qualname__}().{name}, which was set on it"
    for kind in type(pl_module).__mro__:
        if name in vars(kind):
            known = kind.__module__.partition(".")[0] in _PACKAGES
            return None if known else f"{kind.__module__}.{kind.__qualname__}.{name}"
    return None


def refuse_kind(optimizer: object) -> None:
    """Refuse what is no torch optimizer; the held step refuses those that it cannot withhold.

    Raises:
        ArgumentTypeError: GC011.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentTypeError(
            f"configure_optimizers returned a {type(optimizer).__qualname__}: expected a torch "
            "optimizer, for no other can be kept from stepping on a NaN"
        )
