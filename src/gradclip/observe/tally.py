"""What the steps of an optimizer came to, for what is said at the end of a run."""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from math import isfinite, nan
from typing import Any

import torch
from torch import Tensor

__all__ = ["Tally"]

_MOST = 100_000
"""Steps whose norms are kept, for advice: the last ones."""


class Tally:
    """Counts steps, and finds out where the norm is.

    Attributes:
        recorded: Steps that were measured or clipped.
        limited: Steps that had a limit, and a norm that is finite, as those of an advice are.
        clipped: Those of them at which gradients were made smaller, or where no limit is known.
        limits: The limits, and at how many steps each was in force.
        skips: How many steps were not made, by reason.
        spikes: Steps at which gradients were made smaller than a tenth.
        first_spike: The first of them.
        nonfinite: Steps with a NaN or an infinity.
        last: The last step that was measured or clipped.
        lost_at: The step that was made with one, after which every step has one; else None.
        first_nonfinite: The first of them, and the first parameters at fault.
        norms: The last steps, each with its norm, loss and learning rate.
        largest: The largest norm, its step, and the parameter with most of it.
        order: p of the norms.
    """

    def __init__(self) -> None:
        self.recorded = self.limited = self.clipped = self.spikes = self.nonfinite = 0
        self.limits: Counter[float] = Counter()
        self.skips: Counter[str] = Counter()
        self.first_spike: int | None = None
        self.first_nonfinite: tuple[int, list[str]] | None = None
        self.last: int | None = None
        self.lost_at: int | None = None
        self.norms: deque[tuple[int, float, float, float]] = deque(maxlen=_MOST)
        self.largest: tuple[float, int, str, float] | None = None
        self.order = 2.0
        self._names: Sequence[str] = ()
        self._shares: dict[str, float] = {}
        self._measured = 0

    def know(self, names: Sequence[str]) -> None:
        """Take the names of the parameters, in the order of norms."""
        self._names = names

    def add_norms(self, steps: Sequence[int], norms_BT: Tensor, order: float) -> None:
        """Take the norms of parameters at some steps, and p of them."""
        self.order = order
        norms_B = torch.linalg.vector_norm(norms_BT, order, dim=1)
        whole = norms_B.isfinite() & (norms_B > 0)
        if not bool(whole.any()):
            return
        shares_BT = (norms_BT[whole] / norms_B[whole, None]) ** order
        for name, share in zip(self._names, shares_BT.sum(0).tolist(), strict=True):
            self._shares[name] = self._shares.get(name, 0.0) + share
        self._measured += len(shares_BT)
        norm, at = norms_B[whole].max(0)
        if self.largest is None or float(norm) > self.largest[0]:
            share, place = shares_BT[at].max(0)
            step = [each for each, is_whole in zip(steps, whole.tolist(), strict=True) if is_whole]
            self.largest = float(norm), step[int(at)], self._names[int(place)], float(share)

    def add(self, entry: Mapping[str, Any], names: list[str], *, is_spike: bool) -> None:
        """Take what a step came to.

        Args:
            entry: As its line has it.
            names: Of parameters that were not finite.
            is_spike: Whether gradients were made much smaller.
        """
        step, norm, limit = entry["step"], entry["norm_pre"], entry["threshold"]
        is_known = norm is not None and isfinite(norm)
        has_limit = limit is not None and isfinite(limit)
        self.recorded, self.last = self.recorded + 1, step
        if has_limit:
            self.limited += is_known
            self.limits[limit] += 1
        self.clipped += entry["clipped"] and (is_known or not has_limit)
        if entry["skipped"]:
            self.skips[entry["reason"] or "nonfinite"] += 1
        if is_spike:
            self.spikes += 1
            self.first_spike = step if self.first_spike is None else self.first_spike
        if entry["nonfinite"]:
            self.nonfinite += 1
            self.first_nonfinite = self.first_nonfinite or (step, names)
            if self.lost_at is None and not entry["skipped"]:
                self.lost_at = step
        elif is_known:
            self.lost_at = None
        if norm is not None:
            others = (nan if entry[name] is None else entry[name] for name in ("loss", "lr"))
            self.norms.append((step, norm, *others))

    @property
    def parameters(self) -> int:
        """How many parameters are known by name."""
        return len(self._names)

    @property
    def heaviest(self) -> tuple[str, float] | None:
        """The parameter with most of the norm to the power of p, and its mean share of that."""
        if not self._shares:
            return None
        name = max(self._shares, key=self._shares.__getitem__)
        return name, self._shares[name] / self._measured
