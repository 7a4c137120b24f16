"""Whether anything is wrong on some rank: found in numbers that travel with the sums."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradclip.clipping import flags
from gradclip.clipping.flags import Flag
from gradclip.clipping.kernels.device import copy_to_host
from gradclip.clipping.kernels.tables import Table
from gradclip.clipping.ranks.digest import NUMBERS, numbers
from gradclip.clipping.ranks.share import Copies
from gradclip.errors import RankError, ReplicaError, warn
from gradclip.record.ring import LAG, Ring

FAILURE = 2
"""How many numbers tell of an error: whether there was one, and on which rank."""

_FLAGS = FAILURE + 3
STATUS = _FLAGS + 3 * NUMBERS
"""How many numbers ``Status`` has."""

_WHOLE = slice(_FLAGS, _FLAGS + NUMBERS)
_POLICY = slice(_FLAGS + NUMBERS, _FLAGS + 2 * NUMBERS)
_SPLIT = slice(_FLAGS + 2 * NUMBERS, STATUS)
_ALIKE = slice(_WHOLE.start, _POLICY.stop)
"""What all ranks have to have alike."""

Gather: TypeAlias = Callable[[Callable[[], Any]], list[Any]]
"""Returns what every rank gave; all ranks ask at the same step."""


@dataclass(frozen=True)
class Status:
    """What a rank says of itself at a step, as far as its host knows it.

    Args:
        failed: Whether something was raised here.
        unexpected_placement: Whether gradients have other placements than the ranks expected.
        replaced: Whether parameters were replaced or added.
        rank: Which rank it is.
        step_tag: Where it stands, in words that are the same on all ranks.
        policies: What is done with gradients, likewise.
        whole: A digest of the tag and of which gradients there are that all ranks hold alike.
        policy: A digest of the policies.
        split: The same of those that ranks hold parts of.
        missing: The names of those that there are not.
        count: How many parameters it was given.
    """

    failed: bool
    unexpected_placement: bool
    replaced: bool
    rank: int
    step_tag: str
    policies: str
    whole: tuple[int, int, int]
    policy: tuple[int, int, int]
    split: tuple[int, int, int]
    missing: Sequence[str]
    count: int

    def known(self, *, warned: bool) -> tuple[float, ...]:
        """Return the numbers that travel.

        Args:
            warned: Whether this rank has warned of missing gradients before.
        """
        return (
            *failure(self.rank, failed=self.failed),
            float(self.unexpected_placement),
            float(self.replaced),
            float(not warned),
            *numbers(self.whole),
            *numbers(self.policy),
            *numbers(self.split),
        )


def failure(rank: int, *, failed: bool) -> tuple[float, float]:
    """Return the numbers that tell of an error.

    The sum of the failed ranks' numbers, divided by how many failed, names one if it is one.
    """
    return float(failed), float(failed) * rank


@lru_cache(maxsize=64)
def table_of(numbers: tuple[float, ...]) -> Table:
    """Return numbers as a table; those of the last steps are on their devices already."""
    return Table.of(numbers, torch.float64)


class Verdict:
    """Reads what came of all tails: at once on the CPU, some steps later on an accelerator.

    Args:
        gather: Asks all ranks.
        ranks: How many add up their numbers; one that is reached twice counts twice.
    """

    def __init__(self, gather: Gather, ranks: int) -> None:
        self._gather = gather
        self._ranks = ranks
        self._late: Ring[Status] = Ring()
        self._late_failures: Ring[bool] = Ring()
        self._unsaid: str | None = None
        self.warned = False
        """Whether this rank has warned of missing gradients."""
        self.unexpected_placement = False
        """Whether, as far as the host has read, ranks have to agree on placements anew."""
        self.replaced = False
        """Whether parameters were replaced on any rank, which is told on the CPU alone."""

    def of(
        self,
        sums: Tensor,
        differing: Tensor,
        status: Status,
        error: Exception | None,
        copies: Callable[[], Copies],
    ) -> Flag | None:
        """Return whether gradients may be stepped on, as far as other ranks know.

        Args:
            sums: What the ranks' numbers add up to, (STATUS,).
            differing: In how many places copies differ, of each dimension.
            status: This rank's own.
            error: What happened on this rank.
            copies: Gives what is in the copies of this rank.

        Returns:
            None if ranks have to agree anew, and to begin this step again.
        """
        self.unexpected_placement = self.replaced = False
        if not flags.host_waits_for(sums.device):
            self._read(sums.tolist(), sum(differing.tolist()), status, error, copies)
            return None if self.unexpected_placement or self.replaced else True
        late = self._late.push(copy_to_host(torch.cat([sums, differing])), status)
        if error is not None:
            raise error
        if late is not None and not late[1].failed:  # of its own it was told at once
            read, of_then = late
            self._read(read[:STATUS], sum(read[STATUS:]), of_then, None, None)
        alike = numbers((*status.whole, *status.policy), self._ranks)
        expected = table_of(tuple(alike)).on(sums.device)
        wrong = [sums[0] > 0, sums[FAILURE] > 0, (sums[_ALIKE] != expected).any()]
        return ~torch.stack([*wrong, (differing > 0).any()]).any()

    def say(self) -> None:
        """Warn of missing gradients, once: a warning may be an error, and ranks have agreed now."""
        unsaid, self._unsaid = self._unsaid, None
        if unsaid is not None:
            warn(unsaid)

    def of_failure(self, sums: Tensor, error: Exception | None) -> Flag:
        """Return whether no rank failed, for an exchange that tells of nothing else.

        Args:
            sums: What the ranks' numbers add up to, (FAILURE,).
            error: What happened on this rank.
        """
        if not flags.host_waits_for(sums.device):
            failed, rank = sums.tolist()
            if failed:
                self._tell(round(rank / failed), error, late=False)
            return True
        late = self._late_failures.push(copy_to_host(sums), error is not None)
        if error is not None:
            raise error
        if late is not None and not late[1] and late[0][0]:
            self._tell(round(late[0][1] / late[0][0]), None, late=True)
        return ~(sums[0] > 0)

    def _read(
        self,
        sums: Sequence[float],
        differing: float,
        status: Status,
        error: Exception | None,
        copies: Callable[[], Copies] | None,
    ) -> None:
        """Raise or warn, if anything is wrong.

        Ranks are asked for details at once or not at all, and only where all of them ask: what
        they ask by is the same everywhere. Some steps later nobody is asked.
        """
        failed, rank, unexpected_placement, replaced, unwarned = sums[:_FLAGS]
        if failed:
            self._tell(round(rank / failed), error, late=copies is None)
        if unexpected_placement or replaced:
            # Other parameters have other placements: those are looked at after that.
            self.replaced = bool(replaced)
            self.unexpected_placement = not replaced
            return
        if list(sums[_WHOLE]) != numbers(status.whole, self._ranks):
            if copies is not None:
                self._tell_steps(status)
            raise ReplicaError(
                "some ranks have a gradient, and others have none, for parameters that every rank "
                f"holds whole:\n{self._missing(status, late=copies is None)}\n  Their optimizers "
                "would part ways. Let every rank use them in the loss (times zero if need be) and "
                "reduce their gradients (DDP does), or declare what is different on purpose: "
                "partitioned={pattern: process group}. No gradient was changed."
            )
        if list(sums[_POLICY]) != numbers(status.policy, self._ranks):
            raise self._other_policies(status, late=copies is None)
        if differing:
            which = self._which(status, copies)
            raise ReplicaError(
                f"gradients that ranks should hold alike differ by rank{which}. They were not "
                "reduced, and the optimizers of the ranks would part ways. Reduce them after "
                "backward() (DDP does), or declare what is another parameter on each rank of a "
                "process group: partitioned={pattern: process group}. GRADCLIP_DEBUG=1 compares "
                "bit for bit. No gradient was changed."
            )
        if unwarned and list(sums[_SPLIT]) != numbers(status.split, self._ranks):
            missing = self._missing(status, late=copies is None)
            if not self.warned:
                self.warned = True
                self._unsaid = (
                    "some ranks have no gradient for parameters of which others have one; their "
                    f"parts count as zero:\n{missing}"
                )

    def _tell(self, rank: int, error: Exception | None, *, late: bool) -> None:
        """Raise on every rank; at once all know what happened, since all are here."""
        if late:
            raise RankError(
                f"rank {rank} raised {LAG} steps ago; its log says what. Steps were skipped since."
            )
        facts = self._gather(lambda: None if error is None else in_words(error))
        if error is not None:
            raise error
        first = next(each for each in facts if each is not None)
        raise RankError(f"rank {rank} could not clip, so no rank did: {first}")

    def _tell_steps(self, status: Status) -> None:
        """Raise if ranks do not stand at the same step.

        Raises:
            ReplicaError: GC211.
        """
        facts = self._gather(lambda: (status.rank, status.step_tag))
        first, expected = facts[0]
        for rank, step_tag in facts:
            if step_tag != expected:
                raise ReplicaError(
                    f"ranks {first} and {rank} do not clip the same step: rank {first} has "
                    f"{expected}, and rank {rank} {step_tag}. Load a state on every rank or on "
                    "none, give all the same grad_scale, and give a function the same parameters "
                    "on every rank, those without a gradient too. No gradient was changed."
                )

    def _other_policies(self, status: Status, *, late: bool) -> RankError:
        """Return the error of ranks that were not assigned the same policy."""
        facts = [] if late else self._gather(lambda: (status.rank, status.policies))
        others = [fact for fact in facts if fact[1] != facts[0][1]]
        when = f"did so {LAG} steps ago" if late else "do so at this step"
        left = "Steps were skipped since." if late else "No gradient was changed."
        told = "".join(f"\n  rank {rank} has {words}" for rank, words in facts[:1] + others[:1])
        return RankError(
            f"ranks should clip by the same policy, and {when} by different ones: another one was "
            "assigned on some of them alone. Assign it on every rank, between the same two steps. "
            f"{left}{told}"
        )

    def _missing(self, status: Status, *, late: bool) -> str:
        if late:
            lists = [(status.rank, status.missing, status.count)]
        else:
            lists = self._gather(lambda: (status.rank, status.missing, status.count))
        lines = [
            f"    rank {rank} has none for {_listed(names)}" for rank, names, _ in lists if names
        ]
        if len({count for _, _, count in lists}) > 1:
            lines += [f"    rank {rank} was given {count} parameters" for rank, _, count in lists]
        return "\n".join(lines[:_NAMED])

    def _which(self, status: Status, copies: Callable[[], Copies] | None) -> str:
        """Say which gradient differs most between ranks that should hold the same."""
        if copies is None:
            return ""
        seen: dict[Any, list[tuple[float, int]]] = {}
        told: list[tuple[int, Copies]] = self._gather(lambda: (status.rank, copies()))
        for rank, held in told:
            for key, value in held.items():
                seen.setdefault(key, []).append((value, rank))
        apart = {key: (min(values), max(values)) for key, values in seen.items()}
        name, position = max(apart, key=lambda key: apart[key][1][0] - apart[key][0][0])
        (one, first), (other, second) = sorted(apart[name, position], key=lambda pair: pair[1])
        return (
            f": the gradient of {name} differs between ranks {first} and {second}, whose sums of "
            f"powers are {one:.6g} and {other:.6g}"
        )


def in_words(error: Exception) -> str:
    """Return what other ranks are told of an error."""
    return f"{type(error).__name__}: {error}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


_NAMED = 5
