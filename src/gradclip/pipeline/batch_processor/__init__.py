"""What happens to one batch."""

from gradclip.pipeline.batch_processor.mixin import BatchProcessorMixin as BatchProcessorMixin
from gradclip.pipeline.batch_processor.simple import (
    BatchProcessorFromCallable as BatchProcessorFromCallable,
)
from gradclip.pipeline.batch_processor.simple import LossNotProvidedError as LossNotProvidedError
from gradclip.pipeline.batch_processor.simple import SimpleBatchProcessor as SimpleBatchProcessor

__all__ = [
    "BatchProcessorFromCallable",
    "BatchProcessorMixin",
    "LossNotProvidedError",
    "SimpleBatchProcessor",
]
