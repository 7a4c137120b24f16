"""Ranks that hold gradients together, and what they tell each other in one call of ``clip``.

Every rank issues the same collectives of the same sizes at every step, whatever gradients it has
and whatever goes wrong on it: for each dimension one sum, and one maximum where a norm needs it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf, prod
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradclip.clipping.collect.gradients import COARSE_GUARD, FINE_GUARD, Gradients
from gradclip.clipping.collect.shards import MisplacedGradientError, Placements, place
from gradclip.clipping.flags import Flag, host_waits_for
from gradclip.clipping.kernels.blocks import widened
from gradclip.clipping.ranks import is_debugging
from gradclip.clipping.ranks.agreement import agree_on_misplaced
from gradclip.clipping.ranks.columns import Member, columns_of
from gradclip.clipping.ranks.digest import digest
from gradclip.clipping.ranks.dimension import gathered
from gradclip.clipping.ranks.fsdp1 import require_root
from gradclip.clipping.ranks.pack import Pack, check_lengths, reduce_packs
from gradclip.clipping.ranks.peers import (
    GlobalSums,
    LocalSums,
    PatternShare,
    ReplacedError,
)
from gradclip.clipping.ranks.replicas import compare_replicas
from gradclip.clipping.ranks.share import Copies, Presence
from gradclip.clipping.ranks.topology import Topology
from gradclip.clipping.ranks.verdict import (
    FAILURE,
    STATUS,
    Status,
    Verdict,
    failure,
    in_words,
    table_of,
)
from gradclip.errors import CollectiveError, NonFiniteGradientError, RankError, ReplicaError

_Fact = TypeVar("_Fact")


class Ranks:
    """The ranks that hold gradients together with this one.

    Args:
        topology: Over which dimensions, and who holds what.
        members: The patterns that have a policy, in order.
        total_order: p of the norm of all patterns together.
        doubles: Whether any rank has float64 parameters.
        singles: Whether any rank has others.
        result_device: Device of small results, the same at every step.
        module: What has the parameters, if it is known.
        alike: What ranks have alike, in words: one that calls another clipper has other words.
        policies: What is done with gradients, in words; another policy may be assigned later.
        agreed: Whether they have compared it already, and everything else.
    """

    is_single = False

    def __init__(
        self,
        topology: Topology,
        members: Sequence[Member],
        total_order: float,
        *,
        doubles: bool,
        singles: bool,
        result_device: torch.device,
        module: nn.Module | None,
        alike: str,
        policies: str,
        agreed: bool,
    ) -> None:
        self.rank = dist.get_rank()
        self.result_device = result_device
        self._topology = topology
        self._members = {member.pattern: member for member in members}
        self._alike = alike
        # Without agreement this rank does not know what others have.
        self._width = 3 if doubles or not agreed else 1
        self._dtype = torch.float64 if doubles else torch.float32
        self._guard = COARSE_GUARD if singles else FINE_GUARD
        self._module = module
        self._error: Exception | None = None
        self._owed: Exception | None = None
        self._told: Exception | None = None
        self._compares = is_debugging()
        self._expected: dict[int, Placements] = {}
        self._must_agree = False
        self._count = prod(dimension.size for dimension in topology.dimensions)
        self._verdict = Verdict(self.gather, self._count)
        self._columns = [c for member in members for c in columns_of(member, total_order)]
        added = [(column.share, self._width_of(column.order)) for column in self._columns]
        counts = sum(1 + m.share.is_apart + m.rule.clamps for m in members)
        self._added = Pack(topology.dimensions, added, STATUS + counts, compares=True)
        self._scaled = Pack(
            topology.dimensions, [(c.share, 1) for c in self._columns if c.reads_twice]
        )
        largest = [(column.share, 1) for column in self._columns if column.order == inf]
        self._largest = Pack(topology.dimensions, largest)
        self._failures = Pack(topology.dimensions, [], FAILURE)
        self.assign(policies)

    def check_lengths(self) -> None:
        """Refuse scopes that do not match those of other ranks; all ranks ask at the same time.

        Only their number does not follow from what ranks have compared.
        """
        if any(member.share.is_apart for member in self._members.values()):
            packs = [self._added, self._scaled, self._largest]
            check_lengths(self._topology.dimensions, packs)

    @property
    def hear_first(self) -> bool:
        """Whether ranks tell each other first that parameters were replaced.

        On an accelerator the others would hear of it some steps late, and skip these.
        """
        return not host_waits_for(self.result_device)

    @property
    def look_again(self) -> bool:
        """Whether parameters were replaced on any rank."""
        return self._verdict.replaced

    def share(self, pattern: str) -> PatternShare | None:
        """Return how the parameters of a pattern are held."""
        return self._members[pattern].told

    def precision(self, gradients: Gradients) -> tuple[torch.dtype, float]:  # noqa: ARG002 - agreed
        """Return the dtype of what is reported, and the margin for rounding, of all ranks."""
        return self._dtype, self._guard

    def compare(
        self,
        gradients: Sequence[Gradients],
        norms: Sequence[Tensor],
        nonfinite: Sequence[Tensor | None],
        states: Mapping[str, Mapping[tuple[str, str], Tensor]],
    ) -> None:
        """Warn of what ``combine`` found; look for copies that differ, if the environment asks.

        What is not finite is no difference: no rank makes such a step.
        """
        self._verdict.say()
        if self._compares and not any(each is not None and bool(each) for each in nonfinite):
            shares = {pattern: member.share for pattern, member in self._members.items()}
            compare_replicas(gradients, norms, shares, self.gather, states)

    def gather(self, fact: Callable[[], _Fact]) -> list[_Fact]:
        """Return what every rank gave, in the order of ranks; the host waits.

        Args:
            fact: Gives it; what it raises here, the others are told.

        Raises:
            RankError: GC210, if another rank could not give it.
        """
        mine: _Fact | None = None
        error: Exception | None = None
        try:
            mine = fact()
        except Exception as raised:  # noqa: BLE001 - whatever it was, the others must not wait
            error = raised
        words = None if error is None else in_words(error)
        told = gathered(self._topology.dimensions, {self.rank: (words, mine)})
        if error is not None:
            self._told = error
            raise error
        for rank, (failed, _) in told.items():
            if failed is not None:
                raise RankError(f"rank {rank} could not clip, so no rank did: {failed}")
        return [each for _, each in told.values()]  # type: ignore[misc]  # None only after an error

    def begin(self) -> None:
        """Begin with what all ranks know, for a call that may be another one on other ranks.

        On an accelerator ranks agree on placements over several steps, so these are kept.
        """
        self._error = None
        if not host_waits_for(self.result_device):
            self._expected, self._must_agree = {}, False

    def check(self) -> None:
        """Refuse what shows only now that training has begun."""
        require_root(self._module)

    def prepare(self, parameters: Callable[[], list[Tensor]]) -> None:
        """Bring gradients to the placements of their parameters: those of which ranks agreed."""
        if not (self._expected or self._must_agree):
            return
        known = parameters()
        if self._must_agree:
            self._expected |= agree_on_misplaced(self._topology.dimensions, known)
        for number, placements in sorted(self._expected.items()):
            place(known[number], placements)

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """Keep the first error of this rank until the others know of it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it was, the others must not wait for it
            self._error = self._error or error

    @property
    def owes(self) -> bool:
        """Whether there is an error that the others hear at the next call."""
        return self._owed is not None

    @contextmanager
    def owing(self, step: int) -> Iterator[None]:
        """Keep an error of this rank for the next exchange: at this step the others go on."""
        try:
            yield
        except (NonFiniteGradientError, RankError, ReplicaError, CollectiveError):
            raise  # every rank has it
        except Exception as error:
            if error is self._told:
                raise
            self._owed = RankError(
                f"rank {self.rank} failed at step {step} after ranks had agreed on it "
                f"({in_words(error)}), so the others may have made that step, and it did not. Load "
                "a checkpoint on every rank, or begin anew: they are not alike any more."
            )
            raise

    def forget(self) -> None:
        """Forget what other ranks were to hear: a state is loaded."""
        self._owed = None

    def assign(self, policies: str) -> None:
        """Clip by other policies from now on, which are compared at each step."""
        self._policies = policies
        self._policy_digest = digest([policies.encode()], self._count)

    def maximise(self, maxima: Sequence[Tensor]) -> list[Tensor]:
        """Return the maxima of all ranks, for those p that scale by them."""
        if not self._scaled.shapes:
            return list(maxima)
        vector = self._scaled.nothing(self.result_device)
        with self.guarding():
            if self._error is None:
                known = [_without_nan(each) for each in maxima]
                vector = self._scaled.join(known, self.result_device)
        _, largest = self._reduced(None, (self._scaled, vector))
        *tables, _ = self._scaled.split(largest)
        return [table[:, 0] for table in tables]

    def combine(
        self, found: Sequence[LocalSums], step_tag: str
    ) -> tuple[Flag | None, list[GlobalSums]]:
        """Add up what all ranks found, and see whether anything is wrong.

        Args:
            found: What this rank found; ignored after an error.
            step_tag: At which step this rank stands, in words that are the same on all ranks.

        Returns:
            Whether gradients may be stepped on, and the sums. None if gradients have to be
            collected again, since some are placed otherwise than the ranks expected.

        Raises:
            Exception: What happened on this rank.
            RankError: GC210, on every other rank, naming it.
            ReplicaError: GC211, on every rank, if copies of a gradient differ.
            CollectiveError: GC212, if another rank is gone.
        """
        offer: tuple[Status, Tensor, Tensor] | None = None
        self._error = self._owed or self._error
        self._owed = self._told = None
        with self.guarding():
            if self._error is None:
                offer = self._offer(found, step_tag)
        unexpected = isinstance(self._error, MisplacedGradientError) and not self._must_agree
        replaced = isinstance(self._error, ReplacedError)
        if offer is None:
            offer = self._offer_nothing(
                step_tag, unexpected_placement=unexpected, replaced=replaced
            )
        status, local, maxima = offer
        added, largest = self._reduced((self._added, local), (self._largest, maxima))
        *tables, rest = self._added.split(added)
        error, self._error = self._error, None
        verdict = self._verdict.of(
            rest[:STATUS],
            self._added.differing(added),
            status,
            None if unexpected or replaced else error,
            lambda: self._copies(found),
        )
        self._must_agree = self._verdict.unexpected_placement
        if error is not None or verdict is None:
            return verdict, []
        return verdict, self._totals(found, tables, rest[STATUS:], largest)

    def confirm(self) -> Flag:
        """Tell whether anything failed since ``combine``, and hear it of the others."""
        device = self.result_device
        numbers = failure(self.rank, failed=self._error is not None)
        vector = table_of(numbers).on(device).clone()
        nothing = Pack(self._topology.dimensions, [])
        added, _ = self._reduced((self._failures, vector), (nothing, nothing.nothing(device)))
        error, self._error = self._error, None
        self._told = error
        return self._verdict.of_failure(added, error)

    def _reduced(
        self, added: tuple[Pack, Tensor] | None, largest: tuple[Pack, Tensor]
    ) -> tuple[Tensor, Tensor]:
        try:
            return reduce_packs(self._topology.dimensions, added, largest)
        except CollectiveError as gone:
            error, self._error = self._error, None
            raise gone from error

    def _offer(self, found: Sequence[LocalSums], step_tag: str) -> tuple[Status, Tensor, Tensor]:
        """Return what is to be added up, with what it says, and what the largest is taken of."""
        device = self.result_device
        status = self._status(found, step_tag)
        sums = {e.gradients.group.pattern: e for e in found}
        tables = [
            self._widened(sums[c.member.pattern].sums[c.name], c.order) for c in self._columns
        ]
        # A NaN is not among the maxima, where it could be lost: the sums have it.
        maxima = [
            _without_nan(sums[c.member.pattern].maxima[c.name])
            for c in self._columns
            if c.order == inf
        ]
        known, counts = self._known(status), self._counts(found)
        added = self._added.join(tables, device, known, counts, copies=self._sums_of_copies(found))
        return status, added, self._largest.join(maxima, device)

    def _offer_nothing(
        self, step_tag: str, *, unexpected_placement: bool, replaced: bool
    ) -> tuple[Status, Tensor, Tensor]:
        """Return the same of a rank at fault."""
        device = self.result_device
        status = Status(
            failed=not (unexpected_placement or replaced),
            unexpected_placement=unexpected_placement,
            replaced=replaced,
            rank=self.rank,
            step_tag=step_tag,
            policies=self._policies,
            whole=(0, 0, 0),
            policy=(0, 0, 0),
            split=(0, 0, 0),
            missing=(),
            count=0,
        )
        added = self._added.nothing(device, but=self._known(status))
        return status, added, self._largest.nothing(device)

    def _known(self, status: Status) -> Tensor:
        return table_of(status.known(warned=self._verdict.warned)).on(self.result_device)

    def _totals(
        self,
        found: Sequence[LocalSums],
        tables: Sequence[Tensor],
        counts: Tensor,
        largest: Tensor,
    ) -> list[GlobalSums]:
        """Sort what came back by pattern."""
        sums: dict[str, dict[str, Tensor]] = {pattern: {} for pattern in self._members}
        maxima: dict[str, dict[str, Tensor]] = {pattern: {} for pattern in self._members}
        for column, table in zip(self._columns, tables, strict=True):
            sums[column.member.pattern][column.name] = table
        of_inf = [column for column in self._columns if column.order == inf]
        for column, table in zip(of_inf, self._largest.split(largest)[:-1], strict=True):
            maxima[column.member.pattern][column.name] = table[:, 0]
        counted = iter(counts.unbind())
        totals = []
        for each in found:
            pattern = each.gradients.group.pattern
            member = self._members[pattern]
            totals.append(
                GlobalSums(
                    sums[pattern],
                    maxima[pattern],
                    nonfinite=next(counted),
                    unbounded=next(counted) if member.share.is_apart else None,
                    changed=next(counted) if member.rule.clamps else None,
                )
            )
        return totals

    def _width_of(self, order: float) -> int:
        return self._width if order in {1.0, 2.0} else 1

    def _widened(self, sums_SA: Tensor, order: float) -> Tensor:
        """Return sums with the columns that all ranks have: (S, A)."""
        width = self._width_of(order)
        if sums_SA.shape[1] == width:
            return sums_SA
        return widened(sums_SA, order) if width > 1 else sums_SA[:, :1]

    def _status(self, found: Sequence[LocalSums], step_tag: str) -> Status:
        """Return what this rank says about itself, as far as the host knows it."""
        groups = [each.gradients.group for each in found]
        here = self._presences(found)
        step_tag = ", ".join(filter(None, [step_tag, self._alike]))
        return Status(
            failed=False,
            unexpected_placement=False,
            replaced=False,
            rank=self.rank,
            step_tag=step_tag,
            policies=self._policies,
            whole=digest([step_tag.encode(), *(each.whole for each in here)], self._count),
            policy=self._policy_digest,
            split=digest([each.split for each in here], self._count),
            missing=[
                name
                for group, each in zip(groups, here, strict=True)
                for name in each.missing_of(group)
            ],
            count=sum(len(group.parameters) for group in groups),
        )

    def _presences(self, found: Sequence[LocalSums]) -> list[Presence]:
        return [
            self._members[each.gradients.group.pattern].share.presence(each.gradients.present)
            for each in found
        ]

    def _sums_of_copies(self, found: Sequence[LocalSums]) -> Tensor | None:
        """Add up, for each dimension, what all its ranks should hold alike; None for nothing."""
        sums: Tensor | None = None
        for presence, each in zip(self._presences(found), found, strict=True):
            copies = presence.sums_of_copies(each.row_sums_RA[:, 0])
            if copies is not None:
                if sums is None:
                    dimensions = len(self._topology.dimensions)
                    sums = torch.zeros(dimensions, dtype=torch.float64, device=self.result_device)
                sums[: len(copies)] += copies
        return sums

    def _copies(self, found: Sequence[LocalSums]) -> Copies:
        """Return the sums over everything of which other ranks have copies."""
        copies: Copies = {}
        for presence, each in zip(self._presences(found), found, strict=True):
            names = each.gradients.group.names
            copies |= presence.copies(names, each.row_sums_RA[:, 0].tolist())
        return copies

    def _counts(self, found: Sequence[LocalSums]) -> Tensor:
        """Return what is counted of each pattern."""
        counts: list[Tensor] = []
        for presence, each in zip(self._presences(found), found, strict=True):
            member, sums_T = self._members[each.gradients.group.pattern], each.tensor_sums_T
            clamps = member.rule.clamps
            if sums_T is None:
                nothing = table_of((0.0,)).on(self.result_device)[0]
                counts += [nothing] * (1 + member.share.is_apart)
            else:
                counts.append(presence.count(~sums_T.isfinite()))
                if member.share.is_apart:
                    counts.append(presence.count(sums_T.isnan() if clamps else ~sums_T.isfinite()))
            if clamps:
                assert each.changed is not None
                counts.append(each.changed)
        return torch.stack(counts)


def _without_nan(maxima_S: Tensor) -> Tensor:
    """Return maxima without NaN: a maximum over ranks loses it, a sum does not."""
    return torch.where(maxima_S.isnan(), 0.0, maxima_S)[:, None]
