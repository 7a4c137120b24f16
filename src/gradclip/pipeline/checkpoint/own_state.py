"""Dataloaders that know their place themselves, as torchdata's StatefulDataLoader does.

Accelerate's wrapper of such a loader is one batch ahead. It takes the loader's state before it
loads ahead, so its state is that of what it handed out, and the random state of that moment belongs
to it. Between epochs it does not know of a state that was loaded: the loader behind it does.
"""

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Self

import torch
from torch.utils.data import Sampler

from gradclip.errors import ArgumentValueError
from gradclip.pipeline.checkpoint.moment import Moment, parts
from gradclip.pipeline.checkpoint.rewound import pass_over
from gradclip.pipeline.checkpoint.rng import RandomState

__all__ = ["OwnState", "Place", "keeps_its_state"]


def keeps_its_state(loader: object) -> bool:
    """Whether a dataloader has a state of its own, be it behind Accelerate's wrapper."""
    # The wrapper has the methods whatever is behind it.
    return bool(getattr(loader, "use_stateful_dataloader", True)) and all(
        callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict")
    )


@dataclass(frozen=True)
class Place:
    """What a dataloader said of its place.

    Args:
        state: Its state.
        batches: How many batches of the epoch it had handed out.
        ended: Whether it knew that those were all.
        asked: The random state with which the next batch was loaded already; None if it was not, or
            if nobody asked for it.
    """

    state: Any
    batches: int
    ended: bool
    asked: RandomState | None

    def state_dict(self) -> dict[str, Any]:
        """Return it as numbers, strings and tensors.

        Raises:
            ArgumentValueError: GC010, the state could only be loaded by unpickling it.
        """
        written = io.BytesIO()
        torch.save(self.state, written)
        written.seek(0)
        try:
            torch.load(written, weights_only=True)
        except pickle.UnpicklingError as error:
            raise ArgumentValueError(
                "the state of the dataloader cannot be part of a checkpoint, which unpickles "
                "nothing: its state_dict(), with those of its dataset and sampler, may hold "
                f"numbers, strings, tensors, and lists and dictionaries of these.\n  {error}"
            ) from error
        asked = None if self.asked is None else self.asked.state_dict()
        return vars(self) | {"asked": asked}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """Make what ``state_dict`` returned."""
        asked = None if state["asked"] is None else RandomState.from_state_dict(state["asked"])
        return cls(state["state"], state["batches"], state["ended"], asked)


class OwnState:
    """Asks a dataloader where it is, and brings it back there.

    Args:
        loader: One that keeps its state.
        track: Whether it is due to be asked after the next batch; None if it is never asked, or
            where what is loaded ahead draws nothing from the generators of the process.
    """

    def __init__(self, loader: Any, track: Callable[[], bool] | None) -> None:
        self._loader = loader
        self._behind = getattr(loader, "base_dataloader", loader)
        self._track = track
        self._asked: RandomState | None = None
        for part in parts(loader).values():
            # No state tells what a sampler draws from the generator of the process.
            if isinstance(part, Sampler) and getattr(part, "generator", part) is None:
                seed = int(torch.empty((), dtype=torch.int64).random_())
                vars(part)["generator"] = torch.Generator().manual_seed(seed)
        if self._behind is not loader:
            # Accelerate calls it where it takes the state. Until 1.12 its own is wrong here: it
            # takes batches off that other processes were given.
            loader.adjust_state_dict_for_prefetch = self._note
            # It has begun the first epoch, and each is to begin when it is asked for.
            self._behind.load_state_dict(self._behind.state_dict())

    def _note(self) -> None:
        self._asked = None if self._track is None else RandomState.capture()

    def place(self, batches: int) -> Place:
        """Return where the loader is, after so many batches of the epoch."""
        if not batches:
            return Place(copy.deepcopy(self._behind.state_dict()), 0, ended=False, asked=None)
        ended = getattr(self._loader, "end_of_dataloader", False)
        return Place(copy.deepcopy(self._loader.state_dict()), batches, ended, self._asked)

    def place_before_next(self, batches: int) -> Place | None:
        """Return where the loader is before it loads a batch ahead, if that is wanted."""
        if self._track is None or not self._track():
            return None
        return replace(self.place(batches), asked=RandomState.capture())

    def go_to(self, place: Place) -> None:
        """Bring the loader back; random states are put in place after that."""
        self._loader.load_state_dict(copy.deepcopy(place.state))
        self._behind.state_dict()  # what it draws to begin there, it draws now

    def rest(self, place: Place, batches: int, start: Moment, stopped: Moment) -> Iterator[Any]:
        """Yield what is left of an epoch.

        Args:
            place: A place in it.
            batches: How many batches of it are done; what follows ``place`` is loaded, and dropped.
            start: The moment in which it began.
            stopped: The moment after those batches.
        """
        if place.batches:
            start.restore(self._loader)
            self.go_to(place)  # what is passed over may be drawn again
        else:
            self.go_to(place)  # what is passed over is the epoch before
            start.restore(self._loader)
        dropped = batches - place.batches
        if self._behind is self._loader:
            left = iter(self._loader)
            pass_over(left, dropped)
            ahead: list[Any] = []
            if place.asked is not None and not dropped:
                place.asked.restore()
                ahead = list(islice(left, 1))
            stopped.random.restore()
            yield from ahead
            yield from left
            return
        if not dropped:
            self._loader.base_dataloader = _Resumed(
                self._behind, place.asked, self._loader, stopped
            )
        try:
            left = iter(self._loader)
            pass_over(left, dropped)
            if dropped:
                stopped.restore(self._loader)
            yield from left
        finally:
            self._loader.base_dataloader = self._behind


class _Resumed:
    """A loader whose next batch was loaded before a run stopped, and is loaded now as it was then.

    Args:
        behind: The loader behind Accelerate's wrapper; whatever else is asked for is its own.
        asked: The random state that the batch was loaded with; None to leave it.
        loader: The wrapper.
        stopped: The moment to go on with.
    """

    def __init__(
        self, behind: Any, asked: RandomState | None, loader: Any, stopped: Moment
    ) -> None:
        self._behind = behind
        self._asked = asked
        self._loader = loader
        self._stopped = stopped

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._behind)
        if self._asked is not None:
            self._asked.restore()
        # A sampler may draw the order of the epoch with the first batch, so not before that.
        ahead = list(islice(batches, 1))
        self._stopped.restore(self._loader)
        yield from ahead
        yield from batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._behind, name)
