"""Forward, loss and backward of one batch, with hooks around each."""

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from gradclip.errors import ArgumentTypeError, ArgumentValueError
from gradclip.pipeline.batch_processor.mixin import BatchProcessorMixin
from gradclip.pipeline.hooks.mixin import PipelineHookArgs, PipelineHooks
from gradclip.pipeline.shortcuts import backward

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "BatchProcessorFromCallable",
    "LossNotProvidedError",
    "SimpleBatchProcessor",
]

ForwardFunction: TypeAlias = Callable[[Any, Any], tuple[Any, Tensor | None]]


class LossNotProvidedError(ArgumentValueError):
    """``forward`` returned no loss, and a backward pass needs one."""


class SimpleBatchProcessor(BatchProcessorMixin):
    """Runs ``forward`` inside ``on_model_forward`` and the backward inside ``on_model_backward``.

    Subclass it and write ``forward``, or use ``from_callable``. Modules among its attributes (a
    loss with weights, say) are prepared with the accelerator, and so are part of checkpoints.

    Args:
        need_backward: Whether there is a backward pass; without it no loss is needed.
        transforms: None. RoboOrchardLab took transforms of the batch here once.

    Raises:
        ArgumentValueError: GC010, ``transforms`` is not None.
    """

    need_backward: bool = True
    accelerator: "Accelerator | None" = None
    _prepared = False

    def __init__(self, need_backward: bool = True, transforms: None = None) -> None:
        if transforms is not None:
            raise ArgumentValueError(
                "transforms of a batch processor are not supported: transform the batch in "
                "forward(), or in the dataset"
            )
        self.need_backward = need_backward

    @staticmethod
    def from_callable(
        forward_fn: ForwardFunction, need_backward: bool = True, transforms: None = None
    ) -> "BatchProcessorFromCallable":
        """Make a processor of a function ``(model, batch) -> (outputs, loss)``."""
        return BatchProcessorFromCallable(forward_fn, need_backward, transforms)

    @abstractmethod
    def forward(self, model: Any, batch: Any) -> tuple[Any, Tensor | None]:
        """Return the outputs and the loss, which is already reduced over the batch.

        Where there is no backward pass, the loss may be a number too.

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
            outputs, loss = _pair(self.forward(model, arg.batch), self.need_backward)
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
        transforms: None; see ``SimpleBatchProcessor``.
    """

    def __init__(
        self, forward_fn: ForwardFunction, need_backward: bool = True, transforms: None = None
    ) -> None:
        super().__init__(need_backward, transforms)
        self._forward_fn = forward_fn

    def forward(self, model: Any, batch: Any) -> tuple[Any, Tensor | None]:
        """Call the function."""
        return self._forward_fn(model, batch)


def _pair(returned: object, need_backward: bool) -> tuple[Any, Tensor | None]:
    kind = type(returned).__name__
    if isinstance(returned, tuple | list):
        if len(returned) == 2:  # noqa: PLR2004 - a pair
            outputs, loss = returned
            if loss is None or isinstance(loss, Tensor):
                return outputs, loss
            if isinstance(loss, int | float) and not need_backward:
                return outputs, torch.tensor(float(loss))
        kind += f" of {[type(each).__name__ for each in returned]}"
    raise ArgumentTypeError(
        f"forward returns the pair (outputs, loss), the loss a tensor or None; seen {kind}"
    )
