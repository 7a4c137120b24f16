"""Whether anything is wrong on some rank: found in numbers that travel with the sums."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gradclip.clipping.apply.coefficients import Flag, host_waits_for
from gradclip.clipping.kernels.device import callers_level
from gradclip.clipping.kernels.tables import Table
from gradclip.errors import RankError, ReplicaError
from gradclip.record.ring import LAG, Lagged

TAIL = 10
"""How many numbers: those of ``Tail``; of what ranks hold alike the sum of powers, squared too."""

_ALIKE = 1 + 1e-4
"""Sums of powers of copies may differ by one in a hundred: rounding does less, mistakes do more."""


@dataclass(frozen=True)
class Tail:
    """What a rank says of itself at a step, as far as its host knows it.

    Args:
        failed: Whether something was raised here.
        surprised: Whether gradients are placed otherwise than the ranks expected.
        rank: Which rank it is.
        moment: Where it stands, in words that are the same on all ranks.
        whole: A checksum, of 16 bits, of that and of which gradients there are that all ranks hold
            alike.
        split: The same of those that ranks hold parts of.
        missing: The names of those that there are not.
    """

    failed: bool
    surprised: bool
    rank: int
    moment: str
    whole: int
    split: int
    missing: list[str]

    @property
    def known(self) -> tuple[float, ...]:
        """The numbers; with a checksum its square, so that sums of both show a difference."""
        failed = float(self.failed)
        return (
            1.0,
            failed,
            failed * self.rank,
            float(self.surprised),
            float(self.whole),
            float(self.whole**2),
            float(self.split),
            float(self.split**2),
        )

    def on(self, device: torch.device) -> Tensor:
        """Return the numbers on a device; those of the last steps are there already."""
        return _table(self.known).on(device)


@lru_cache(maxsize=64)
def _table(numbers: tuple[float, ...]) -> Table:
    return Table(torch.tensor(numbers, dtype=torch.float64))


class Verdict:
    """Reads what came of all tails: at once on the CPU, some steps later on an accelerator.

    Args:
        gather: Returns what every rank gave; all ranks ask at the same step.
    """

    def __init__(self, gather: Callable[[Any], list[Any]]) -> None:
        self._gather = gather
        self._warned = False
        self._lagged: Lagged[Tail] = Lagged()
        self.surprised = False
        """Whether, as far as the host has read, ranks have to agree on placements anew."""

    def of(self, sums: Tensor, tail: Tail, error: Exception | None) -> Flag | None:
        """Return whether gradients may be stepped on, as far as other ranks know.

        Args:
            sums: What the ranks' numbers add up to, (10,).
            tail: This rank's own.
            error: What happened on this rank.

        Returns:
            None if ranks have to agree on placements, and to begin this step again.
        """
        self.surprised = False
        if not host_waits_for(sums.device):
            self._read(sums.tolist(), tail, error)
            return None if self.surprised else True
        late = self._lagged.push(sums, tail)
        if error is not None:
            raise error
        if late is not None and not late[1].failed:  # of its own it was told at once
            self._read(*late, None)
        ranks, failed, _, surprised, whole, whole_2, _, _, alike, alike_2 = sums.unbind()
        differ = (whole != ranks * tail.whole) | (whole_2 != ranks * tail.whole**2)
        spread = alike_2 * ranks > alike * alike * _ALIKE
        return ~((failed > 0) | (surprised > 0) | differ | spread)

    def _read(self, sums: list[float], tail: Tail, error: Exception | None) -> None:
        ranks, failed, rank, surprised, whole, whole_2, split, split_2, alike, alike_2 = sums
        if failed:
            self._tell(round(rank / failed), error)
        if surprised:
            self.surprised = True
            return
        if (whole, whole_2) != (ranks * tail.whole, ranks * tail.whole**2):
            self._tell_moments(tail)
            raise ReplicaError(
                "some ranks have a gradient, and others have none, for parameters that every rank "
                f"holds whole:\n{self._missing(tail)}\n  Their optimizers would part ways. Let "
                "every rank use them in the loss (times zero if need be) and reduce their "
                "gradients (DDP does), or declare what is different on purpose: partitioned="
                "{pattern: process group}. No gradient was changed."
            )
        if alike_2 * ranks > alike * alike * _ALIKE:
            raise ReplicaError(
                "gradients of parameters that every rank holds whole differ by rank (the sums of "
                f"their powers have mean {alike / ranks:.6g} and spread "
                f"{(max(alike_2 / ranks - (alike / ranks) ** 2, 0.0)) ** 0.5:.3g}): they were not "
                "reduced, and the optimizers of the ranks would part ways. Reduce them after "
                "backward() (DDP does), or declare what is different on purpose: partitioned="
                "{pattern: process group}. GRADCLIP_DEBUG=1 names the first that differs. No "
                "gradient was changed."
            )
        if (split, split_2) != (ranks * tail.split, ranks * tail.split**2) and not self._warned:
            self._warned = True
            warnings.warn(
                "some ranks have no gradient for parameters of which others have one; their parts "
                f"count as zero:\n{self._missing(tail)}",
                stacklevel=callers_level(),
            )

    def _tell(self, rank: int, error: Exception | None) -> None:
        """Raise on every rank; on the CPU all know what happened, since all are here."""
        if error is None and self._is_late:
            raise RankError(
                f"rank {rank} raised {LAG} steps ago; its log says what. Steps were skipped since."
            )
        said = self._gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        first = next(each for each in said if each is not None)
        raise RankError(f"rank {rank} could not clip, so no rank did: {first}")

    def _tell_moments(self, tail: Tail) -> None:
        """Raise if ranks do not stand at the same step.

        Raises:
            ReplicaError: GC211.
        """
        said = self._gather((tail.rank, tail.moment))
        first, expected = said[0]
        for rank, moment in said:
            if moment != expected:
                raise ReplicaError(
                    f"ranks {first} and {rank} do not clip the same step: rank {first} has "
                    f"{expected}, and rank {rank} {moment}. Load a state on every rank or on none, "
                    "and give all the same grad_scale. No gradient was changed."
                )

    @property
    def _is_late(self) -> bool:
        return self._lagged.used

    def _missing(self, tail: Tail) -> str:
        lists = self._gather((tail.rank, tail.missing))
        lines = [
            f"    rank {rank} has none for {', '.join(names[:_NAMED])}"
            + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
            for rank, names in lists
            if names
        ]
        return "\n".join(lines[:_NAMED])


_NAMED = 5
