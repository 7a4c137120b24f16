"""Training driven by hooks.

Importing this package, or ``gradclip.pipeline.hooks``, needs no Accelerate: the trainer does, and
is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradclip.pipeline.batch_processor import BatchProcessorMixin as BatchProcessorMixin
    from gradclip.pipeline.batch_processor import LossNotProvidedError as LossNotProvidedError
    from gradclip.pipeline.batch_processor import SimpleBatchProcessor as SimpleBatchProcessor
    from gradclip.pipeline.hook_based_trainer import HookBasedTrainer as HookBasedTrainer
    from gradclip.pipeline.hook_based_trainer import (
        ResumeCheckpointConfig as ResumeCheckpointConfig,
    )
    from gradclip.pipeline.trainer import SimpleTrainer as SimpleTrainer

_MODULES = {
    "BatchProcessorMixin": "batch_processor",
    "HookBasedTrainer": "hook_based_trainer",
    "LossNotProvidedError": "batch_processor",
    "ResumeCheckpointConfig": "hook_based_trainer",
    "SimpleBatchProcessor": "batch_processor",
    "SimpleTrainer": "trainer",
}

__all__ = [
    "BatchProcessorMixin",
    "HookBasedTrainer",
    "LossNotProvidedError",
    "ResumeCheckpointConfig",
    "SimpleBatchProcessor",
    "SimpleTrainer",
]


def __getattr__(name: str) -> object:
    """Import what is asked for; its module comes with its dependencies."""
    if name in _MODULES:
        return getattr(import_module(f"gradclip.pipeline.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
