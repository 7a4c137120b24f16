"""Where a run is in its data, and how it comes back there: the same batches in the same order.

The order of an epoch follows from the random state at its start. Coming back restores that state,
lets the sampler pass over the batches that were consumed, without loading them, and then puts the
random state of the checkpoint in place. A dataloader that keeps a state of its own is brought back
by that state instead.

Accelerate's loader is one batch ahead: when batch n is asked for, batch n + 1 is loaded. A dataset
that draws from the process's own generators does so between the draws of the model. So the state
before the last batch was asked for is kept too, and each state is put in place just before the load
that followed it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from accelerate import PartialState
from accelerate.data_loader import (
    DataLoaderDispatcher,
    DataLoaderShard,
    SkipBatchSampler,
    skip_first_batches,
)
from torch.utils.data import DataLoader, IterableDataset

from gradclip.errors import ArgumentValueError, CheckpointError
from gradclip.pipeline.checkpoint.moment import Moment
from gradclip.pipeline.checkpoint.own_state import OwnState, Place, keeps_its_state
from gradclip.pipeline.checkpoint.rewound import Rewound, pass_over
from gradclip.pipeline.checkpoint.rng import RandomState

__all__ = ["DataPosition"]

_END = object()


class DataPosition:
    """Goes through a dataloader, an epoch at a time, and knows where it is.

    Args:
        dataloader: Anything that can be iterated once per epoch.
        track: Whether a checkpoint is due after the next batch. Where it is not, the run may end
            there all the same, if a hook or a signal asks for it: the random state before each
            batch is kept, and no copy of a loader's own state. None keeps neither.
        look_ahead: Whether to load a batch more than is handed out, so that the last one of an
            epoch is known. Accelerate's dataloaders do that themselves.
    """

    def __init__(
        self,
        dataloader: Iterable[Any],
        track: Callable[[], bool] | None = None,
        *,
        look_ahead: bool = False,
    ) -> None:
        self.dataloader = dataloader
        self.batches = 0
        """Batches of this epoch that were handed out; 0 between epochs."""
        self._finished = 0
        self._taken = 0
        self.is_last = False
        """Whether the batch in hand is known to be the last one of the epoch."""
        self._looks_ahead = look_ahead and not hasattr(dataloader, "end_of_dataloader")
        loads_here = not getattr(dataloader, "num_workers", 0)
        self._own: OwnState | None = None
        if keeps_its_state(dataloader):
            self._own = OwnState(dataloader, track if loads_here else None)
        self._keeps_asked = (
            track is not None and loads_here and self._own is None and _can_skip(dataloader)
        )
        self._active: Any = dataloader
        self._start: Moment | None = None
        self._place: Place | None = None
        self._earlier: Place | None = None
        self._before_next: Place | None = None
        self._asked: RandomState | None = None
        self._stopped: Moment | None = None

    def epoch(self) -> Iterator[Any]:
        """Yield the batches of this epoch that were not handed out yet.

        Raises:
            ArgumentValueError: GC010, batches of an iterator would have to come again.
            CheckpointError: The dataloader has fewer batches than the checkpoint says.
        """
        asked: RandomState | None = None
        if self._start is not None:
            stopped = self._stopped or Moment.capture(self.dataloader)
            # The state that the next batch was asked for with, in the run that is resumed.
            asked = stopped.random
            batches = self._rejoin(self._start, stopped)
            self._stopped = None
        else:
            self._start = Moment.capture(self.dataloader)
            self._place = self._ask()
            batches = self._iterate()
        if self._looks_ahead:
            batches = self._one_ahead(batches)
        while True:
            if asked is None and self._keeps_asked:
                asked = RandomState.capture()
            batch = next(batches, _END)
            if batch is _END:
                break
            self._asked, asked = asked, None
            self.batches += 1
            yield batch
            self.finish()
        self.batches = self._finished = self._taken = 0
        self.is_last = False
        self._start = self._asked = self._earlier = None

    def _iterate(self) -> Iterator[Any]:
        """Go through the dataloader; of an iterator, count what was taken: it is taken for good."""
        if not isinstance(self.dataloader, Iterator):
            return iter(self.dataloader)
        return self._counted(self.dataloader)

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._taken += 1
            yield batch

    def _one_ahead(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield each batch when the next one is loaded."""
        batch = next(batches, _END)
        while batch is not _END:
            own = self._own
            self._before_next = None if own is None else own.place_before_next(self.batches + 1)
            following = next(batches, _END)
            self.is_last = following is _END
            yield batch
            batch = following

    def finish(self) -> None:
        """Say that the batch in hand was trained on; asking for the next one says so too."""
        self._finished = self.batches

    def stop(self, window: int = 0) -> None:
        """Say that the run ends inside the epoch: what is drawn from now on is not its own.

        Args:
            window: How many of the last batches may still be given back.
        """
        self.finish()
        if self._place is None or self._place.batches <= self.batches - window:
            self._earlier = self._place
        self._place = self._ask()
        self._leave()

    def give_back(self, window: int = 0) -> bool:
        """Say that the run ends here; what was not finished comes again.

        Args:
            window: How many batches that were finished come again too.

        Returns:
            Whether any batch does.
        """
        if self._start is None:  # the epoch is at its end
            return False
        again = self.batches > self._finished - window
        self.batches = self._finished = self._finished - window
        if again:
            self._asked = None
        if self._place is not None and self._place.batches > self.batches:
            self._place = self._earlier
        self._leave()
        return again

    def _leave(self) -> None:
        self._stopped = Moment.capture(self.dataloader)
        # Accelerate counts a loader that is left before its end as active.
        if callable(end := getattr(self._active, "end", None)):
            end()

    def restore(self) -> None:
        """Put the random state of a checkpoint in place, if it was taken between epochs."""
        if self._stopped is not None and self._start is None:
            self._stopped.restore(self.dataloader)
            self._stopped = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position when the batch in hand is finished: numbers, strings, tensors.

        Raises:
            ArgumentValueError: GC010, the dataloader has a state of its own that holds more.
        """
        now = self._stopped or Moment.capture(self.dataloader)
        place = self._ask() if self._stopped is None else self._place
        return {
            "batches": self.batches,
            "batch_size": _batch_size(self.dataloader),
            "start": None if self._start is None else self._start.state_dict(),
            "asked": None if self._asked is None else self._asked.state_dict(),
            "now": now.state_dict(),
            "place": None if place is None else place.state_dict(),
            "earlier": None if self._earlier is None else self._earlier.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, keep_random: bool = False) -> None:
        """Go to where ``state_dict`` was called; the next ``epoch`` goes on there.

        Where the samples that were consumed then are no whole number of batches now, a few of them
        come again.

        Args:
            state: What it returned.
            keep_random: Whether to go on with the random state of now: for a process that was not
                there, so that no two have the same.

        Raises:
            CheckpointError: GC301, the dataloader keeps a state of its own, and that of the epoch
                that is under way did not, or the other way round.
        """
        self.batches = int(state["batches"])
        start, asked = state["start"], state["asked"]
        self._start = None if start is None else Moment.from_state_dict(start)
        self._asked = None if asked is None else RandomState.from_state_dict(asked)
        self._stopped = Moment.from_state_dict(state["now"])
        self._load_place(state.get("place"))
        earlier = state.get("earlier")
        self._earlier = None if earlier is None else Place.from_state_dict(earlier)
        if keep_random:
            self._stopped = replace(self._stopped, random=RandomState.capture())
            self._asked = None
        before, now = state.get("batch_size"), _batch_size(self.dataloader)
        if before and now and before != now:  # another number of processes, say
            self.batches = self.batches * before // now
            self._asked = None
        self.finish()

    def _ask(self) -> Place | None:
        if self._own is None:
            return None
        if self._looks_ahead and self.batches:
            # The loader itself is a batch ahead; an earlier place is one from which it is counted.
            return self._before_next or self._place
        return self._own.place(self.batches)

    def _load_place(self, place: Mapping[str, Any] | None) -> None:
        if self._start is not None and (place is None) != (self._own is None):
            raise CheckpointError(
                "the checkpoint was taken in the middle of an epoch. Either its dataloader kept a "
                "state of its own and this one does not, or the other way round, so the samples "
                "would come in another order. Resume with a dataloader of the same kind, or from "
                "the end of an epoch."
            )
        if self._own is not None and place is not None:
            self._place = Place.from_state_dict(place)
            if self._start is None:
                self._own.go_to(self._place)

    def _rejoin(self, start: Moment, stopped: Moment) -> Iterator[Any]:
        """Begin the epoch as it began, and yield what was not handed out."""
        if self._own is not None and self._place is not None:
            if not self._place.ended:
                yield from self._own.rest(self._place, self.batches, start, stopped)
                return
            # Accelerate's wrapper would begin the next epoch.
            start.restore(self.dataloader)
            self._own.go_to(self._place)
            stopped.restore(self.dataloader)
            self._active.iteration += 1
            return
        start.restore(self.dataloader)
        if _can_skip(self.dataloader):
            yield from self._pass_over(self.dataloader, stopped.random)
            return
        batches = self._iterate()
        if self._taken > self.batches:
            raise ArgumentValueError(
                f"the dataloader is an iterator, and the last {self._taken - self.batches} of the "
                "batches that were taken from it would have to come again, which it cannot give. "
                "Give a DataLoader, a list, or another object that can be iterated once per epoch."
            )
        pass_over(batches, self.batches - self._taken)
        # The order of the epoch may be drawn with its first batch.
        first = [] if self.batches else list(islice(batches, 1))
        stopped.random.restore()
        yield from first
        yield from batches

    def _pass_over(self, loader: Any, resumed: RandomState) -> Iterator[Any]:
        """Leave batches out at the sampler, so that they are not loaded."""
        # The second batch is loaded with the first, when the epoch begins, so there is no state
        # of its own to load it with: the first is loaded again, and dropped.
        skip, states = (
            (self.batches, (self._asked, resumed))
            if self.batches > 1
            else (0, (None, None, resumed))
        )
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(loader.iteration)
        rest: Any = skip_first_batches(loader, skip)
        if hasattr(loader, "iteration"):
            rest.iteration = loader.iteration  # Accelerate 1.10 would begin with epoch 0
        sampler: SkipBatchSampler = rest.batch_sampler
        sampler.batch_sampler = Rewound(sampler.batch_sampler, skip, states)
        sampler.skip_batches = 0
        self._active = rest
        batches = iter(rest)
        if self.batches == 1:
            next(batches, None)
        yield from batches
        self._active = loader
        if hasattr(loader, "iteration"):
            loader.iteration += 1


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
