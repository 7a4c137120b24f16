"""What a trainer is given: checked, and its hooks put in order, before anything is prepared."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import LBFGS
from torch.optim.lr_scheduler import ReduceLROnPlateau

from gradclip.errors import ArgumentTypeError, ArgumentValueError, DoubleClippingError
from gradclip.pipeline.batch_processor import BatchProcessorMixin
from gradclip.pipeline.hooks.checkpoint import SaveCheckpoint
from gradclip.pipeline.hooks.grad_clip import GradientClippingHook
from gradclip.pipeline.hooks.mixin import PipelineHooks, PipelineHooksConfig
from gradclip.pipeline.hooks.optimizer import OptimizerHook

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "NOT_GIVEN",
    "arranged",
    "check_accelerator",
    "check_complete",
    "check_kinds",
    "check_limits",
    "one",
]

NOT_GIVEN: Any = object()
"""The default of an argument that has to be given, be it as None."""


def arranged(
    clipping: PipelineHooks | None,
    validation: PipelineHooks | None,
    others: Iterable[PipelineHooks],
) -> PipelineHooks:
    """Put the hooks of a run in order, and refuse those that exclude each other.

    Raises:
        DoubleClippingError: GC101, there are two clipping hooks.
        ArgumentValueError: GC010, there are two optimizer hooks.
    """
    given = PipelineHooks.from_hooks([h for h in (clipping, validation, *others) if h is not None])
    clippers = [each for each in given.walk() if isinstance(each, GradientClippingHook)]
    if len(clippers) > 1:
        raise DoubleClippingError(
            f"there are {len(clippers)} clipping hooks, in grad_clip and hooks together: a second "
            "limit would silently change what the first one means. Keep one; limits by parameter "
            "go into its policy={pattern: ...}."
        )
    optimizers = [each for each in given.walk() if isinstance(each, OptimizerHook)]
    if len(optimizers) > 1:
        raise ArgumentValueError(
            f"there are {len(optimizers)} optimizer hooks among hooks, so every step would be made "
            "twice. Keep one, or none: the trainer has its own."
        )
    own = [] if optimizers else [OptimizerHook()]
    ordered = [clipping, *own, validation, *others] if own else [clipping, *others, validation]
    hooks = PipelineHooks.from_hooks([each for each in ordered if each is not None])
    for each in hooks.walk():
        if isinstance(each, SaveCheckpoint):
            hooks.move_to_end(each)
    return hooks


def one(
    name: str, value: "PipelineHooksConfig[Any] | PipelineHooks | None", kind: type[PipelineHooks]
) -> PipelineHooks | None:
    """Return the hook that an argument gives, as itself or as its configuration.

    Raises:
        ArgumentTypeError: GC011, it is neither.
    """
    hook = value() if isinstance(value, PipelineHooksConfig) else value
    if hook is None or isinstance(hook, kind):
        return hook
    raise ArgumentTypeError(
        f"{name} is {hook!r}: expected a {kind.__name__}Config or a {kind.__name__}"
    )


def check_kinds(
    model: object,
    dataloader: object,
    batch_processor: object,
    optimizer: object,
    lr_scheduler: object,
) -> None:
    """Check that each object is of its kind; what training alone needs may be None until then.

    Raises:
        ArgumentTypeError: GC011, one is missing, or of another kind.
    """
    wanted = {
        "model": (model, isinstance(model, nn.Module), "a torch.nn.Module"),
        "dataloader": (
            dataloader,
            dataloader is None or hasattr(dataloader, "__iter__"),
            "a DataLoader or an iterable",
        ),
        "batch_processor": (
            batch_processor,
            isinstance(batch_processor, BatchProcessorMixin),
            "a BatchProcessorMixin, such as SimpleBatchProcessor.from_callable(function)",
        ),
        "optimizer": (
            optimizer,
            optimizer is None
            or (hasattr(optimizer, "param_groups") and not isinstance(optimizer, LBFGS)),
            "a torch optimizer whose step needs no closure",
        ),
        "lr_scheduler": (
            lr_scheduler,
            lr_scheduler is None or hasattr(lr_scheduler, "step"),
            "a torch scheduler, or None",
        ),
    }
    for name, (value, fits, expected) in wanted.items():
        if not fits:
            missing = value is None or value is NOT_GIVEN
            seen = "missing" if missing else f"of type {type(value).__qualname__}"
            raise ArgumentTypeError(f"{name} is {seen}: expected {expected}")
    if isinstance(lr_scheduler, ReduceLROnPlateau):
        raise ArgumentTypeError(
            "lr_scheduler is a ReduceLROnPlateau, whose step() needs a metric that the trainer "
            "does not have: step it in a hook of your own, after on_epoch"
        )


def check_complete(dataloader: object, optimizer: object) -> None:
    """Check that there is what training needs.

    Raises:
        ArgumentTypeError: GC011, something was given as None.
    """
    for name, value in {"dataloader": dataloader, "optimizer": optimizer}.items():
        if value is None:
            raise ArgumentTypeError(
                f"{name} is None: training needs one, evaluation alone does not"
            )


def check_limits(max_step: object, max_epoch: object) -> None:
    """Check how many steps and epochs there may be; None is no limit.

    Raises:
        ArgumentTypeError: GC011, one is no whole number.
        ArgumentValueError: GC010, one is below 1, or there is none.
    """
    for name, value in {"max_step": max_step, "max_epoch": max_epoch}.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise ArgumentTypeError(f"{name} is {value!r}: expected a whole number, or None")
        if value < 1:
            raise ArgumentValueError(
                f"{name} = {value} < 1 is not allowed: nothing would be trained"
            )
    if max_step is None and max_epoch is None:
        raise ArgumentValueError(
            "either max_step or max_epoch must be specified: nothing else ends the training"
        )


def check_accelerator(accelerator: "Accelerator") -> None:
    """Refuse what the trainer cannot work with.

    Raises:
        ArgumentValueError: GC010, it does not know of the other processes that were launched.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and accelerator.num_processes == 1:
        raise ArgumentValueError(
            f"this is one of {launched} processes that were launched together, and the accelerator "
            "knows of one, so each would train a model of its own. On a machine without "
            "accelerators make it with Accelerator(cpu=True)."
        )
