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

from gradclip.clipping.apply.coefficients import Flag
from gradclip.clipping.collect.gradients import COARSE_GUARD, FINE_GUARD, Gradients
from gradclip.clipping.collect.shards import MisplacedGradientError, Placements, place
from gradclip.clipping.kernels.blocks import widened
from gradclip.clipping.measure.group import Group
from gradclip.clipping.measure.norm import Norm
from gradclip.clipping.policies import Policy
from gradclip.clipping.ranks import is_debugging
from gradclip.clipping.ranks.agreement import agree_on_misplaced
from gradclip.clipping.ranks.dimension import Dimension, gathered
from gradclip.clipping.ranks.pack import Pack, reduce_packs
from gradclip.clipping.ranks.replicas import compare_replicas
from gradclip.clipping.ranks.share import Share
from gradclip.clipping.ranks.topology import Topology
from gradclip.clipping.ranks.verdict import TAIL, Tail, Verdict
from gradclip.errors import CollectiveError

_Fact = TypeVar("_Fact")


@dataclass(frozen=True, eq=False)
class Member:
    """A group of parameters with one policy, whatever gradients there are.

    Args:
        pattern: Of the names.
        policy: What bounds it.
        share: What part of its scopes is here.
    """

    pattern: str
    policy: Policy
    share: Share

    @property
    def clamps(self) -> bool:
        """Whether elements are limited, so that norms do not tell what is left."""
        return self.policy.element_limit is not None and self.policy.writes


class Ranks:
    """The ranks that hold gradients together with this one.

    Args:
        topology: Over which dimensions, and who holds what.
        members: The groups that have a policy, in order.
        total_order: p of the norm of all groups together.
        doubles: Whether any rank has float64 parameters.
        singles: Whether any rank has others.
        home: Device of small results, the same at every step.
        replicas: The group of ranks that hold everything alike, if somebody told; else all do.
    """

    is_alone = False

    def __init__(
        self,
        topology: Topology,
        members: Sequence[Member],
        total_order: float,
        *,
        doubles: bool,
        singles: bool,
        home: torch.device,
        replicas: ProcessGroup | None,
    ) -> None:
        self.rank = dist.get_rank()
        self._topology = topology
        self._members = members
        self._home = home
        self._columns = 3 if doubles else 1
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
        shares = {member.pattern: member.share for member in members}
        self._shares = shares
        orders = [
            (member, order)
            for member in members
            for order in dict.fromkeys((member.policy.order, total_order))
        ]
        added = [(m.share, self._columns_of(order)) for m, order in orders]
        added += [(m.share, self._columns_of(m.policy.order)) for m in members if m.clamps]
        counts = sum(1 + m.share.is_apart + m.clamps for m in members)
        tail = TAIL + counts
        self._added = Pack(topology.dimensions, added, tail)
        scaled = [(m.share, 1) for m, order in orders if _reads_twice(order)]
        largest = [(m.share, 1) for m, order in orders if order == inf]
        self._scaled = Pack(topology.dimensions, scaled)
        self._largest = Pack(topology.dimensions, largest)

    def home(self, groups: Sequence[Group]) -> torch.device | None:  # noqa: ARG002 - never changes
        """Return where small results belong."""
        return self._home

    def share(self, pattern: str) -> Share | None:
        """Return what part of a group's scopes is here."""
        return self._shares[pattern]

    def precision(self, gradients: Gradients) -> tuple[torch.dtype, float]:  # noqa: ARG002 - agreed
        """Return the dtype of what is reported, and the margin for rounding, of all ranks."""
        return self._dtype, self._guard

    def compare(self, groups: Sequence[Group], states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Look for copies that differ, if the environment asks for it."""
        if self._compared:
            compare_replicas(groups, self._shares, self._compared, states)

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

    def maximise(self, groups: Sequence[Group]) -> None:
        """Replace maxima by those of all ranks, for those p that scale by them."""
        if not self._scaled.shapes:
            return
        norms = [norm for norm in self._norms(groups) if norm.reads_twice]
        known = [_known(norm) for norm in norms] if self._sound else None
        vector = self._scaled.join(known, self._home)
        _, largest = self._reduced(None, (self._scaled, vector))
        if self._sound:
            self._give_maxima(norms, self._scaled, largest)

    def combine(self, groups: Sequence[Group], moment: str) -> Flag | None:
        """Replace what this rank found by what all found, and see whether anything is wrong.

        Args:
            groups: What was read.
            moment: Where this rank stands, in words that are the same on all of them.

        Returns:
            Whether gradients may be stepped on; None if they have to be collected again, since some
            are placed otherwise than the ranks expected.

        Raises:
            Exception: What happened on this rank.
            RankError: GC210, on every other rank, naming it.
            ReplicaError: GC211, on every rank, if copies of a gradient differ.
            CollectiveError: GC212, if another rank is gone.
        """
        surprised = isinstance(self._error, MisplacedGradientError) and not self._must_agree
        tail = self._tail(groups if self._sound else [], moment, surprised=surprised)
        known, maxima = self._offer(groups, tail)
        added, largest = self._reduced((self._added, known), (self._largest, maxima))
        *tables, rest = self._added.part(added)
        error, self._error = self._error, None
        verdict = self._verdict.of(rest[:TAIL], tail, None if surprised else error)
        self._must_agree = self._verdict.surprised
        if error is None and verdict is not None:
            self._take(groups, tables, rest[TAIL:], largest)
        return verdict

    def _reduced(
        self, added: tuple[Pack, Tensor] | None, largest: tuple[Pack, Tensor]
    ) -> tuple[Tensor, Tensor]:
        try:
            return reduce_packs(self._topology.dimensions, added, largest)
        except CollectiveError as gone:
            error, self._error = self._error, None
            raise gone from error

    def _offer(self, groups: Sequence[Group], tail: Tail) -> tuple[Tensor, Tensor]:
        """Return what is to be added up, and what the largest is taken of: zeros after an error."""
        if not self._sound:
            rest = self._added.tail - len(tail.known)
            nothing = torch.zeros(rest, dtype=torch.float64, device=self._home)
            added = self._added.join(None, self._home, tail.on(self._home), nothing)
            return added, self._largest.join(None, self._home)
        norms = self._norms(groups)
        tables = [self._widened(norm) for norm in (*norms, *_lefts(groups))]
        # A NaN is not among the maxima, where it could be lost: the sums have it.
        maxima = [_known(norm) for norm in norms if norm.order == inf]
        return (
            self._added.join(tables, self._home, *self._values(tail, groups)),
            self._largest.join(maxima, self._home),
        )

    def _take(
        self,
        groups: Sequence[Group],
        tables: Sequence[Tensor],
        counts: Tensor,
        largest: Tensor,
    ) -> None:
        """Put what all ranks found in the place of what this one did."""
        norms = self._norms(groups)
        for norm, table in zip([*norms, *_lefts(groups)], tables, strict=True):
            norm.sums_SA = table
        self._give_maxima([n for n in norms if n.order == inf], self._largest, largest)
        found = iter(counts.unbind())
        for group in groups:
            group.found = next(found)
        for group in groups:
            if self._shares[group.pattern].is_apart:
                group.unbounded = next(found)
        for group in groups:
            if group.left is not None:
                group.changed = next(found)

    @property
    def _sound(self) -> bool:
        return self._error is None

    @staticmethod
    def _norms(groups: Sequence[Group]) -> list[Norm]:
        return [norm for group in groups for norm in group.norms]

    def _columns_of(self, order: float) -> int:
        return self._columns if order in {1.0, 2.0} else 1

    def _widened(self, norm: Norm) -> Tensor:
        """Return sums with the columns that all ranks have: (S, A)."""
        sums_SA, columns = norm.sums_SA, self._columns_of(norm.order)
        if sums_SA.shape[1] == columns:
            return sums_SA
        return widened(sums_SA, norm.order) if columns > 1 else sums_SA[:, :1]

    @staticmethod
    def _give_maxima(norms: Sequence[Norm], pack: Pack, vector: Tensor) -> None:
        *tables, _ = pack.part(vector)
        for norm, table in zip(norms, tables, strict=True):
            norm.maxima_S = table[:, 0]

    def _tail(self, groups: Sequence[Group], moment: str, *, surprised: bool) -> Tail:
        """Return what this rank says about itself, as far as the host knows it."""
        here = [self._shares[group.pattern].presence for group in groups]
        return Tail(
            failed=self._error is not None and not surprised,
            surprised=surprised,
            rank=self.rank,
            moment=moment,
            whole=_checksum([moment.encode(), *(each.whole for each in here)]),
            split=_checksum([each.split for each in here]),
            missing=[
                name
                for group, each in zip(groups, here, strict=True)
                for name in each.missing_of(group.gradients.group)
            ],
        )

    def _values(self, tail: Tail, groups: Sequence[Group]) -> list[Tensor]:
        """Return the tail as numbers, and behind it what was counted."""
        alike = torch.zeros((), dtype=torch.float64, device=self._home)
        for group in groups:
            share = self._shares[group.pattern]
            if share.has_alike:
                alike = alike + share.everywhere_alike(group.norm.rows_RA[:, 0])
        counts = [
            self._shares[group.pattern].count(~group.witness_T.isfinite()) for group in groups
        ]
        for group in groups:
            share = self._shares[group.pattern]
            if share.is_apart:
                bounds_infinities = group.policy.element_limit is not None
                witness_T = group.witness_T
                bad_T = witness_T.isnan() if bounds_infinities else ~witness_T.isfinite()
                counts.append(share.count(bad_T))
        counts += [group.changed for group in groups if group.changed is not None]
        return [tail.on(self._home), torch.stack([alike, alike * alike, *counts])]


def _lefts(groups: Sequence[Group]) -> list[Norm]:
    return [group.left for group in groups if group.left is not None]


def _known(norm: Norm) -> Tensor:
    """Return maxima without NaN: a maximum of ranks loses it, a sum does not."""
    maxima_S = norm.maxima_S
    assert maxima_S is not None
    return torch.where(maxima_S.isnan(), 0.0, maxima_S)[:, None]


def _reads_twice(order: float) -> bool:
    return order not in {1.0, 2.0, inf}


def _checksum(flags: Sequence[bytes]) -> int:
    """Return 16 bits: their square, summed over a million ranks, is exact in float64."""
    return zlib.crc32(b"".join(flags)) & 0xFFFF
