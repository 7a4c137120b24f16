"""Gradients that several processes hold together: who has what, and what they tell each other.

Imported only where there are several; this module alone can be imported everywhere.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import torch.distributed as dist
from torch import Tensor

from gradclip.clipping.collect.parameters import ParameterGroup
from gradclip.clipping.collect.sources import ParameterSource
from gradclip.clipping.ranks import rollcall
from gradclip.clipping.ranks.peers import Peers, Rule, SingleProcess, in_words
from gradclip.errors import ArgumentValueError

if TYPE_CHECKING:
    from gradclip.clipping.ranks.dimension import GroupLike
    from gradclip.clipping.ranks.ranks import Ranks
    from gradclip.clipping.ranks.rendezvous import Rendezvous

Meet: TypeAlias = "Callable[[Rendezvous, Mapping[str, ParameterGroup]], Ranks]"
"""Finds the ranks that meet."""


def find_peers(
    source: ParameterSource,
    groups: Mapping[str, ParameterGroup],
    rules: Mapping[str, Rule | None],
    *,
    options: str,
    total_order: float,
    partitioned: "Mapping[str, GroupLike] | None",
    duplicated: "Mapping[str, GroupLike] | None",
    meet: "Meet | None",
    require_matches: Callable[[], None],
    awaited: bool,
) -> Peers:
    """Find the processes that hold parameters together with this one.

    Args:
        source: Where the parameters are found.
        groups: The parameters by pattern.
        rules: What their policies ask for; None leaves a pattern alone.
        options: The other arguments of the clipper, in words that ranks can compare.
        total_order: p of the norm of all patterns together.
        partitioned: What ``GradientClipper`` was given.
        duplicated: Likewise.
        meet: Finds the ranks; None to agree with them anew, which is collective.
        require_matches: Raises for a pattern that matches nothing here; ranks that hold parameters
            together compare what matches.
        awaited: Whether other ranks look again now, and wait for this one.

    Raises:
        ArgumentValueError: GC010, on every rank, if they do not mean the same thing, or one of them
            has no parameters.
    """
    bounded = [each for name, group in groups.items() if rules[name] for each in group.parameters]
    if not (partitioned or duplicated or may_be_shared(bounded)):
        if meet is None and (awaited or _may_be_missed(source)):
            raise _has_nothing(source)
        require_matches()
        return SingleProcess()
    # Slow to import, and not for one process.
    from gradclip.clipping.ranks.rendezvous import Rendezvous  # noqa: PLC0415
    from gradclip.clipping.ranks.topology import Declared  # noqa: PLC0415

    rendezvous = Rendezvous(
        source,
        rules,
        options,
        total_order,
        Declared("partitioned", partitioned),
        Declared("duplicated", duplicated),
    )
    return rendezvous.ranks(groups) if meet is None else meet(rendezvous, groups)


@contextmanager
def telling_others() -> Iterator[None]:
    """Leave a note where this rank fails: others may wait for it until their timeout."""
    rollcall.begin()
    try:
        yield
    except Exception as error:
        if _is_one_of_several():
            rollcall.leave_note(error)
        raise


def pass_by(rules: Mapping[str, Rule | None], options: str) -> None:
    """Tell ranks that wait that this one made a clipper of what it holds alone."""
    if _is_one_of_several():
        rollcall.pass_by(in_words(rules, options))


def is_shared(parameter: Tensor) -> bool:
    """Return whether a parameter is a DTensor, or lies in a shard of FSDP1."""
    return hasattr(parameter, "_spec") or getattr(parameter, "_fsdp_flattened", False)


def is_debugging() -> bool:
    """Return whether the environment asks that ranks compare what they hold alike."""
    return os.environ.get("GRADCLIP_DEBUG", "") not in ("", "0") and _is_one_of_several()


def _have_peers() -> bool:
    return dist.is_available() and dist.is_initialized()


def _is_one_of_several() -> bool:
    return _have_peers() and dist.get_world_size() > 1


def may_be_shared(parameters: Iterable[Tensor]) -> bool:
    """Return whether another rank may hold a part of a parameter, or is to be compared with."""
    if not _have_peers():
        return False
    if is_debugging():
        return True
    return _may_shard() and any(map(is_shared, parameters))


def _may_shard() -> bool:
    """Return whether anything in this process can split a parameter."""
    return "torch.distributed.tensor" in sys.modules or "torch.distributed.fsdp" in sys.modules


def _may_be_missed(source: ParameterSource) -> bool:
    """Return whether other ranks may hold parameters, and wait for this one, which has none."""
    return _is_one_of_several() and _may_shard() and not source.tensors()


def _has_nothing(source: ParameterSource) -> ArgumentValueError:
    given = "parameters that it holds alone" if source.tensors() else "no parameters"
    return ArgumentValueError(
        f"rank {dist.get_rank()} of {dist.get_world_size()} was given {given}, so it takes part in "
        "nothing, and ranks that hold parameters together would wait for it. Give every rank all "
        "parameters, those without a gradient too: they are skipped where they are. A rank that "
        'has none of its own, such as a stage without weights, says so: partitioned={"*": group}. '
        "No gradient was changed."
    )
