"""Ranks wait for each other before they first talk, since one of them may never come.

A collective would wait for it until the group's timeout. So who comes says so in the store that all
ranks share, and who fails before that leaves a note there. Each meeting of a group gets one
verdict, which its ranks have alike: they talk, or they do not, and why.

A note does not say for which groups it is: who leaves it knows none. So ranks count how often a
group did not meet since it met last: by notes of their own, and by meetings that they gave up. A
note counts for a group if the rank that left it has counted more than the one that reads it. What
fails after a group has met is no matter of that group's next meeting.

A rank that does not come may have begun the same clipper without the group: alone, or with other
ranks. So each rank says how many clippers it has begun, and what kind the last one is. Who has
waited for long gives up where a missing rank began as many as it did itself, and the last one is
alike.
"""

import time
import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from hashlib import blake2b
from typing import Any
from uuid import uuid4

import torch.distributed as dist

_PATIENCE = 20.0
"""Seconds after which ranks talk all the same: the process group knows who is gone."""

_SHORTEST, _LONGEST = 0.001, 0.25
_MET, _GIVEN_UP = "met", 1 << 40
_SHOWN = 16
_NOTES = "gradclip/notes"
_ALONE = (
    "clips parameters that it holds alone, so it takes part in nothing, and other "
    "ranks hold parameters together with it. Give every rank all parameters, those without a "
    "gradient too: they are skipped where they are."
)
_ELSEWHERE = (
    "clips over the process groups {groups}, and the others of {ranks} wait for it. "
    "Give every rank all parameters and the same process groups: all ranks that hold different "
    "parameters declare one group, partitioned={{pattern: process group}}."
)
_HEARD = (
    "heard that clipping could not begin on another rank, raised that, and did not try again. "
    "Where one rank goes on after such an error, all ranks have to."
)


class _World:
    """What this process knows of one store.

    Args:
        store: That all ranks share.
    """

    def __init__(self, store: Any) -> None:
        self.store = store
        self.noted = 0
        """How many clippers failed here before any other rank could hear of it."""
        self.given_up: Counter[tuple[int, ...]] = Counter()
        """How often this rank gave up to meet a group since it met last."""
        self.begun = 0
        """How many were begun here, with whomever."""
        self.has_met = False
        """Whether the ranks of the clipper that is made now have met."""
        self.met: Counter[tuple[int, ...]] = Counter()
        """How often the ranks of a group have met; the same on each of them."""
        self.left: dict[tuple[int, ...], str] = {}
        """Where they met last, in the store."""
        self.notes: dict[int, list[tuple[int, dict[str, int], str]]] = {}
        """By rank: what it had counted by then (of groups by their names), and what it says."""
        self._read = 0

    def announce(self, kind: str, groups: Iterable[tuple[int, ...]]) -> None:
        """Say that a clipper of a kind is begun here, and with whom."""
        self.begun += 1
        said = f"{self.begun} {_hashed(kind)} {', '.join(str(list(r[:_SHOWN])) for r in groups)}"
        self.store.set(f"gradclip/begun/{dist.get_rank()}", said)

    def read_notes(self) -> None:
        """Read what ranks have left since."""
        while self._read < self.store.add(_NOTES, 0):
            self._read += 1
            note = _text(self.store.get(f"{_NOTES}/{self._read}"))
            rank, noted, listed, words = note.split(" ", 3)
            pairs = [each.split(":") for each in listed.split(",") if each]
            given_up = {name: int(count) for name, count in pairs}
            self.notes.setdefault(int(rank), []).append((int(noted), given_up, words))


_WORLDS: dict[str, _World] = {}
"""By what a store is called, which is written in it: groups may be made anew on the same one."""

_NOW: "tuple[weakref.ref[Any], _World] | None" = None


def leave_note(error: Exception) -> None:
    """Tell the others that this rank failed, if they could not hear of it in a meeting."""
    world = _world()
    if world is None or world.has_met:
        return
    world.noted += 1
    world.begun += 1  # as the others, which come and hear of it
    given_up = ",".join(f"{_name(ranks)}:{count}" for ranks, count in world.given_up.items())
    words = f"{type(error).__name__}: {error}"
    number = world.store.add(_NOTES, 1)
    said = f"{dist.get_rank()} {world.noted} {given_up} {words}"
    world.store.set(f"{_NOTES}/{number}", said)


def pass_by(kind: str) -> None:
    """Tell the others that this rank made a clipper of parameters that it holds alone."""
    world = _world()
    if world is not None:
        world.announce(kind, ())


def meet(groups: Iterable[tuple[int, ...]], kind: str) -> dict[tuple[int, ...], str]:
    """Wait until the ranks of each group are here; return those that will not be, and why.

    Args:
        groups: The ranks of each.
        kind: What clipper it is, in words that are the same on all ranks.
    """
    world = _world()
    if world is None:
        return {}
    missed: dict[tuple[int, ...], str] = {}
    several = [ranks for ranks in groups if len(ranks) > 1]
    world.announce(kind, several)
    meetings = [_Meeting(world, ranks, _hashed(kind)) for ranks in several]
    started, pause = time.monotonic(), _SHORTEST
    while meetings:
        waited = time.monotonic() - started
        left = []
        for meeting in meetings:
            verdict = meeting.verdict(waited)
            if verdict is None:
                left.append(meeting)
            elif verdict != _MET:
                missed[meeting.ranks] = verdict
        meetings = left
        if meetings:
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST)
    world.has_met = True
    return missed


def begin() -> None:
    """Begin with a clipper: what fails now, other ranks have not heard in the meetings before."""
    if _NOW is not None:
        _NOW[1].has_met = False


class _Meeting:
    """One meeting of the ranks of a group, from the moment when this rank is there.

    Ranks that failed together try again together: they meet under another name then.

    Args:
        world: The store, and what is known of it.
        ranks: Who should come.
        kind: What clipper it is.
    """

    def __init__(self, world: _World, ranks: tuple[int, ...], kind: str) -> None:
        self.ranks = ranks
        self._world, self._store, self._kind = world, world.store, kind
        self._name = _name(ranks)
        self._group = f"gradclip/met/{self._name}"
        self._then = self._counts_of(dist.get_rank())
        own = str(dist.get_rank())
        while True:
            self._tries = world.noted - self._then[0] + world.given_up[ranks]
            self._here = self._place(self._tries)
            gone = _get(self._store, f"{self._here}/verdict").split(" ", 1)[0]
            if own not in gone.split(","):
                break
            world.given_up[ranks] += 1  # as the others, since this rank did not come
        if self._is_missing(dist.get_rank()):  # else it left this meeting by Ctrl-C
            self._store.set(f"{self._here}/{own}", "1")
            self._store.add(self._here, 1)

    def verdict(self, waited: float) -> str | None:
        """Return whether all ranks met, or why not; None if that is not known yet."""
        if self._store.add(self._here, 0) >= len(self.ranks):  # also where one rank gave up
            return self._close(_MET)
        self._world.read_notes()
        known = [
            (noted - then + given_up.get(self._name, 0), rank, words)
            for rank in self._world.notes.keys() & set(self.ranks)
            for then in self._counts_of(rank)[:1]
            for noted, given_up, words in self._world.notes[rank]
            if noted > then
        ]
        if later := [each for each in known if each[0] > self._tries]:
            _, rank, words = min(later)
            self._world.given_up[self.ranks] += 1
            return f"clipping could not begin on rank {rank}: {words}"
        if waited < _PATIENCE:
            return None
        missing = list(filter(self._is_missing, self.ranks))
        gone = {rank: words for rank in missing if (words := self._why_gone(rank))}
        if not gone:
            return self._close(_MET)
        self._store.add(self._here, _GIVEN_UP)
        return self._close(f"{','.join(map(str, gone))} {next(iter(gone.values()))}")

    def _why_gone(self, rank: int) -> str:
        """Return why a rank that is missing will not come; nothing where it may be slow."""
        if any(self._store.check([f"{self._place(n)}/{rank}"]) for n in range(self._tries)):
            return _HEARD
        said = _get(self._store, f"gradclip/begun/{rank}") or "0  "
        begun, kind, groups = said.split(" ", 2)
        since = int(begun) - self._counts_of(rank)[1]
        if kind != self._kind or since < self._world.begun - self._then[1]:
            return ""
        ranks = list(self.ranks[:_SHOWN])
        return _ELSEWHERE.format(groups=groups, ranks=ranks) if groups else _ALONE

    def _close(self, verdict: str) -> str:
        """Return the verdict that all have: the first one that a rank came to."""
        first = _text(self._store.compare_set(f"{self._here}/verdict", "", verdict))
        if first != _MET:
            self._world.given_up[self.ranks] += 1
            gone, words = first.split(" ", 1)
            return f"rank {gone.split(',')[0]} {words}"
        self._world.met[self.ranks] += 1
        self._world.given_up.pop(self.ranks, None)
        now = f"{self._world.noted} {self._world.begun}"
        self._store.set(f"{self._group}/then/{dist.get_rank()}", now)
        self._clear(self._world.left.pop(self.ranks, ""))
        self._world.left[self.ranks] = self._here
        return first

    def _clear(self, place: str) -> None:
        """Forget an earlier meeting: who comes to a later one has left it."""
        if not place:
            return
        with suppress(RuntimeError, NotImplementedError):  # not every store can
            self._store.delete_key(f"{place}/{dist.get_rank()}")
            if dist.get_rank() == self.ranks[0]:
                self._store.delete_key(place)
                self._store.delete_key(f"{place}/verdict")

    def _place(self, tries: int) -> str:
        return f"{self._group}/{self._world.met[self.ranks]}/{tries}"

    def _is_missing(self, rank: int) -> bool:
        return not self._store.check([f"{self._here}/{rank}"])

    def _counts_of(self, rank: int) -> list[int]:
        """Return what a rank had counted when this group met last: notes, clippers begun."""
        known = _get(self._store, f"{self._group}/then/{rank}")
        return [int(each) for each in known.split()] or [0, 0]


def _name(ranks: tuple[int, ...]) -> str:
    return _hashed(repr(ranks))


def _hashed(words: str) -> str:
    return blake2b(words.encode(), digest_size=8).hexdigest()


def _get(store: Any, key: str) -> str:
    """Return what a store has, or nothing; never wait for it."""
    return _text(store.get(key)) if store.check([key]) else ""


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _world() -> _World | None:
    """Return the store that all ranks share; None where there is none that counts."""
    global _NOW  # noqa: PLW0603 - the group that torch has is one for a process too
    group = dist.group.WORLD
    if _NOW is not None and _NOW[0]() is group:
        return _NOW[1]
    find = getattr(dist.distributed_c10d, "_get_default_store", None)
    store: Any = None if find is None else find()
    # torch's fake process group has a store without these.
    with suppress(AttributeError, RuntimeError, NotImplementedError):
        store.add(_NOTES, 0)
        name = _text(store.compare_set("gradclip/name", "", uuid4().hex))
        world = _WORLDS.setdefault(name, _World(store))
        world.store = store
        _NOW = weakref.ref(group), world
        return world
    return None
