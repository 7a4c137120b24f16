"""Where a run is in its data, and how it comes back there: the same batches in the same order.

The order of an epoch follows from the random state at its start. Coming back restores that state,
lets the sampler pass over the batches that were consumed, without loading them, and then puts the
random state of the checkpoint in place.

Accelerate's loader is one batch ahead: when batch n is asked for, batch n + 1 is loaded. A dataset
that draws from the process's own generators does so between the draws of the model. So the state
before the last batch was asked for is kept too, and each state is put in place just before the load
that followed it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from accelerate import PartialState
from accelerate.data_loader import (
    DataLoaderDispatcher,
    DataLoaderShard,
    SkipBatchSampler,
    skip_first_batches,
)
from torch.utils.data import DataLoader, IterableDataset

from gradclip.errors import CheckpointError
from gradclip.pipeline.checkpoint.rng import RandomState

__all__ = ["DataPosition"]

_END = object()
_SEEDS = ("iteration", "initial_seed")
"""What Accelerate's loaders and samplers seed an epoch with."""


class DataPosition:
    """Goes through a dataloader, an epoch at a time, and knows where it is.

    Args:
        dataloader: Anything that can be iterated once per epoch.
        track: Whether a checkpoint may follow the next batch, so that the random state before it
            must be kept; None for never.
    """

    def __init__(self, dataloader: Iterable[Any], track: Callable[[], bool] | None = None) -> None:
        self.dataloader = dataloader
        self.batches = 0
        """Batches of this epoch that were handed out; 0 between epochs."""
        loads_here = _can_skip(dataloader) and not getattr(dataloader, "num_workers", 0)
        self._track = track if loads_here else None
        self._active: Any = dataloader
        self._start: _Moment | None = None
        self._asked: RandomState | None = None
        self._stopped: _Moment | None = None

    def epoch(self) -> Iterator[Any]:
        """Yield the batches of this epoch that were not handed out yet.

        Raises:
            CheckpointError: The dataloader has fewer batches than the checkpoint says.
        """
        asked: RandomState | None = None
        if self.batches:
            # The state that the next batch was asked for with, in the run that is resumed.
            asked = None if self._stopped is None else self._stopped.random
            batches = self._rejoin(asked)
            self._stopped = None
        else:
            self._start = _Moment.capture(self.dataloader)
            batches = iter(self.dataloader)
        while True:
            if asked is None and self._track is not None and self._track():
                asked = RandomState.capture()
            batch = next(batches, _END)
            if batch is _END:
                break
            self._asked, asked = asked, None
            self.batches += 1
            yield batch
        self.batches = 0
        self._start = self._asked = None

    def stop(self) -> None:
        """Say that the run ends inside the epoch: what is drawn from now on is not its own."""
        self._stopped = _Moment.capture(self.dataloader)
        # Accelerate counts a loader that is left before its end as active.
        if callable(end := getattr(self._active, "end", None)):
            end()

    def give_back(self) -> None:
        """Say that the batch in hand was not finished, and that the run ends there."""
        self.batches -= 1
        self.stop()

    def restore(self) -> None:
        """Put the random state of a checkpoint in place, if it was taken between epochs."""
        if self._stopped is not None and not self.batches:
            self._stopped.restore(self.dataloader)
            self._stopped = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position when the batch in hand is finished: numbers, strings, tensors."""
        now = self._stopped or _Moment.capture(self.dataloader)
        return {
            "batches": self.batches,
            "batch_size": _batch_size(self.dataloader),
            "start": None if self._start is None else self._start.state_dict(),
            "asked": None if self._asked is None else self._asked.state_dict(),
            "now": now.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, keep_random: bool = False) -> None:
        """Go to where ``state_dict`` was called; the next ``epoch`` goes on there.

        Where the samples that were consumed then are no whole number of batches now, a few of them
        come again.

        Args:
            state: What it returned.
            keep_random: Whether to go on with the random state of now: for a process that was not
                there, so that no two have the same.
        """
        self.batches = int(state["batches"])
        start, asked = state["start"], state["asked"]
        self._start = None if start is None else _Moment.from_state_dict(start)
        self._asked = None if asked is None else RandomState.from_state_dict(asked)
        self._stopped = _Moment.from_state_dict(state["now"])
        if keep_random:
            self._stopped = replace(self._stopped, random=RandomState.capture())
            self._asked = None
        before, now = state.get("batch_size"), _batch_size(self.dataloader)
        if before and now and before != now:  # another number of processes, say
            self.batches = self.batches * before // now
            self._asked = None

    def _rejoin(self, resumed: RandomState | None) -> Iterator[Any]:
        """Begin the epoch as it began, and yield what was not handed out."""
        assert self._start is not None
        self._start.restore(self.dataloader)
        if _can_skip(self.dataloader):
            yield from self._pass_over(self.dataloader, resumed)
            return
        batches = iter(self.dataloader)
        for number in range(self.batches):
            if next(batches, _END) is _END:
                raise _too_short(self.batches, number)
        if resumed is not None:
            resumed.restore()
        yield from batches

    def _pass_over(self, loader: Any, resumed: RandomState | None) -> Iterator[Any]:
        """Leave batches out at the sampler, so that they are not loaded."""
        # The second batch is loaded with the first, when the epoch begins, so there is no state
        # of its own to load it with: the first is loaded again, and dropped.
        drop_first = self.batches == 1
        skip, states = (
            (0, (None, None, resumed)) if drop_first else (self.batches, (self._asked, resumed))
        )
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(loader.iteration)
        rest: Any = skip_first_batches(loader, skip)
        sampler: SkipBatchSampler = rest.batch_sampler
        sampler.batch_sampler = _Rewound(sampler.batch_sampler, skip, states)
        sampler.skip_batches = 0
        self._active = rest
        batches = iter(rest)
        if drop_first:
            next(batches, None)
        yield from batches
        self._active = loader
        if hasattr(loader, "iteration"):
            loader.iteration += 1


class _Rewound:
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
        for number in range(self.skip):
            if next(batches, _END) is _END:
                raise _too_short(self.skip, number)
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


@dataclass(frozen=True)
class _Moment:
    """Everything that the order of the data follows from, at one moment."""

    random: RandomState
    loader: dict[str, Any]

    @classmethod
    def capture(cls, loader: object) -> Self:
        state: dict[str, Any] = {}
        for path, part in _parts(loader).items():
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                state[f"{path}.generator"] = generator.get_state()
            for name in _SEEDS:
                if isinstance(value := _own(part).get(name), int):
                    state[f"{path}.{name}"] = value
        return cls(RandomState.capture(), state)

    def restore(self, loader: object) -> None:
        for path, part in _parts(loader).items():
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator) and f"{path}.generator" in self.loader:
                generator.set_state(self.loader[f"{path}.generator"])
            for name in _SEEDS:
                if name in _own(part) and f"{path}.{name}" in self.loader:
                    setattr(part, name, self.loader[f"{path}.{name}"])
        self.random.restore()

    def state_dict(self) -> dict[str, Any]:
        return {"random": self.random.state_dict(), "loader": self.loader}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        return cls(RandomState.from_state_dict(state["random"]), dict(state["loader"]))


def _parts(loader: object) -> dict[str, Any]:
    """Return the loader and the samplers behind it, each once, by path."""
    parts: dict[str, Any] = {}
    waiting = [("loader", loader)]
    while waiting:
        path, part = waiting.pop()
        if not any(part is known for known in parts.values()):
            parts[path] = part
            waiting += [
                (f"{path}.{name}", behind)
                for name in ("batch_sampler", "sampler")
                if (behind := getattr(part, name, None)) is not None
            ]
    return parts


def _own(part: object) -> dict[str, Any]:
    return getattr(part, "__dict__", {})


def _can_skip(loader: object) -> bool:
    """Whether there is a sampler of batches to pass over, so that nothing need be loaded."""
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
    )


def _batch_size(loader: object) -> int | None:
    """Return how many samples all processes together take in a step, where that is known."""
    sampler = getattr(loader, "batch_sampler", None)
    known = isinstance(getattr(sampler, "batch_size", None), int)
    if not (known and isinstance(loader, DataLoaderShard | DataLoaderDispatcher)):
        return None
    if isinstance(loader, DataLoaderShard):
        size: int = loader.total_batch_size
        return size
    each: int = loader.batch_sampler.batch_size
    return each if loader.split_batches else each * PartialState().num_processes


def _too_short(consumed: int, found: int) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint was taken after {consumed} batches of an epoch, and the dataloader gives "
        f"only {found}: this is not the dataloader of that run"
    )
