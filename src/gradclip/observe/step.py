"""One step that was observed: what is still on a device of it, and what it came to."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, isnan
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradclip.observe.clips import Clip
from gradclip.observe.norms import host_numbers, local

if TYPE_CHECKING:
    from gradclip.observe.track import Track

__all__ = ["Numbers", "ObservedStep", "clipping_of"]

_EPSILON = 1e-6
"""What torch adds to the norm that it divides by."""

_LESS = 1 - 1e-5
"""Norms that differ by less than this are taken for the same."""


@dataclass(slots=True, eq=False)
class ObservedStep:
    """A step, as the host knows it, and numbers that are still on a device.

    Attributes:
        track: Of which optimizer.
        number: Which step.
        at: When it began.
        loss: What was minimised since the step before.
        left_out: Why it was not made; None where it was.
        lr: The learning rate.
        clips: What clipped its gradients.
        parts: Norms before clipping: of which parameters, and (T,).
        scale: What gradients are multiplied by: the optimizer divides.
        found_inf: Not 0 where the optimizer leaves the step out by itself.
    """

    track: "Track"
    number: int
    at: float
    loss: Tensor | None
    left_out: str | None
    lr: float | Tensor | None = None
    clips: list[Clip] = field(default_factory=list)
    parts: list[tuple[tuple[int, ...], Tensor]] = field(default_factory=list)
    scale: Tensor | None = None
    found_inf: Tensor | None = None

    @property
    def tells(self) -> bool:
        """Whether there is anything to say of it."""
        return bool(self.parts) or self.left_out is not None or any(c.tells for c in self.clips)


class Numbers:
    """The numbers of some steps, on the host: all are brought there together.

    Args:
        rows: The steps.
    """

    def __init__(self, rows: Sequence[ObservedStep]) -> None:
        tensors: dict[int, Tensor] = {}
        for row in rows:
            found: list[object] = [row.loss, row.lr, row.scale, row.found_inf]
            found += [norms_T for _, norms_T in row.parts]
            for clip in row.clips:
                found += [_whole(clip.total), clip.limit, clip.scale]
                found += [] if clip.left_T is None else [clip.left_T[1]]
            tensors.update((id(each), each) for each in found if isinstance(each, Tensor))
        self._found = dict(zip(tensors, host_numbers(list(tensors.values())), strict=True))
        self._kept = tensors  # so that no other tensor gets the address of one of them

    def __getitem__(self, tensor: Tensor) -> Tensor:
        """Return the numbers of a tensor, float64 (n,)."""
        return self._found[id(tensor)]

    def one(self, value: object) -> float | None:
        """Return a number that is a tensor of one, or no tensor; None where it is neither."""
        if isinstance(value, Tensor):
            found = self._found.get(id(value))
            return float(found[0]) if found is not None and len(found) == 1 else None
        return float(value) if isinstance(value, int | float) else None

    def scale(self, row: ObservedStep) -> float:
        """Return what the gradients of a step were still multiplied by, when it was measured."""
        scales = [row.scale, *(clip.scale for clip in row.clips)]
        known = (self.one(each) for each in scales)
        return next((each for each in known if each), 1.0)


def clipping_of(row: ObservedStep, numbers: Numbers, norm: float | None) -> dict[str, Any]:
    """Return what clipping did at a step, in the words of a record.

    Args:
        row: The step.
        numbers: On the host.
        norm: Of all gradients, before clipping; None where it was not measured.
    """
    entry: dict[str, Any] = dict.fromkeys(("norm_post", "threshold", "coefficient", "reason"))
    entry |= {"norm_pre": norm, "clipped": False, "skipped": False, "nonfinite": 0}
    results = [clip.result for clip in row.clips if clip.result is not None]
    limited = [clip for clip in row.clips if clip.limit is not None]
    clamped = [clip for clip in row.clips if clip.left_T is not None]
    if results:
        stats = results[0].to_host()
        names = ("norm_pre", "norm_post", "threshold", "coefficient", "clipped", "skipped")
        entry |= {name: getattr(stats, name) for name in (*names, "nonfinite")}
        entry["reason"] = stats.skip_reason
    elif limited:
        entry |= _limited(limited, numbers, norm)
    elif clamped and norm is not None:
        left = [numbers[clip.left_T[1]] for clip in clamped if clip.left_T is not None]
        entry["norm_post"] = float(torch.linalg.vector_norm(torch.cat(left)))
        entry["clipped"] = entry["norm_post"] < norm * _LESS
    if row.left_out is not None or (numbers.one(row.found_inf) or 0) > 0:
        entry["skipped"], entry["clipped"] = True, False
        entry["reason"] = entry["reason"] or row.left_out or "overflow"
    return entry


def _limited(clips: Sequence[Clip], numbers: Numbers, norm: float | None) -> dict[str, Any]:
    """Return what clips by norm did, of disjoint gradients."""
    order, found = clips[0].order, []
    for clip in clips:
        total = numbers.one(_whole(clip.total))
        if total is None and len(clips) == 1:
            total = norm
        limit = numbers.one(clip.limit)
        if total is None or limit is None:
            return {"threshold": limit} if len(clips) == 1 else {}
        total /= numbers.one(clip.scale) or 1.0
        coefficient = min(limit / (total + _EPSILON), 1.0) if limit < inf else 1.0
        found.append((coefficient, limit, total))
    smallest, threshold, _ = min(found, key=lambda each: -1 if isnan(each[0]) else each[0])
    return {
        "norm_pre": _norm([total for _, _, total in found], order),
        "norm_post": _norm([total * each for each, _, total in found], order),
        "threshold": threshold,
        "coefficient": smallest,
        "clipped": smallest < 1,
    }


def _norm(values: Sequence[float], order: float) -> float:
    if len(values) == 1:
        return values[0]
    return float(torch.linalg.vector_norm(torch.tensor(values, dtype=torch.float64), order))


def _whole(total: object) -> object:
    """Return a norm; None where this rank has only a part of it."""
    if not isinstance(total, Tensor) or local(total) is total:
        return total
    placements = getattr(total, "placements", None)
    is_whole = placements is not None and all(each.is_replicate() for each in placements)
    return local(total) if is_whole else None
