"""Ranks wait for each other before they first talk, since one that was given nothing never comes.

A rank without parameters knows no process group, so no collective reaches it. It leaves a note in
the store that all ranks share instead. Whoever waits for it finds the note, leaves one of its own
for those who wait for it in turn, and begins no collective that would never end.
"""

import time
from collections import Counter
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import torch.distributed as dist

from gradclip.errors import ArgumentValueError

_PATIENCE = 20.0
"""Seconds after which ranks talk all the same: the process group knows who is gone."""

_SHORTEST, _LONGEST = 0.001, 0.5
_NOTES = "gradclip/nothing"

_CALLS: Counter[str] = Counter()
"""Numbers of this process: of its roll call, of notes read, and of the roll call that failed."""

_MEETINGS: Counter[tuple[int, ...]] = Counter()
"""How often these ranks have met since then; the same on each of them."""

_NOTED: dict[int, tuple[int, int]] = {}
"""Who left a note: which rank has no parameters, and in which roll call that was."""


def leave_note() -> ArgumentValueError:
    """Tell the others that this rank was given no parameters; return what to raise."""
    _CALLS["own"] += 1
    return _leave_note(_store(), dist.get_rank(), _CALLS["own"])


def wait_for(groups: Iterable[tuple[int, ...]]) -> None:
    """Wait until the ranks of each group are here.

    Raises:
        ArgumentValueError: GC010, if one of them was given no parameters.
    """
    _CALLS["own"] += 1
    store = _store()
    for ranks in groups:
        if store is not None and len(ranks) > 1:
            _meet(store, ranks)


def _meet(store: Any, ranks: tuple[int, ...]) -> None:
    name = blake2b(repr(ranks).encode(), digest_size=8).hexdigest()
    here = f"gradclip/met/{name}/{_CALLS['failed']}/{_MEETINGS[ranks]}"
    store.add(here, 1)
    deadline, pause = time.monotonic() + _PATIENCE, _SHORTEST
    while True:
        complete = store.add(here, 0) >= len(ranks)
        # Also if all are here: who left a note since has not come to the groups that follow.
        _read_notes(store)
        for rank in ranks:
            without, call = _NOTED.get(rank, (-1, -1))
            if call >= _CALLS["own"]:
                raise _leave_note(store, without, call)
        if complete or time.monotonic() > deadline:
            break
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST)
    _MEETINGS[ranks] += 1


def _leave_note(store: Any, without: int, call: int) -> ArgumentValueError:
    """Leave a note, and begin to count anew, as all do that heard of this roll call."""
    if store is not None:
        store.set(f"{_NOTES}/{store.add(_NOTES, 1)}", f"{dist.get_rank()} {without} {call}")
    _CALLS["failed"] = call
    _MEETINGS.clear()
    return ArgumentValueError(
        f"rank {without} of {dist.get_world_size()} was given no parameters, so it takes part in "
        "nothing, and ranks that hold parameters together would wait for it. Give every rank all "
        "parameters, those without a gradient too: they are skipped where they are. A rank that "
        'has none of its own, such as a stage without weights, says so: partitioned={"*": group}. '
        "No gradient was changed."
    )


def _read_notes(store: Any) -> None:
    while _CALLS["read"] < store.add(_NOTES, 0):
        _CALLS["read"] += 1
        rank, without, call = map(int, store.get(f"{_NOTES}/{_CALLS['read']}").split())
        _NOTED[rank] = without, call


def _store() -> Any:
    """Return the store that all ranks share; None where there is none that counts."""
    find = getattr(dist.distributed_c10d, "_get_default_store", None)
    store: Any = None if find is None else find()
    try:
        store.add(_NOTES, 0)
    except (AttributeError, RuntimeError):  # such as that of torch's fake process group
        return None
    return store
