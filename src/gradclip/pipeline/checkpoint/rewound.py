"""Passing over what was consumed."""

from collections.abc import Iterator, Sequence
from typing import Any

from gradclip.errors import CheckpointError
from gradclip.pipeline.checkpoint.rng import RandomState

__all__ = ["Rewound", "pass_over"]

_END = object()


class Rewound:
    """A batch sampler that passes over what was consumed, and sets random states as it goes on.

    Args:
        batch_sampler: The sampler that is passed over.
        skip: How many of its batches.
        states: What to put in place before each of the next batches; None to leave it.
    """

    def __init__(self, batch_sampler: Any, skip: int, states: Sequence[RandomState | None]) -> None:
        self.batch_sampler = batch_sampler
        self.sampler = getattr(batch_sampler, "sampler", None)
        self.skip = skip
        self.states = states

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.batch_sampler)
        pass_over(batches, self.skip)
        for state in self.states:
            if state is not None:
                state.restore()
            batch = next(batches, _END)
            if batch is _END:
                if (last := self.states[-1]) is not None:
                    last.restore()
                return
            yield batch
        yield from batches

    def __len__(self) -> int:
        return len(self.batch_sampler) - self.skip


def pass_over(batches: Iterator[Any], consumed: int) -> None:
    """Take what was consumed.

    Raises:
        CheckpointError: GC301, there are fewer batches.
    """
    for number in range(consumed):
        if next(batches, _END) is _END:
            raise CheckpointError(
                f"the checkpoint was taken after {consumed} batches of an epoch, and the "
                f"dataloader gives only {number}: this is not the dataloader of that run"
            )
