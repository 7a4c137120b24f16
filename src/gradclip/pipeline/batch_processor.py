"""What happens to one batch: forward, loss, backward, with hooks around each."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from gradclip.errors import ArgumentTypeError, ArgumentValueError
from gradclip.pipeline.hooks.mixin import PipelineHookArgs, PipelineHooks
from gradclip.pipeline.shortcuts import backward

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "BatchProcessorFromCallable",
    "BatchProcessorMixin",
    "LossNotProvidedError",
    "SimpleBatchProcessor",
]

ForwardFunction: TypeAlias = Callable[[Any, Any], tuple[Any, Tensor | None]]


class LossNotProvidedError(ArgumentValueError):
    """``forward`` returned no loss, and a backward pass needs one."""


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


class SimpleBatchProcessor(BatchProcessorMixin):
    """Runs ``forward`` inside ``on_model_forward`` and the backward inside ``on_model_backward``.

    Subclass it and write ``forward``, or use ``from_callable``. Modules among its attributes (a
    loss with weights, say) are prepared with the accelerator, and so are part of checkpoints.

    Args:
        need_backward: Whether there is a backward pass; without it no loss is needed.
    """

    need_backward: bool = True
    accelerator: "Accelerator | None" = None
    _prepared = False

    def __init__(self, need_backward: bool = True) -> None:
        self.need_backward = need_backward

    @staticmethod
    def from_callable(
        forward_fn: ForwardFunction, need_backward: bool = True
    ) -> "BatchProcessorFromCallable":
        """Make a processor of a function ``(model, batch) -> (outputs, loss)``."""
        return BatchProcessorFromCallable(forward_fn, need_backward)

    @abstractmethod
    def forward(self, model: Any, batch: Any) -> tuple[Any, Tensor | None]:
        """Return the outputs and the loss, which is already reduced over the batch.

        Args:
            model: The prepared model; its inputs and it are on the same device.
            batch: What the dataloader gave.
        """

    def prepare(self, accelerator: "Accelerator") -> None:
        """Prepare every module among the attributes, once."""
        if self._prepared:
            return
        self._prepared = True
        self.accelerator = accelerator
        for name, value in list(vars(self).items()):
            if isinstance(value, nn.Module):
                setattr(self, name, accelerator.prepare(value))

    def __call__(
        self,
        pipeline_hooks: PipelineHooks,
        on_batch_hook_args: PipelineHookArgs,
        model: Callable[..., Any],
    ) -> None:
        """Run forward and backward on a batch.

        Raises:
            LossNotProvidedError: There is a backward pass and no loss.
            ArgumentTypeError: ``forward`` did not return a pair.
        """
        arg = on_batch_hook_args
        accelerator = arg.accelerator
        if accelerator is not None:
            self.prepare(accelerator)
        with pipeline_hooks.begin("on_model_forward", arg.copy_with_updates()) as forward_arg:
            outputs, loss = _pair(self.forward(model, arg.batch))
            reduced = None if loss is None else loss.detach()
            if reduced is not None and accelerator is not None and accelerator.num_processes > 1:
                reduced = accelerator.reduce(reduced, reduction="mean")
            forward_arg.model_outputs = arg.model_outputs = outputs
            forward_arg.reduce_loss = arg.reduce_loss = reduced
        if not self.need_backward:
            return
        if loss is None:
            raise LossNotProvidedError(
                f"{type(self).__name__}.forward returned no loss, and a backward pass needs one. "
                "Return (outputs, loss), or set need_backward=False."
            )
        with pipeline_hooks.begin("on_model_backward", arg.copy_with_updates()):
            backward(accelerator, loss)


class BatchProcessorFromCallable(SimpleBatchProcessor):
    """A processor whose ``forward`` is a function.

    Args:
        forward_fn: ``(model, batch) -> (outputs, loss)``.
        need_backward: Whether there is a backward pass.
    """

    def __init__(self, forward_fn: ForwardFunction, need_backward: bool = True) -> None:
        super().__init__(need_backward)
        self._forward_fn = forward_fn

    def forward(self, model: Any, batch: Any) -> tuple[Any, Tensor | None]:
        """Call the function."""
        return self._forward_fn(model, batch)


def _pair(returned: object) -> tuple[Any, Tensor | None]:
    if isinstance(returned, tuple) and len(returned) == 2:  # noqa: PLR2004 - a pair
        outputs, loss = returned
        if loss is None or isinstance(loss, torch.Tensor):
            return outputs, loss
    raise ArgumentTypeError(
        "forward returns the pair (outputs, loss), the loss a tensor or None; seen "
        f"{type(returned).__name__}"
        + (f" of {[type(each).__name__ for each in returned]}" if type(returned) is tuple else "")
    )
