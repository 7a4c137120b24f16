"""Under ``GRADCLIP_DEBUG=1``: whether ranks that hold the same thing hold the same bits."""

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from gradclip.clipping.collect.gradients import Gradients
from gradclip.clipping.ranks.share import Share
from gradclip.clipping.ranks.verdict import Gather
from gradclip.errors import ReplicaError

_Held: TypeAlias = dict[tuple[str, str, tuple[int, ...]], tuple[str, str]]
"""By kind, name and position among those that hold parts: a digest of the bits, and words."""


def compare_replicas(
    gradients: Sequence[Gradients],
    norms: Sequence[Tensor],
    shares: Mapping[str, Share],
    gather: Gather,
    states: Mapping[str, Mapping[tuple[str, str], Tensor]],
) -> None:
    """Compare gradients, norms and histories over all ranks; every rank takes part, and waits.

    Args:
        gradients: Of each pattern, before anything is written.
        norms: Of each pattern, (S,).
        shares: Who holds what, by pattern.
        gather: Asks all ranks that are compared.
        states: Histories of policies, by pattern; ("per_scope", name) has a row for each scope.

    Raises:
        ReplicaError: GC211, on every rank, naming the first difference.
    """
    told = gather(lambda: (dist.get_rank(), _held(gradients, norms, shares, states)))
    first: dict[Any, tuple[int, str, str]] = {}
    for rank, held in told:
        for key, (digest, words) in held.items():
            other, known, expected = first.setdefault(key, (rank, digest, words))
            if known != digest:
                kind, name, _ = key
                raise ReplicaError(
                    f"GRADCLIP_DEBUG: the {kind} of {name} differs between ranks {other} and "
                    f"{rank}, which should hold the same: {expected} and {words}. No gradient was "
                    "changed."
                )


def _held(
    gradients: Sequence[Gradients],
    norms: Sequence[Tensor],
    shares: Mapping[str, Share],
    states: Mapping[str, Mapping[tuple[str, str], Tensor]],
) -> _Held:
    held: _Held = {}
    for each, norms_S in zip(gradients, norms, strict=True):
        pattern = each.group.pattern
        for name, gradient, position in _named(each, shares[pattern]):
            held["gradient", name, position] = _digest(gradient)
        share, state = shares[pattern], states.get(pattern, {})
        named = {name: value for (kind, name), value in state.items() if kind == "per_scope"}
        if share.scope == "group":
            held["norm", repr(pattern), ()] = _digest(norms_S)
            for name, value in named.items():
                held["history", f"{pattern!r}, {name}", ()] = _digest(value)
        else:
            for name, place, rows in _scopes(each, share):
                held["norm", name, place] = _digest(norms_S[rows])
                for history, value in named.items():
                    held["history", f"{name}, {history}", place] = _digest(value[rows])
        # A policy may have made the rest from the scopes that it sees, which differ by rank.
        if share.scope == "group" or not any(holding.split for holding in share.holdings):
            for (kind, name), value in state.items():
                if kind == "shared":
                    held["history", f"{pattern!r}, {name}", ()] = _digest(value)
    return held


def _scopes(gradients: Gradients, share: Share) -> Iterator[tuple[str, tuple[int, ...], slice]]:
    """Yield for each parameter which of its scopes this rank has, and where their numbers are."""
    start = 0
    held = zip(gradients.group.names, share.holdings, share.rows, share.unit_dims, strict=True)
    for name, holding, count, unit_dim in held:
        if not holding.absent:
            yield name, holding.position_of_units(unit_dim), slice(start, start + count)
        start += count


def _named(
    gradients: Gradients, share: Share
) -> Iterator[tuple[str, Tensor | None, tuple[int, ...]]]:
    present = gradients.present or [True] * len(share.holdings)
    tensors = iter(gradients.tensors)
    for name, there, holding in zip(gradients.group.names, present, share.holdings, strict=True):
        gradient = next(tensors) if there else None
        if not holding.absent:
            yield name, gradient, holding.position


def _digest(tensor: Tensor | None) -> tuple[str, str]:
    if tensor is None:
        return "", "none"
    values = tensor.detach()
    if values.layout is not torch.strided:
        values = values.to_dense()
    values = values.resolve_conj().resolve_neg().cpu().contiguous()
    bits = values.reshape(-1).view(torch.uint8).numpy().tobytes()
    norm = torch.linalg.vector_norm(
        values.to(torch.complex128 if values.is_complex() else torch.float64)
    )
    return blake2b(bits, digest_size=16).hexdigest(), f"norm {float(norm):.9g}"
