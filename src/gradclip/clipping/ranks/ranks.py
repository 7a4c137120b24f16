"""Ranks that hold gradients together, and what they tell each other in one call of ``clip``.

Every rank issues the same collectives of the same sizes at every step, whatever gradients it has
and whatever goes wrong on it: for each dimension one sum, and one maximum where a norm needs it.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from gradclip.clipping.collect.gradients import COARSE_GUARD, FINE_GUARD, Gradients
from gradclip.clipping.collect.shards import MisplacedGradientError, Placements, place
from gradclip.clipping.flags import Flag
from gradclip.clipping.kernels.blocks import widened
from gradclip.clipping.ranks import is_debugging
from gradclip.clipping.ranks.agreement import agree_on_misplaced
from gradclip.clipping.ranks.dimension import Dimension, gathered
from gradclip.clipping.ranks.pack import Pack, reduce_packs
from gradclip.clipping.ranks.peers import GlobalSums, LocalSums, PatternShare, Rule
from gradclip.clipping.ranks.replicas import compare_replicas
from gradclip.clipping.ranks.share import Share
from gradclip.clipping.ranks.topology import Topology
from gradclip.clipping.ranks.verdict import STATUS, Status, Verdict
from gradclip.errors import CollectiveError

_Fact = TypeVar("_Fact")


@dataclass(frozen=True, eq=False)
class Member:
    """A pattern that has a policy, whatever gradients there are.

    Args:
        pattern: Of the names.
        rule: What its policy asks for.
        share: How its parameters are held.
        told: What the engine is told of that.
    """

    pattern: str
    rule: Rule
    share: Share
    told: PatternShare


@dataclass(frozen=True, eq=False)
class _Column:
    """One table of a pack: sums of one kind for the scopes of one pattern."""

    member: Member
    name: str
    share: Share
    order: float

    @property
    def reads_twice(self) -> bool:
        return self.order not in {1.0, 2.0, inf} and self.name != "left"


class Ranks:
    """The ranks that hold gradients together with this one.

    Args:
        topology: Over which dimensions, and who holds what.
        members: The patterns that have a policy, in order.
        total_order: p of the norm of all patterns together.
        doubles: Whether any rank has float64 parameters.
        singles: Whether any rank has others.
        result_device: Device of small results, the same at every step.
        replicas: The process group whose ranks hold everything alike, if it is known; else all.
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
        replicas: ProcessGroup | None,
    ) -> None:
        self.rank = dist.get_rank()
        self.result_device = result_device
        self._topology = topology
        self._members = {member.pattern: member for member in members}
        self._width = 3 if doubles else 1
        self._dtype = torch.float64 if doubles else torch.float32
        self._guard = COARSE_GUARD if singles else FINE_GUARD
        self._error: Exception | None = None
        self._compared: list[Dimension] = []
        if is_debugging():
            everyone = Dimension.of(replicas or dist.group.WORLD)  # type: ignore[arg-type]
            self._compared = topology.dimensions or [everyone]
        self._expected: dict[int, Placements] = {}
        self._must_agree = False
        self._verdict = Verdict(self.gather)
        self._columns = [c for member in members for c in _columns(member, total_order)]
        added = [(column.share, self._width_of(column.order)) for column in self._columns]
        counts = sum(1 + m.share.is_apart + m.rule.clamps for m in members)
        self._added = Pack(topology.dimensions, added, STATUS + counts)
        self._scaled = Pack(
            topology.dimensions, [(c.share, 1) for c in self._columns if c.reads_twice]
        )
        largest = [(column.share, 1) for column in self._columns if column.order == inf]
        self._largest = Pack(topology.dimensions, largest)

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
        states: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        """Look for copies that differ, if the environment asks for it."""
        if self._compared:
            shares = {pattern: member.share for pattern, member in self._members.items()}
            compare_replicas(gradients, norms, shares, self._compared, states)

    def gather(self, fact: _Fact) -> list[_Fact]:
        """Return what every rank gave, in the order of ranks; the host waits."""
        return list(gathered(self._topology.dimensions, {self.rank: fact}).values())

    def prepare(self, parameters: Callable[[], list[Tensor]]) -> None:
        """Bring gradients to the placements of their parameters: those of which ranks agreed."""
        if not (self._expected or self._must_agree):
            return
        known = parameters()
        if self._must_agree:
            self._expected |= agree_on_misplaced(self._topology.meshes, known)
        for number, placements in sorted(self._expected.items()):
            place(known[number], placements)

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """Keep the first error of this rank until the others know of it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it was, the others must not wait for it
            self._error = self._error or error

    def maximise(self, maxima: Sequence[Tensor]) -> list[Tensor]:
        """Return the maxima of all ranks, for those p that scale by them."""
        if not self._scaled.shapes:
            return list(maxima)
        known = [_without_nan(each) for each in maxima] if self._error is None else None
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
        unexpected = isinstance(self._error, MisplacedGradientError) and not self._must_agree
        sound = self._error is None
        status = self._status(found if sound else [], step_tag, unexpected_placement=unexpected)
        local, maxima = self._offer(found if sound else None, status)
        added, largest = self._reduced((self._added, local), (self._largest, maxima))
        *tables, rest = self._added.split(added)
        error, self._error = self._error, None
        verdict = self._verdict.of(rest[:STATUS], status, None if unexpected else error)
        self._must_agree = self._verdict.unexpected_placement
        if error is not None or verdict is None:
            return verdict, []
        return verdict, self._totals(found, tables, rest[STATUS:], largest)

    def _reduced(
        self, added: tuple[Pack, Tensor] | None, largest: tuple[Pack, Tensor]
    ) -> tuple[Tensor, Tensor]:
        try:
            return reduce_packs(self._topology.dimensions, added, largest)
        except CollectiveError as gone:
            error, self._error = self._error, None
            raise gone from error

    def _offer(self, found: Sequence[LocalSums] | None, status: Status) -> tuple[Tensor, Tensor]:
        """Return what is to be added up, and what the largest is taken of: zeros after an error."""
        device = self.result_device
        known = status.on(device)
        if found is None:
            rest = torch.zeros(self._added.tail - len(known), dtype=torch.float64, device=device)
            added = self._added.join(None, device, known, rest)
            return added, self._largest.join(None, device)
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
        added = self._added.join(tables, device, known, self._counts(found))
        return added, self._largest.join(maxima, device)

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

    def _status(
        self, found: Sequence[LocalSums], step_tag: str, *, unexpected_placement: bool
    ) -> Status:
        """Return what this rank says about itself, as far as the host knows it."""
        groups = [each.gradients.group for each in found]
        here = [
            self._members[group.pattern].share.presence(each.gradients.present)
            for group, each in zip(groups, found, strict=True)
        ]
        return Status(
            failed=self._error is not None and not unexpected_placement,
            unexpected_placement=unexpected_placement,
            rank=self.rank,
            step_tag=step_tag,
            whole=_checksum([step_tag.encode(), *(each.whole for each in here)]),
            split=_checksum([each.split for each in here]),
            missing=[
                name
                for group, each in zip(groups, here, strict=True)
                for name in each.missing_of(group)
            ],
        )

    def _counts(self, found: Sequence[LocalSums]) -> Tensor:
        """Return the sum over copies, its square, and what is counted of each pattern."""
        copies = torch.zeros((), dtype=torch.float64, device=self.result_device)
        counts: list[Tensor] = []
        for each in found:
            member = self._members[each.gradients.group.pattern]
            presence = member.share.presence(each.gradients.present)
            if (of_copies := presence.sum_of_copies(each.row_sums_RA[:, 0])) is not None:
                copies = copies + of_copies
            counts.append(presence.count(~each.tensor_sums_T.isfinite()))
            if member.share.is_apart:
                clamps = member.rule.clamps
                sums_T = each.tensor_sums_T
                counts.append(presence.count(sums_T.isnan() if clamps else ~sums_T.isfinite()))
            if member.rule.clamps:
                assert each.changed is not None
                counts.append(each.changed)
        return torch.stack([copies, copies * copies, *counts])


def _columns(member: Member, total_order: float) -> Iterator[_Column]:
    """Yield what is added up of a pattern, under the names that ``Found.sums`` has."""
    rule, share = member.rule, member.share
    yield _Column(member, "norm", share, rule.order)
    if total_order != rule.order:
        yield _Column(member, "total", share, total_order)
    if rule.needs_pattern_norm:
        yield _Column(member, "pattern_norm", share.as_group(), rule.order)
    if rule.weighs:
        yield _Column(member, "weights", share, rule.order)
    if rule.clamps:
        yield _Column(member, "left", share, rule.order)


def _without_nan(maxima_S: Tensor) -> Tensor:
    """Return maxima without NaN: a maximum over ranks loses it, a sum does not."""
    return torch.where(maxima_S.isnan(), 0.0, maxima_S)[:, None]


def _checksum(flags: Sequence[bytes]) -> int:
    """Return 16 bits: their square, summed over a million ranks, is exact in float64."""
    return zlib.crc32(b"".join(flags)) & 0xFFFF
