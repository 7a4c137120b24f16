"""Whether anything is wrong on some rank: found in numbers that travel with the sums."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gradclip.clipping import flags
from gradclip.clipping.flags import Flag
from gradclip.clipping.kernels.device import copy_to_host
from gradclip.clipping.kernels.tables import Table
from gradclip.errors import RankError, ReplicaError, warn
from gradclip.record.ring import LAG, Ring

STATUS = 10
"""How many numbers: those of ``Status``, then the sum of powers of copies, and its square."""

_ALIKE = 1 + 1e-4
"""Sums of powers of copies may differ by one in a hundred: rounding does less, mistakes do more."""


@dataclass(frozen=True)
class Status:
    """What a rank says of itself at a step, as far as its host knows it.

    Args:
        failed: Whether something was raised here.
        unexpected_placement: Whether gradients have other placements than the ranks expected.
        rank: Which rank it is.
        step_tag: Where it stands, in words that are the same on all ranks.
        whole: A checksum, of 16 bits, of that and of which gradients there are that all ranks hold
            alike.
        split: The same of those that ranks hold parts of.
        missing: The names of those that there are not.
    """

    failed: bool
    unexpected_placement: bool
    rank: int
    step_tag: str
    whole: int
    split: int
    missing: list[str]

    @property
    def known(self) -> tuple[float, ...]:
        """The numbers that travel.

        With a checksum c goes its square. Over n ranks the sums are n c and n c^2 exactly if all
        have the same c: other checksums with the same sum have a larger sum of squares. Both are
        exact in float64, since c has 16 bits.
        """
        failed = float(self.failed)
        # The sum of the failed ranks' numbers, divided by how many failed, names one if it is one.
        return (
            1.0,
            failed,
            failed * self.rank,
            float(self.unexpected_placement),
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
    return Table.of(numbers, torch.float64)


class Verdict:
    """Reads what came of all tails: at once on the CPU, some steps later on an accelerator.

    Args:
        gather: Returns what every rank gave; all ranks ask at the same step.
    """

    def __init__(self, gather: Callable[[Any], list[Any]]) -> None:
        self._gather = gather
        self._warned = False
        self._late: Ring[Status] = Ring()
        self.unexpected_placement = False
        """Whether, as far as the host has read, ranks have to agree on placements anew."""

    def of(self, sums: Tensor, status: Status, error: Exception | None) -> Flag | None:
        """Return whether gradients may be stepped on, as far as other ranks know.

        Args:
            sums: What the ranks' numbers add up to, (10,).
            status: This rank's own.
            error: What happened on this rank.

        Returns:
            None if ranks have to agree on placements, and to begin this step again.
        """
        self.unexpected_placement = False
        if not flags.host_waits_for(sums.device):
            self._read(sums.tolist(), status, error)
            return None if self.unexpected_placement else True
        late = self._late.push(copy_to_host(sums), status)
        if error is not None:
            raise error
        if late is not None and not late[1].failed:  # of its own it was told at once
            self._read(*late, None)
        ranks, failed, _, unexpected_placement, whole, whole_2, _, _, alike, alike_2 = sums.unbind()
        differ = (whole != ranks * status.whole) | (whole_2 != ranks * status.whole**2)
        spread = alike_2 * ranks > alike * alike * _ALIKE
        return ~((failed > 0) | (unexpected_placement > 0) | differ | spread)

    def _read(self, sums: list[float], status: Status, error: Exception | None) -> None:
        (
            ranks,
            failed,
            rank,
            unexpected_placement,
            whole,
            whole_2,
            split,
            split_2,
            alike,
            alike_2,
        ) = sums
        if failed:
            self._tell(round(rank / failed), error)
        if unexpected_placement:
            self.unexpected_placement = True
            return
        if (whole, whole_2) != (ranks * status.whole, ranks * status.whole**2):
            self._tell_steps(status)
            raise ReplicaError(
                "some ranks have a gradient, and others have none, for parameters that every rank "
                f"holds whole:\n{self._missing(status)}\n  Their optimizers would part ways. Let "
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
        if (split, split_2) != (ranks * status.split, ranks * status.split**2) and not self._warned:
            self._warned = True
            warn(
                "some ranks have no gradient for parameters of which others have one; their parts "
                f"count as zero:\n{self._missing(status)}"
            )

    def _tell(self, rank: int, error: Exception | None) -> None:
        """Raise on every rank; on the CPU all know what happened, since all are here."""
        if error is None and self._is_late:
            raise RankError(
                f"rank {rank} raised {LAG} steps ago; its log says what. Steps were skipped since."
            )
        facts = self._gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        first = next(each for each in facts if each is not None)
        raise RankError(f"rank {rank} could not clip, so no rank did: {first}")

    def _tell_steps(self, status: Status) -> None:
        """Raise if ranks do not stand at the same step.

        Raises:
            ReplicaError: GC211.
        """
        facts = self._gather((status.rank, status.step_tag))
        first, expected = facts[0]
        for rank, step_tag in facts:
            if step_tag != expected:
                raise ReplicaError(
                    f"ranks {first} and {rank} do not clip the same step: rank {first} has "
                    f"{expected}, and rank {rank} {step_tag}. Load a state on every rank or on "
                    "none, and give all the same grad_scale. No gradient was changed."
                )

    @property
    def _is_late(self) -> bool:
        return self._late.used

    def _missing(self, status: Status) -> str:
        lists = self._gather((status.rank, status.missing))
        lines = [
            f"    rank {rank} has none for {', '.join(names[:_NAMED])}"
            + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
            for rank, names in lists
            if names
        ]
        return "\n".join(lines[:_NAMED])


_NAMED = 5
