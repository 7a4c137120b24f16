"""The steps of one optimizer: kept where their numbers are, and written 64 at a time."""

import ctypes
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gradclip.observe.folder import rank_and_processes
from gradclip.observe.names import Names
from gradclip.observe.norms import copies_of, local
from gradclip.observe.step import Numbers, ObservedStep, clipping_of
from gradclip.observe.tally import Tally
from gradclip.record.writer import Batch, Layout, Place, Writer

__all__ = ["Track"]

_FIRST, _BATCH = 20, 64
"""Steps that are written together: at first, and from then on."""

_SPIKE = 0.1
"""A step is a spike where gradients were multiplied by less than this, as in other records."""

_NAMED = 8
"""How many parameters at fault an event names."""


class Track:
    """Records the steps of one optimizer.

    Args:
        folder: Where to.
        kind: What the optimizer is called.
        about: What ``run.json`` says of the run.

    Attributes:
        count: How many steps began.
        unmeasured: How many of them were left out, so that measuring takes little time.
        places: Which place each parameter has in a row of norms, by id.
        model: The class of the model that has the parameters.
        is_sharded: Whether other ranks have other parts of the parameters.
        last_ids: The parameters that had a gradient when that was last looked at, by id.
        tally: What the steps came to.
    """

    def __init__(self, folder: Path, kind: str, about: Mapping[str, Any]) -> None:
        self._writer = Writer.of(folder)
        self.number, self.kind, self.count = self._writer.join(), kind, 0
        self.unmeasured = 0
        self.model: str | None = None
        self.places: dict[int, int] = {}
        self.last_ids: tuple[int, ...] = ()
        self.tally = Tally()
        self.place = _place()
        self._rows: list[ObservedStep] = []
        self._size, self._last = _FIRST, 0.0
        self._limit: float | None = None
        self.is_sharded = False
        self._order = 2.0
        self._names: list[str] = []
        self._layout: Layout | None = None
        self._parts: tuple[list[int], list[float]] = [], []
        self._writer.begin(
            self.number,
            0,
            self.place,
            {"called": "gradclip run", "kind": kind, "torch": torch.__version__, **about},
            resumes=False,
        )

    def know(self, groups: Sequence[Mapping[str, Any]], ids: Sequence[int], names: Names) -> None:
        """Give each parameter a place, where any of those that have a gradient has none."""
        if all(map(self.places.__contains__, ids)):
            return
        self._flush()
        parameters = list({id(p): p for group in groups for p in group["params"]}.values())
        self.places = {id(each): at for at, each in enumerate(parameters)}
        self._names = names.of(parameters)
        parts = [local(each.detach()) for each in parameters]
        sizes = [0 if part is None else part.numel() for part in parts]
        processes = self.place.processes
        copies = [
            copies_of(each, processes, is_part=id(each) in names.parts) for each in parameters
        ]
        self._parts = sizes, [1 / each for each in copies]
        self.is_sharded = any(each != processes for each in copies)
        self.model = names.owners.get(next(iter(self.places), 0))
        self._layout = None
        self.tally.know(self._names)

    def add(self, step: ObservedStep) -> None:
        """Take a step that is over; nothing is read from a device now, but for each 64th."""
        self._rows.append(step)
        if len(self._rows) >= self._size:
            self._flush()
            self._size = _BATCH

    def thinned(self, every: int) -> None:
        """Record that each so manieth step is measured from now on."""
        batch = Batch(events=[{"event": "thinned", "step": self.count, "every": every}])
        self._writer.write(self.number, self.count, batch)

    def close(self) -> None:
        """Write what there is."""
        self._flush()
        self._writer.leave(self.number)

    def _flush(self) -> None:
        rows, self._rows = self._rows, []
        if not rows:
            return
        numbers = Numbers(rows)
        batch = Batch()
        norms = self._norms(rows, numbers, batch)
        logs = dict(batch.norms)
        for row in rows:
            if self._describe(row, numbers, norms.get(row.number), batch) and row.number in logs:
                batch.event_norms.append((row.number, logs[row.number]))
        self._writer.write(self.number, rows[0].number, batch)

    def _norms(
        self, rows: Sequence[ObservedStep], numbers: Numbers, batch: Batch
    ) -> dict[int, tuple[float, list[str]]]:
        """Return the norm of each measured step, and what of it is not finite; fill the batch."""
        measured = [row for row in rows if row.parts]
        if not measured or not self.places:
            return {}
        order = next((clip.order for row in measured for clip in row.clips), self._order)
        if self._layout is None or order != self._order:
            self._order, (sizes, weights) = order, self._parts
            self._layout = Layout(self._names, sizes, [order] * len(sizes), weights)
            self._writer.lay_out(self.number, self._layout, measured[0].number)
        norms_BT = torch.zeros(len(measured), len(self.places), dtype=torch.float64, device="cpu")
        for at, row in enumerate(measured):
            for ids, norms_T in row.parts:
                if ids == tuple(self.places):
                    norms_BT[at] = numbers[norms_T]
                else:
                    known = [n for n, each in enumerate(ids) if each in self.places]
                    places = [self.places[ids[n]] for n in known]
                    norms_BT[at, places] = numbers[norms_T][known]
            norms_BT[at] /= numbers.scale(row)
        logs_BT = norms_BT.log10().to(torch.float16)
        size = 2 * logs_BT.shape[1]
        data = ctypes.string_at(logs_BT.data_ptr(), size * len(measured))
        for at, row in enumerate(measured):
            batch.norms.append((row.number, data[at * size : (at + 1) * size]))
        self.tally.add_norms([row.number for row in measured], norms_BT, self._order)
        whole_B = torch.linalg.vector_norm(norms_BT, self._order, dim=1).tolist()
        found = {
            row.number: (whole, list[str]()) for row, whole in zip(measured, whole_B, strict=True)
        }
        for at, place in (~norms_BT.isfinite()).nonzero().tolist():
            found[measured[at].number][1].append(self._names[place])
        return found

    def _describe(
        self,
        row: ObservedStep,
        numbers: Numbers,
        measured: tuple[float, list[str]] | None,
        batch: Batch,
    ) -> bool:
        """Put what a step came to into the batch; return whether something happened at it."""
        norm, names = measured or (None, [])
        if self.is_sharded:
            norm = None  # it is that of a part
        entry = clipping_of(row, numbers, norm)
        reason, step = entry["reason"], row.number
        entry.update(step=step, loss=numbers.one(row.loss), lr=numbers.one(row.lr))
        entry["elapsed_ms"] = round(1e3 * (row.at - self._last), 3) if self._last else None
        self._last = row.at
        pre = entry["norm_pre"]
        if names or not entry["nonfinite"]:
            entry["nonfinite"] = len(names) or int(pre is not None and not isfinite(pre))
        coefficient = entry["coefficient"]
        is_spike = entry["clipped"] and coefficient is not None and 0 < coefficient < _SPIKE
        if entry["nonfinite"]:
            known = {"tensors": entry["nonfinite"], "parameters": names[:_NAMED]}
            batch.events.append({"event": "nonfinite", "step": step, **known})
        if self.place.rank == 0:
            if reason is not None:
                batch.events.append({"event": "skip", "step": step, "reason": reason})
            if is_spike:
                known = {name: entry[name] for name in ("norm_pre", "threshold", "coefficient")}
                batch.events.append({"event": "spike", "step": step, **known})
            limit = entry["threshold"]
            if limit is not None and self._limit not in (None, limit):
                batch.events.append({"event": "limit", "step": step, "threshold": limit})
            self._limit = self._limit if limit is None else limit
        batch.steps.append(entry)
        self.tally.add(entry, names, is_spike=is_spike)
        return bool(is_spike or reason is not None or entry["nonfinite"])


def _place() -> Place:
    """Return which process this is, without asking others."""
    if dist.is_available() and dist.is_initialized():
        return Place(dist.get_rank(), dist.get_world_size())
    return Place(*rank_and_processes())
