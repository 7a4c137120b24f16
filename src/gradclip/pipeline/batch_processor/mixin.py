"""What a trainer asks of whatever processes a batch."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gradclip.pipeline.hooks.mixin import PipelineHookArgs, PipelineHooks

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["BatchProcessorMixin"]


class BatchProcessorMixin(ABC):
    """Processes a batch, and leaves outputs and loss on the hook's argument."""

    def prepare(self, accelerator: "Accelerator") -> None:  # noqa: B027 - most own nothing
        """Prepare what the processor owns; called before the first batch, and before a resume."""

    @abstractmethod
    def __call__(
        self,
        pipeline_hooks: PipelineHooks,
        on_batch_hook_args: PipelineHookArgs,
        model: Callable[..., Any],
    ) -> None:
        """Process ``on_batch_hook_args.batch``.

        Args:
            pipeline_hooks: The hooks to open channels of.
            on_batch_hook_args: Has ``accelerator`` and ``batch``; is given ``model_outputs`` and
                ``reduce_loss``.
            model: The prepared model.
        """
