"""The process groups that a number has to be reduced over, one after the other."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from gradclip.errors import ArgumentTypeError, CollectiveError

GroupLike: TypeAlias = "ProcessGroup | DeviceMesh | Iterable[ProcessGroup | DeviceMesh] | None"
"""What names process groups: a group, a mesh (each of its dimensions), or several of these.

None, or torch's ``GroupMember.NON_GROUP_MEMBER``, says that this rank is in none.
"""

_Fact = TypeVar("_Fact")


@dataclass(frozen=True, eq=False)
class Dimension:
    """A process group, seen from a rank in it: what is split over it is summed over it.

    Args:
        ranks: The global ranks of its members, sorted.
        group: The group.
    """

    ranks: tuple[int, ...]
    group: ProcessGroup

    @classmethod
    def of(cls, group: ProcessGroup) -> "Dimension":
        """Describe a group that this process is in."""
        return cls(tuple(sorted(dist.get_process_group_ranks(group))), group)

    @classmethod
    def among(cls, ranks: list[int], groups: int) -> "Dimension":
        """Make a group of these ranks; each of them asks, and no other has to.

        Args:
            ranks: Sorted.
            groups: The largest of what ``groups_here`` returns on them.
        """
        world = dist.group.WORLD
        assert world is not None
        if len(ranks) == dist.get_world_size():
            return cls(tuple(ranks), world)
        # torch names the new group by how many groups a rank is in, and ranks meet by that name.
        alone, timeout = [dist.get_rank()], _timeout(world)
        padding = [
            dist.new_group(alone, timeout, use_local_synchronization=True)
            for _ in range(groups - groups_here())
        ]
        group = dist.new_group(ranks, timeout, use_local_synchronization=True)
        for each in padding:
            dist.destroy_process_group(each)
        return cls(tuple(ranks), group)

    @property
    def size(self) -> int:
        """How many ranks it has."""
        return len(self.ranks)

    def device(self, result_device: torch.device) -> torch.device:
        """Return where its collectives run: with the results if it can, else on its mesh."""
        types = [device.type for device in self.group._device_types]  # noqa: SLF001 - nothing else tells
        if result_device.type in types or not types:
            return result_device
        kind = next((each for each in types if each != "cpu"), types[0])
        if kind == "cpu":
            return torch.device("cpu")
        return torch.device(kind, torch.get_device_module(kind).current_device())

    def all_reduce(self, values: torch.Tensor, operation: Any) -> "dist.Work | None":
        """Begin to reduce values in place; they must be where ``device`` says."""
        try:
            work: dist.Work | None = dist.all_reduce(
                values, operation, group=self.group, async_op=True
            )
        except RuntimeError as error:
            raise self._broken(error) from error
        return work

    def wait(self, work: "dist.Work | None") -> None:
        """Wait for a collective: on an accelerator, make its stream wait, and not the host."""
        try:
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise self._broken(error) from error

    def gather(self, fact: _Fact) -> list[_Fact]:
        """Return what each rank gave; the host waits."""
        facts: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(facts, fact, group=self.group)
        except RuntimeError as error:
            raise self._broken(error) from error
        return facts

    def _broken(self, error: Exception) -> CollectiveError:
        ranks = list(self.ranks) if self.size <= _SHOWN else f"{self.size} ranks"
        return CollectiveError(
            f"rank {dist.get_rank()}: a collective of gradient clipping over {ranks} failed, so no "
            "gradient was changed at this step. Another rank died, does not clip at this step, or "
            "was slower than the group's timeout; look for the first error among their logs.\n"
            f"  torch says: {' '.join(str(error).split())[:400]}"
        )


_SHOWN = 16


def groups_here() -> int:
    """Return how many process groups this rank is in, as torch counts them."""
    return len(dist.distributed_c10d._world.pg_names)  # noqa: SLF001 - nothing else tells


def _timeout(group: ProcessGroup) -> timedelta | None:
    """Return how long collectives of a group wait for a rank; None if it does not tell."""
    for device in group._device_types:  # noqa: SLF001 - nothing else tells
        options = getattr(group._get_backend(device), "options", None)  # noqa: SLF001
        if (timeout := getattr(options, "_timeout", None)) is not None:
            return timeout  # type: ignore[no-any-return]
    return None


def gathered(dimensions: Iterable[Dimension], known: dict[int, _Fact]) -> dict[int, _Fact]:
    """Return what every rank knew that can be reached over some dimensions, by global rank."""
    known = dict(known)
    for dimension in dimensions:
        for others in dimension.gather(known):
            known.update(others)
    return dict(sorted(known.items()))


def as_groups(value: object, name: str) -> list[ProcessGroup]:
    """Turn what names process groups into those that this rank is in.

    Raises:
        ArgumentTypeError: GC011, for anything else.
    """
    if value is None or value is dist.GroupMember.NON_GROUP_MEMBER:
        return []
    if isinstance(value, ProcessGroup):
        return [value]
    if isinstance(value, DeviceMesh):
        if value.get_coordinate() is None:
            return []
        return [value.get_group(number) for number in range(value.ndim)]
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [group for each in value for group in as_groups(each, name)]
    raise ArgumentTypeError(
        f"{name} is a {type(value).__name__}: expected a process group, a DeviceMesh, or several"
    )
