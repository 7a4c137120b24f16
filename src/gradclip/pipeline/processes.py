"""What the processes of a run do together, so that none waits for one that failed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from gradclip.errors import ArgumentValueError, CheckpointError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

__all__ = ["AllProcesses", "default_accelerator", "gathered", "keep_distributed", "together"]

_Value = TypeVar("_Value")


class AllProcesses:
    """The processes of a run."""

    def __init__(self, accelerator: "Accelerator") -> None:
        self._accelerator = accelerator

    def from_main(self, value: _Value) -> _Value:
        """Return the value that the main process gave."""
        if self._accelerator.num_processes == 1:
            return value
        from accelerate.utils import broadcast_object_list  # noqa: PLC0415 - not for one process

        values: list[Any] = [value]
        broadcast_object_list(values)
        first: _Value = values[0]
        return first

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every process if one of them has an error: its own there, a report elsewhere.

        Raises:
            CheckpointError: GC301, on the processes that have none of their own.
        """
        index = self._accelerator.process_index
        mine = None if error is None else (index, f"{type(error).__name__}: {error}")
        problems = gathered(self._accelerator, mine)
        if error is not None:
            raise error
        for number, words in filter(None, problems):
            raise CheckpointError(f"process {number} failed, so no process goes on: {words}")


def gathered(accelerator: "Accelerator | None", value: _Value) -> list[_Value]:
    """Return what every process gave, in their order; all of them call it at the same time."""
    if accelerator is None or accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object  # noqa: PLC0415 - not for one process

    values: list[_Value] = gather_object([value])
    return values


def default_accelerator() -> "Accelerator":
    """Make an accelerator of all processes that were launched, on whatever there is."""
    from accelerate import Accelerator  # noqa: PLC0415 - only the pipeline needs it

    # Without being told, Accelerate does not see other processes where there is no accelerator.
    return Accelerator(cpu=not torch.accelerator.is_available())


@contextmanager
def together(accelerator: "Accelerator") -> Iterator[AllProcesses]:
    """Make a context that all processes leave at once, and all with an error if one has one."""
    processes = AllProcesses(accelerator)
    error: Exception | None = None
    try:
        yield processes
    except Exception as raised:  # noqa: BLE001 - whatever it was, the others must not wait for it
        error = raised
    processes.raise_together(error)


def keep_distributed(accelerator: "Accelerator", model: "nn.Module") -> None:
    """Keep Accelerate from wrapping a model whose parameters are distributed already.

    Args:
        accelerator: What will prepare it.
        model: Perhaps sharded by ``fully_shard`` or ``parallelize_module``, or wrapped by FSDP1.

    Raises:
        ArgumentValueError: GC010, Accelerate should add mixed precision to such a model.
    """
    if not any(
        hasattr(parameter, "_spec") or getattr(parameter, "_fsdp_flattened", False)
        for parameter in model.parameters()
    ):
        return
    if accelerator.native_amp:
        raise ArgumentValueError(
            f"the accelerator has mixed_precision={accelerator.mixed_precision!r}, and the model "
            "is sharded already, so Accelerate cannot wrap it. Give fully_shard a "
            "MixedPrecisionPolicy, and leave mixed_precision out; or let Accelerate shard the "
            "model (FullyShardedDataParallelPlugin)."
        )
    vars(model)["_is_accelerate_prepared"] = True  # what Accelerate itself looks at
