"""Drop-ins for ``torch.nn.utils``: same names, same arguments in the same order."""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from math import nan
from numbers import Real
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from gradclip.clipping.apply.coefficients import Coefficients
from gradclip.clipping.apply.scaling import scaling
from gradclip.clipping.arguments import Nonfinite, Options
from gradclip.clipping.collect.gradients import collect, warn_of_none
from gradclip.clipping.collect.overlap import DisjointCheck
from gradclip.clipping.collect.parameters import ParameterGroup, Parameters
from gradclip.clipping.collect.shards import reduced, whole
from gradclip.clipping.collect.sources import (
    GivenGradients,
    ParameterSource,
    as_sequence,
    as_source,
)
from gradclip.clipping.engine import Engine
from gradclip.clipping.flags import as_known
from gradclip.clipping.kernels import Backends, SpecsCache, carry_out, choose
from gradclip.clipping.kernels.device import result_device_of, untraced
from gradclip.clipping.measure.norm import reduced as reduced_norms
from gradclip.clipping.policies import Decision, NormClip, ObserveClip, Policy, ValueClip
from gradclip.clipping.ranks import may_be_shared
from gradclip.clipping.result import ClipResult
from gradclip.clipping.short.fused import Fused
from gradclip.clipping.short.lean import FEW, Lean
from gradclip.clipping.short.results import FusedResult
from gradclip.clipping.step.ownership import Guest
from gradclip.config import as_ceiling, as_norm_order
from gradclip.errors import ArgumentTypeError, ArgumentValueError

if TYPE_CHECKING:
    from gradclip.clipping.ranks.ranks import Ranks
    from gradclip.clipping.ranks.rendezvous import Rendezvous

_MODELS = 32
_KNOWN = SpecsCache(capacity=_MODELS)
"""Gradients that these functions have seen; they have no object to remember them in."""

_MET: "dict[object, tuple[list[object], Ranks]]" = {}
"""The ranks of parameters that these functions have seen, by the placements of those.

Another rank may have seen others, so what ranks tell each other does not depend on it.
"""
_KEPT = 16

_GUEST = Guest(
    "gradclip's clip_grad_norm_, clip_grads_with_norm_ or clip_grad_value_", calls=16, few=4
)


def _clip_once(source: ParameterSource, policy: Policy, nonfinite: Nonfinite) -> ClipResult:
    """Clip as ``GradientClipper`` does, and profit from what earlier calls worked out."""
    engine = Engine(
        source,
        {"*": policy},
        Options(nonfinite=nonfinite),
        _GUEST,
        once=True,
        known=_KNOWN,
        meet=_remembered,
    )
    return engine.clip()


class _Short(NamedTuple):
    """A policy, and the short ways that it has.

    Args:
        policy: What bounds the gradients.
        lean: The way of small models on a CPU.
        fused: The way of a device that does it in a few launches.
    """

    policy: Policy
    lean: Lean | None
    fused: Fused | None

    @classmethod
    def of(cls, policy: Policy, nonfinite: Nonfinite, backend: str) -> "_Short":
        """Find the ways of a policy, where a backend is used."""
        backends = Backends(backend)
        options, one = Options(nonfinite), {"*": policy}
        fused = Fused.of(one, options, backends, _GUEST, by_pattern=False, kept=_MODELS)
        return cls(policy, Lean.of(policy) if backends.are_portable else None, fused)

    def clip(self, source: ParameterSource, *, raises: bool) -> Tensor | None:
        """Clip where nothing is unusual, and return the norm; None elsewhere: nothing was done.

        The norm is not found where elements are clamped on the lean way: it is NaN then.
        """
        parameters = source.tensors()
        has_twins = len(set(map(id, parameters))) < len(parameters)
        if has_twins or may_be_shared(parameters):
            return None
        lean = self.lean if len(parameters) <= FEW else None
        fused = self.fused if self.fused is not None and self.fused.serves(parameters) else None
        if lean is None and fused is None:
            return None  # to read thousands of gradients twice takes long
        found = source.gradients(parameters)
        if lean is not None and lean.clamp(found, _KNOWN, _GUEST):
            return torch.scalar_tensor(nan, device="cpu")
        small = None if lean is None else lean.read(found, _KNOWN)
        if small is not None:
            small.write(_GUEST)
            return torch.scalar_tensor(small.norm, dtype=torch.float32, device="cpu")
        if fused is None:
            return None
        clip = fused.clip([found], [_KNOWN], lambda c: not raises or c.report.is_bounded)
        return None if clip is None else FusedResult(clip, 0, ()).norm_pre


@lru_cache(maxsize=64)
def _norm_clip(max_norm: float, norm_type: float, nonfinite: Nonfinite, backend: str) -> _Short:
    ceiling, order = as_ceiling(max_norm, "max_norm"), as_norm_order(norm_type)
    return _Short.of(NormClip(max_norm=ceiling, norm_type=order), nonfinite, backend)


@lru_cache(maxsize=64)
def _value_clip(clip_value: float, backend: str) -> _Short:
    return _Short.of(ValueClip(clip_value=clip_value), "propagate", backend)


def _remembered(rendezvous: "Rendezvous", groups: Mapping[str, ParameterGroup]) -> "Ranks":
    """Return what an earlier call found for such parameters: ranks do not agree anew."""
    parameters = groups["*"].parameters
    specs = [getattr(parameter, "_spec", None) for parameter in parameters]
    pairs = zip(parameters, specs, strict=True)
    plain = [(p.dtype, p.device, p.shape) for p, spec in pairs if spec is None]
    key = tuple(map(id, specs)), tuple(plain), repr(rendezvous.rules), rendezvous.options
    if key not in _MET:
        if len(_MET) >= _KEPT:
            _MET.clear()
        # The specs are kept with it, so that no other ones get their addresses.
        _MET[key] = specs, rendezvous.ranks(groups, agree=False)
    ranks = _MET[key][1]
    ranks.begin()
    return ranks


@untraced
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale gradients in place so that their global p-norm is at most ``max_norm``.

    Args:
        parameters: Tensors whose ``.grad`` is scaled; any shapes, dtypes and devices.
        max_norm: Ceiling, in the units of the gradient norm; >= 0, not NaN. ``inf`` only measures.
        norm_type: p of the p-norm: > 0, ``inf`` or "inf".
        error_if_nonfinite: Raise where the norm is NaN or infinite. Otherwise that norm is
            returned, and no gradient is changed.
        foreach: Accepted for compatibility: the fastest way is taken anyway.

    Returns:
        The norm before clipping: 0-d float32 (float64 when a gradient is), on the gradients'
        device.

    Raises:
        ArgumentTypeError: GC011, for an argument of the wrong kind.
        ArgumentValueError: GC010, for one out of range.
        NonFiniteGradientError: GC201, with ``error_if_nonfinite=True``; no gradient is changed.
        ReplicaError: GC211, on all ranks that hold DTensors together, if they are given other plain
            parameters or limits, or copies differ.

    Note:
        No host synchronisation unless ``error_if_nonfinite``. Of DTensors a rank may leave out
        those that have no gradient, but not all that it has.

    References:
        Pascanu et al. 2013, arXiv:1211.5063, section 3.2.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grad_norm_([weight], max_norm=10.0)
    tensor(5.)
    """
    _check_foreach(foreach)
    if type(max_norm) is not float:
        max_norm = as_ceiling(max_norm, "max_norm")
    if type(norm_type) is not float:
        norm_type = as_norm_order(norm_type)
    raises = _check_flag(error_if_nonfinite)
    nonfinite: Nonfinite = "raise" if raises else "propagate"
    short = _norm_clip(max_norm, norm_type, nonfinite, choose("auto").name)
    source = as_source(parameters)
    norm = short.clip(source, raises=raises)
    return _clip_once(source, short.policy, nonfinite).norm_pre if norm is None else norm


@untraced
def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None
) -> None:
    """Clamp each element of the gradients to [-clip_value, clip_value], in place.

    Args:
        parameters: Tensors whose ``.grad`` is clamped; real, any shapes, dtypes and devices.
        clip_value: Largest modulus of an element; >= 0, not NaN. Infinities are clamped too.
        foreach: Accepted for compatibility: the fastest way is taken anyway.

    Raises:
        ArgumentTypeError: GC011, for an argument of the wrong kind.
        ArgumentValueError: GC010, for one out of range.
        UnsupportedGradientError: GC020, for complex gradients.
    """
    _check_foreach(foreach)
    short = _value_clip(as_ceiling(clip_value, "clip_value"), choose("auto").name)
    source = as_source(parameters)
    if short.clip(source, raises=False) is None:
        _clip_once(source, short.policy, "propagate")


@untraced
@torch.no_grad()
def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Return the p-norm of all elements of the tensors together.

    Args:
        tensors: Gradients (not parameters), of any shapes, dtypes and devices.
        norm_type: p of the p-norm: > 0, ``inf`` or "inf".
        error_if_nonfinite: Raise where the norm is NaN or infinite.
        foreach: Accepted for compatibility: the fastest way is taken anyway.

    Returns:
        0-d float32 (float64 when a tensor is), on the tensors' device.

    Raises:
        NonFiniteGradientError: GC201, with ``error_if_nonfinite=True``.

    >>> get_total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
    tensor(5.)
    """
    _check_foreach(foreach)
    policy = ObserveClip(norm_type=as_norm_order(norm_type))
    nonfinite: Nonfinite = "raise" if _check_flag(error_if_nonfinite) else "propagate"
    return _clip_once(_given(tensors), policy, nonfinite).norm_pre


@untraced
@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    total_norm: Tensor | float,
    foreach: bool | None = None,
) -> None:
    """Scale gradients in place as if their norm were ``total_norm``.

    Args:
        parameters: Tensors whose ``.grad`` is scaled; any shapes, dtypes and devices.
        max_norm: Ceiling, in the units of the gradient norm; >= 0, not NaN.
        total_norm: A norm that was measured before, perhaps of more than these gradients: a
            number >= 0 or a one-element tensor. Where it is NaN or infinite nothing is changed.
        foreach: Accepted for compatibility: the fastest way is taken anyway.

    Raises:
        ArgumentTypeError: GC011, for an argument of the wrong kind.
        ArgumentValueError: GC010, for one out of range.
    """
    _check_foreach(foreach)
    ceiling = as_ceiling(max_norm, "max_norm")
    group = Parameters(as_source(parameters), None).groups()["*"]
    # What ranks hold summands of may be scaled as well: so is its sum.
    gradients = collect(group, _KNOWN, placed=False)
    if not gradients.tensors and group.parameters:
        warn_of_none()
    DisjointCheck()([gradients])
    norm_S = _as_norm(total_norm, result_device_of(gradients.devices))
    backends = choose("auto")
    coefficients = Coefficients(
        backends,
        norm_S,
        Decision(ceiling, ceiling),
        bounded=as_known(norm_S.isfinite()),
        unwanted=False,
        guard=gradients.guard,
        skipped_coefficient=1.0,
        reduced=partial(reduced_norms, norm_S) if gradients.dtype is torch.float64 else None,
    )
    carry_out(scaling(backends, gradients, coefficients))
    _GUEST.mark([(gradients.tensors, NormClip(max_norm=ceiling))])


def _given(tensors: object) -> GivenGradients:
    listed = as_sequence(tensors, "tensors")
    for number, tensor in enumerate(listed):
        if not isinstance(tensor, Tensor):
            raise ArgumentTypeError(
                f"tensors[{number}] is a {type(tensor).__name__}: expected a tensor"
            )
    given = [reduced(tensor) for tensor in cast("Sequence[Tensor]", listed)]
    return GivenGradients(given, [f"tensors[{number}]" for number in range(len(given))])


def _as_norm(total_norm: object, device: torch.device) -> Tensor:
    if isinstance(total_norm, Tensor):
        total_norm = whole(total_norm)  # torch's norm of DTensors is one
        if total_norm.numel() != 1 or total_norm.is_complex():
            raise ArgumentValueError(
                f"total_norm is a tensor of shape {tuple(total_norm.shape)} and "
                f"{total_norm.dtype}: expected one real number"
            )
        if total_norm.device.type == "cpu" and float(total_norm) < 0:
            raise ArgumentValueError(f"total_norm={total_norm!r}: a norm is not negative")
        return total_norm.detach().to(device=device, dtype=torch.float64).reshape(1)
    if isinstance(total_norm, bool) or not isinstance(total_norm, Real):
        raise ArgumentTypeError(f"total_norm={total_norm!r}: expected a number or a tensor")
    norm = float(total_norm)
    if norm < 0:
        raise ArgumentValueError(f"total_norm={total_norm!r}: a norm is not negative")
    return torch.full((1,), norm, dtype=torch.float64, device=device)


def _check_foreach(foreach: object) -> None:
    if foreach is not None and not isinstance(foreach, bool):
        raise ArgumentTypeError(f"foreach={foreach!r}: expected None, True or False")


def _check_flag(error_if_nonfinite: object) -> bool:
    if not isinstance(error_if_nonfinite, bool):
        raise ArgumentTypeError(f"error_if_nonfinite={error_if_nonfinite!r}: expected a bool")
    return error_if_nonfinite
