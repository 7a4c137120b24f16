"""The folder of a record as it is written: one writer a process, whoever shares it.

Rank 0 writes ``run.json``, ``steps.jsonl`` and ``events.jsonl``. Each other rank that records
writes its own norms and events, and says in ``run.rank1.json`` what they are of. No rank asks
another one anything.
"""

import errno
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakValueDictionary

from gradclip import __version__
from gradclip.errors import ArgumentValueError, GradClipError, RecordError, warn
from gradclip.record.header import read_about
from gradclip.record.lines import (
    Lines,
    complete_lines,
    drop_lines,
    pack_segments,
    ranked,
    segments,
)
from gradclip.record.norms import MOST_EVENTS, NormRows, cut_rows, row_size
from gradclip.record.ring import READING
from gradclip.record.schema import FOLDER_SCHEMA, parsed, short_line
from gradclip.whole_file import write_whole

__all__ = ["Batch", "Layout", "Place", "Writer"]

_WAYS_OUT = (
    "Three ways out: give this run another folder, as each train() or fit() that begins anew "
    "needs; go on with that run, and load the state of the clipper before the first step "
    "(load_state_dict; of transformers train(resume_from_checkpoint=...), of Lightning "
    "fit(ckpt_path=...)), which keeps the steps before it; or delete the folder."
)
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


@dataclass(frozen=True)
class Place:
    """Which process writes.

    Args:
        rank: Its number.
        processes: How many there are.
    """

    rank: int = 0
    processes: int = 1


@dataclass(frozen=True)
class Layout:
    """What a row of norms has.

    Args:
        names: Of the parameters.
        sizes: How many elements of each are on this rank.
        orders: p of each norm.
        weights: How much of each parameter this rank answers for: less than 1 of a copy.
    """

    names: Sequence[str]
    sizes: Sequence[int]
    orders: Sequence[float]
    weights: Sequence[float]

    def entry(self) -> dict[str, Any]:
        """Return the same for JSON; what is the same for all is said once."""
        orders = [each if each < float("inf") else "inf" for each in self.orders]
        return {
            "dtype": "<f2",
            "holds": "log10 of each norm",
            "names": list(self.names),
            "sizes": list(self.sizes),
            "orders": orders[:1] if len(set(orders)) == 1 else orders,
            "weights": [1.0] if set(self.weights) <= {1.0} else list(self.weights),
        }


@dataclass
class Batch:
    """Some steps of one optimizer.

    Attributes:
        steps: What each came to.
        norms: The step, and the norms of its parameters.
        event_norms: The same of the steps that are kept whatever their number.
        events: What happened.
    """

    steps: list[dict[str, object]] = field(default_factory=list)
    norms: list[tuple[int, bytes]] = field(default_factory=list)
    event_norms: list[tuple[int, bytes]] = field(default_factory=list)
    events: list[dict[str, object]] = field(default_factory=list)


class Writer:
    """Writes a folder.

    Args:
        folder: Where.
    """

    _here: ClassVar[WeakValueDictionary[tuple[Path, int], "Writer"]] = WeakValueDictionary()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._place = Place()
        self._members: set[int] = set()
        self._known: dict[int, dict[str, Any]] = {}
        """What ``run.json`` says of each optimizer."""
        self._norms: dict[int, tuple[NormRows, NormRows]] = {}
        """The files of each optimizer that writes."""
        self._steps: Lines | None = None
        self._events: Lines | None = None
        self._kinds: dict[str, int] = {}
        self._is_open = self._is_broken = False

    @classmethod
    def of(cls, folder: Path) -> "Writer":
        """Return the one writer of a folder in this process."""
        with READING:
            key = folder.resolve(), os.getpid()
            writer = cls._here.get(key)
            if writer is None:
                cls._here[key] = writer = cls(folder)
            return writer

    def join(self) -> int:
        """Return the number of one more optimizer."""
        with READING:
            number = next(n for n in range(len(self._members) + 1) if n not in self._members)
            self._members.add(number)
            return number

    def begin(
        self, number: int, first: int, place: Place, about: Mapping[str, Any], *, resumes: bool
    ) -> None:
        """Begin to write the steps of an optimizer, or go on. Nothing is lost by an error.

        Args:
            number: Which optimizer.
            first: Its first step.
            place: Which process this is.
            about: What ``run.json`` says of it.
            resumes: Whether it goes on: what is there from this step on is dropped.

        Raises:
            RecordError: GC302, the folder cannot be written, or has the steps of another run.
            ArgumentValueError: GC010, it has something that is no record.
        """
        with READING:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                if not self._is_open:
                    self._place = place
                    self._known = self._read_known()
                if not resumes:
                    self._refuse_another_run(number)
                    if not self._is_open:
                        self._known = {}
                self._members.add(number)
                self._close_lines()
                self._drop(number, first)
                self._open_lines()
                self._known.setdefault(number, {"optimizer": number, "norms": []}).update(about)
                self._write_known()
            except (OSError, ValueError) as error:  # a pipe in the place of a file is the latter
                if isinstance(error, GradClipError):
                    raise
                raise RecordError(_cannot(self.folder, error)) from error
            self._is_open, self._is_broken = True, False

    def lay_out(self, number: int, layout: Layout, step: int) -> None:
        """Write rows of these norms from a step on.

        Args:
            number: Which optimizer.
            layout: What a row has.
            step: The first of them.
        """
        with READING, self._going_on(step):
            if self._is_broken:
                return
            for rows in self._norms.pop(number, ()):
                rows.close()
            parts, said = self._known[number]["norms"], layout.entry()
            if not parts or any(parts[-1].get(key) != value for key, value in said.items()):
                stem = f"norms-{number}" if number else "norms"
                stem += f"-part{len(parts)}" if parts else ""
                names = {"file": f"{stem}.f16", "events": f"{stem}-events.f16"}
                names = {key: ranked(name, self._place.rank) for key, name in names.items()}
                for name in names.values():  # of nothing that is known
                    if (self.folder / name).exists():
                        os.truncate(self.folder / name, 0)
                parts.append({**names, "every": 1, "first_step": step, **said})
            part, count = parts[-1], len(layout.names)
            self._norms[number] = (
                NormRows(self.folder / part["file"], count, every=part["every"], before=step),
                NormRows(self.folder / part["events"], count, thins=False, before=step),
            )
            self._write_known()

    def write(self, number: int, first: int, batch: Batch) -> None:
        """Append some steps of an optimizer; a disk that fails stops no training.

        Args:
            number: Which optimizer.
            first: The first of the steps.
            batch: What they came to.
        """
        with READING, self._going_on(first):
            if self._is_broken:
                return
            if self._steps is not None:
                at = {"optimizer": number} if number else {}
                self._steps.append([short_line({**step, **at}) for step in batch.steps])
            self._add_events(number, batch.events)
            if number in self._norms:
                rows, of_events = self._norms[number]
                of_events.append(batch.event_norms)
                if rows.append(batch.norms):
                    self._known[number]["norms"][-1]["every"] = rows.every
                    self._write_known()

    def leave(self, number: int) -> None:
        """Close the files of an optimizer, and those of the folder behind the last one."""
        with READING, suppress(OSError):
            self._members.discard(number)
            for rows in self._norms.pop(number, ()):
                rows.close()
            if not self._members:
                self._close_lines()
                self._is_open = False

    # opening

    def _read_known(self) -> dict[int, dict[str, Any]]:
        """Return what an earlier run said of each optimizer, by number."""
        path = self.folder / ranked("run.json", self._place.rank)
        if not path.exists():
            return {}
        try:
            entries = read_about(self.folder, self._place.rank)["optimizers"]
        except ArgumentValueError as error:
            raise RecordError(f"{error}\n  Nothing was changed. {_WAYS_OUT}") from None
        return {entry["optimizer"]: entry for entry in entries}

    def _refuse_another_run(self, number: int) -> None:
        """Refuse to write among the steps of another run.

        Raises:
            RecordError: GC302.
        """
        if self._is_open:
            found = number in self._known
        else:
            written = [self.folder / ranked("events.jsonl", self._place.rank)]
            written += segments(self.folder) if self._place.rank == 0 else []
            written += [
                self.folder / part["file"] for e in self._known.values() for part in e["norms"]
            ]
            found = any(path.exists() and path.stat().st_size for path in written)
        if found:
            raise RecordError(
                f"the folder {self.folder} has the steps of another run, and this run begins anew. "
                f"Nothing was changed. {_WAYS_OUT}"
            )

    def _drop(self, number: int, first: int) -> None:
        """Drop what an optimizer wrote of a step and of later ones."""

        def drops(entry: Mapping[str, Any]) -> bool:
            step = entry.get("step")
            return entry.get("optimizer", 0) == number and not (type(step) is int and step < first)

        if self._place.rank == 0:
            pack_segments(self.folder)
            newest_first = reversed(segments(self.folder))
            for at, path in enumerate(newest_first):
                if not drop_lines(path, drops) and at:  # those before it are older
                    break
        events = self.folder / ranked("events.jsonl", self._place.rank)
        if events.exists():
            drop_lines(events, drops)
        self._cut_norms(number, first)

    def _cut_norms(self, number: int, first: int) -> None:
        for rows in self._norms.pop(number, ()):
            rows.close()
        parts: list[dict[str, Any]] = self._known.get(number, {}).get("norms", [])
        while len(parts) > 1 and parts[-1]["first_step"] >= first:
            parts.pop()
        for part in parts:
            for path in (self.folder / part[key] for key in ("file", "events")):
                if path.exists():
                    cut_rows(path, row_size(len(part["names"])), first)

    def _open_lines(self) -> None:
        if self._place.rank == 0:
            self._steps = Lines(self.folder / "steps.jsonl", by_segment=True)
        self._events = Lines(self.folder / ranked("events.jsonl", self._place.rank))
        self._kinds = dict(Counter(_kinds(self._events.path)))

    def _close_lines(self) -> None:
        for lines in (self._steps, self._events):
            if lines is not None:
                lines.close()

    def _write_known(self) -> None:
        about = {"gradclip": __version__, "schema": FOLDER_SCHEMA}
        of_process = {"rank": self._place.rank, "world_size": self._place.processes}
        optimizers = [self._known[each] for each in sorted(self._known)]
        text = json.dumps({**about, **of_process, "optimizers": optimizers}, allow_nan=False)
        write_whole(self.folder / ranked("run.json", self._place.rank), text + "\n")

    # writing

    def _add_events(self, number: int, events: Sequence[Mapping[str, object]]) -> None:
        texts = []
        for event in events:
            kind = str(event["event"])
            count = self._kinds[kind] = self._kinds.get(kind, 0) + 1
            if count > MOST_EVENTS:
                continue
            entry = {**event, "optimizer": number, "rank": self._place.rank}
            if count == MOST_EVENTS:
                entry["last"] = True  # more of this kind are not written
            texts.append(short_line(entry))
        if self._events is not None:
            self._events.append(texts)

    @contextmanager
    def _going_on(self, step: int) -> Iterator[None]:
        """Warn where the disk fails, and write no more: a record stops no training."""
        try:
            yield
        except (OSError, ValueError) as error:
            self._is_broken = True
            warn(
                f"{_cannot(self.folder, error)} Lines are missing from step {step} on; training "
                "goes on without them."
            )


def _kinds(path: Path) -> Iterator[str]:
    """Yield what kind of event each line has."""
    for number, line in complete_lines(path):
        yield str(parsed(path, number, line).get("event"))


def _cannot(folder: Path, error: OSError | ValueError) -> str:
    found, number = getattr(error, "strerror", None) or error, getattr(error, "errno", None)
    way_out = "Make room there, or give" if number in _FULL else "Give"
    return f"the record {folder} cannot be written: {found}. {way_out} another folder."
