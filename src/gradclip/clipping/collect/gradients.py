"""What a call finds: the gradients of one pattern, checked, as the kernels see them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from typing import cast

import torch
from torch import Tensor

from gradclip.clipping.collect.parameters import ParameterGroup
from gradclip.clipping.collect.shards import local_part
from gradclip.clipping.collect.units import Units
from gradclip.clipping.kernels.tensor_specs import Batch, SpecsCache, TensorSpecs
from gradclip.errors import UnsupportedGradientError, warn

FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
COMPLEX = frozenset({torch.complex64, torch.complex128})
_SUPPORTED = FLOATING | COMPLEX
_DOUBLES = {torch.float64, torch.complex128}
COARSE_GUARD, FINE_GUARD = 2.0**-21, 2.0**-44
"""Margins that keep the rounding of scaled elements below a ceiling: of float32, of float64."""


@dataclass(eq=False)
class Gradients:
    """The gradients of one pattern at one call.

    Args:
        group: The parameters that they may belong to.
        present: Which of those have a gradient; None for all.
        tensors: The gradients, dense or sparse, real or complex.
        known: Recognises tensors like those of earlier calls.
        units: Those of each tensor; None where there are no units.
        specs: That of the tensors.
    """

    group: ParameterGroup
    present: list[bool] | None
    tensors: list[Tensor]
    known: SpecsCache
    units: list[Units] | None
    specs: TensorSpecs

    def __post_init__(self) -> None:
        self._kinds = self.specs.plan(_Kinds)
        plain = self._kinds.plain and all(each.is_plain for each in self.units or ())
        self._plain = Batch(self.tensors, self.specs) if plain else None

    @cached_property
    def names(self) -> list[str]:
        """What the gradients are called."""
        names = self.group.names
        return names if self.present is None else list(compress(names, self.present))

    @property
    def devices(self) -> set[torch.device]:
        """Where they are."""
        return self._kinds.devices

    @property
    def stored(self) -> Batch:
        """Real views of the memory that the gradients have now."""
        if self._plain is not None:
            return self._plain
        return self._batch([_parts(_values(tensor)) for tensor in self.tensors])

    @property
    def written(self) -> Batch:
        """Real views of what the parameters have after ``adopt_coalesced``.

        Scaling them scales the gradients, and their 2-norm is that of the gradients.
        """
        return self._by_parts if self._plain is None else self._plain

    def measured(self, norm_type: float) -> Batch:
        """Tensors that have the gradients' p-norm.

        Args:
            norm_type: For p = 2 complex numbers count as pairs of reals. For any other they stay
                complex, since they count by modulus.
        """
        if self._plain is not None or norm_type == 2:  # noqa: PLR2004 - the Euclidean norm
            return self.written
        return self._batch([_resolved(_values(tensor)) for tensor in self._coalesced])

    @property
    def has_complex(self) -> bool:
        """Whether a gradient has complex elements, which have no order."""
        return bool(self._kinds.dtypes & COMPLEX)

    def require_real(self) -> None:
        """Refuse complex gradients, where elements are clamped.

        Raises:
            UnsupportedGradientError: GC020, naming the first.
        """
        if not self.has_complex:
            return
        pairs = zip(self.names, self.tensors, strict=True)
        name, tensor = next(pair for pair in pairs if pair[1].is_complex())
        raise UnsupportedGradientError(
            f"the gradient of {name} is {tensor.dtype}, and complex numbers have no order to clamp "
            "by: use NormClip for it. No gradient was changed."
        )

    @property
    def has_sparse(self) -> bool:
        """Whether a gradient has to be coalesced before its elements are changed."""
        return self._plain is None and any(tensor.is_sparse for tensor in self.tensors)

    def adopt_coalesced(self) -> None:
        """Give the parameters their coalesced gradients, whose values ``written`` has.

        Entries of one place are rounded together then, and not each at its own size.
        """
        owners = self.group.parameters
        if self.present is not None:
            owners = list(compress(owners, self.present))
        for index, (parameter, coalesced) in enumerate(zip(owners, self._coalesced, strict=True)):
            if coalesced is not self.tensors[index]:
                parameter.grad = self.tensors[index] = coalesced

    @cached_property
    def _coalesced(self) -> list[Tensor]:
        return [t.coalesce() if t.layout is torch.sparse_coo else t for t in self.tensors]

    @cached_property
    def _by_parts(self) -> Batch:
        return self._batch([_parts(_values(tensor)) for tensor in self._coalesced])

    def _batch(self, tensors: list[Tensor]) -> Batch:
        """Return tensors as the kernels see them: units in the leading dimension."""
        rows = self.specs.rows
        if self.units and not all(each.is_plain for each in self.units):
            pairs = zip(self.units, tensors, strict=True)
            views = [view for units, tensor in pairs for view in units.views(tensor)]
            tensors, rows = [view for view, _ in views], [count for _, count in views]
        return self.known.batch(tensors, rows)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what is reported: float32, or float64 when a gradient is."""
        return torch.float64 if self._kinds.dtypes & _DOUBLES else torch.float32

    @property
    def guard(self) -> float:
        """The relative margin that keeps the rounding of scaled elements below a ceiling."""
        return COARSE_GUARD if self._kinds.dtypes - _DOUBLES else FINE_GUARD


class _Kinds:
    """What kinds of tensors a specs has."""

    def __init__(self, specs: TensorSpecs) -> None:
        self.devices = set(specs.devices)
        self.dtypes = set(specs.dtypes)
        self.plain = self.dtypes <= FLOATING and all(specs.dense)
        """Dense, real and without a pending sign: each gradient is its own view."""


def collect(
    group: ParameterGroup, known: SpecsCache, *, by_unit: bool = False, placed: bool = True
) -> Gradients:
    """Collect the gradients that exist, and check each, or that nothing changed since.

    Args:
        group: Whose gradients.
        known: Recognises tensors like those of earlier calls.
        by_unit: Whether each unit is a row of its own.
        placed: Whether DTensors have to be placed like their parameters.

    Raises:
        UnsupportedGradientError: GC020, for an integer, float8 or meta gradient, or one whose
            layout has no values to measure.
    """
    found = group.source.gradients(group.parameters)
    found = group.local(found) if placed else [g if g is None else local_part(g) for g in found]
    specs = known.find(cast("list[Tensor]", found))  # what holds a None fits none
    if specs is not None:
        units = group.units if by_unit else None
        return Gradients(group, None, cast("list[Tensor]", found), known, units, specs)
    return as_gradients(group, found, known, by_unit=by_unit)


def as_gradients(
    group: ParameterGroup, found: Sequence[Tensor | None], known: SpecsCache, *, by_unit: bool
) -> Gradients:
    """Check each tensor, unless tensors of these kinds were checked before.

    Args:
        group: The parameters.
        found: A tensor on this process for each; None where there is none.
        known: Recognises tensors like those of earlier calls.
        by_unit: Whether each unit is a row of its own.

    Raises:
        UnsupportedGradientError: GC020.
    """
    there = [gradient is not None for gradient in found]
    present = None if all(there) else there
    tensors = [wait_for(gradient) for gradient in found if gradient is not None]
    units = list(compress(group.units, there)) if by_unit else None
    specs = known.find(tensors)
    if specs is None:
        names = group.names if present is None else list(compress(group.names, present))
        for name, gradient in zip(names, tensors, strict=True):
            _check_supported(name, gradient, by_unit=by_unit)
        specs = known.add(tensors, _rows(tensors, units))
    return Gradients(group, present, tensors, known, units, specs)


def _rows(tensors: list[Tensor], units: list[Units] | None) -> list[int] | None:
    if units is None:
        return None
    return [each.rows(tensor) for each, tensor in zip(units, tensors, strict=True)]


def wait_for(tensor: Tensor) -> Tensor:
    """Return a tensor once an asynchronous collective that fills it has ended."""
    if type(tensor) is Tensor or not hasattr(tensor, "trigger_wait"):
        return tensor
    done: Tensor = tensor.wait()  # type: ignore[attr-defined]
    return done


def left_alone(group: ParameterGroup, known: SpecsCache) -> Gradients:
    """Return the gradients of parameters that no policy bounds, as far as they have memory.

    Args:
        group: The parameters.
        known: Recognises tensors like those of earlier calls.
    """
    found = group.source.gradients(group.parameters)
    local = [None if each is None else wait_for(local_part(each)) for each in found]
    there = [each is not None and _has_memory(each) for each in local]
    tensors = [
        each for each, chosen in zip(local, there, strict=True) if each is not None and chosen
    ]
    return Gradients(group, there, tensors, known, None, known.batch(tensors).specs)


def _has_memory(tensor: Tensor) -> bool:
    plain = tensor.layout is torch.strided and not tensor.is_meta
    return plain and not _intercepts(tensor)


def has_norm(tensor: Tensor) -> bool:
    """Return whether a tensor of any kind can be measured."""
    return tensor.dtype in _SUPPORTED and _has_memory(tensor)


def _intercepts(tensor: Tensor) -> bool:
    """Return whether the type of a tensor runs operations by itself, as wrappers and fakes do."""
    return type(tensor) is not Tensor and (
        type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    )


def warn_of_none() -> None:
    """Warn that there is nothing to clip, though there are parameters."""
    warn(
        "every gradient is None, so nothing was clipped: clip after backward() and before "
        "zero_grad(), and pass the parameters, not their gradients"
    )


def _check_supported(name: str, gradient: Tensor, *, by_unit: bool) -> None:
    """Refuse a gradient that has no norm, or whose norm is not on this process.

    Raises:
        UnsupportedGradientError: GC020, naming it.
    """
    plain = not _intercepts(gradient) and gradient.layout in _LAYOUTS
    if gradient.dtype in _SUPPORTED and plain:
        if gradient.is_meta:
            reason = "device meta: it has no values"
        elif gradient.is_inference() and not torch.is_inference_mode_enabled():
            reason = "made in torch.inference_mode(), outside of which it may not be changed"
        elif by_unit and gradient.layout is not torch.strided:
            reason = f"layout {gradient.layout}: a norm for each unit needs a dense gradient"
        else:
            return
    elif gradient.dtype not in _SUPPORTED:
        reason = f"dtype {gradient.dtype}: its norm is not defined, or does not survive scaling"
    elif hasattr(gradient, "_local_tensor"):
        reason = "a DTensor, of a parameter that is none"
    elif _intercepts(gradient):
        kind = type(gradient).__name__
        reason = f"a {kind}: its memory, if it has any, is not that of a dense gradient"
    elif gradient.layout not in _LAYOUTS:
        reason = f"layout {gradient.layout}: expected strided or sparse"
    else:
        return
    raise UnsupportedGradientError(
        f"the gradient of {name}, of shape {tuple(gradient.shape)}, cannot be clipped: {reason}. "
        "No gradient was changed."
    )


_COMPRESSED = frozenset({torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc})
_LAYOUTS = frozenset({torch.strided, torch.sparse_coo}) | _COMPRESSED


def _values(gradient: Tensor) -> Tensor:
    if gradient.layout is torch.strided:
        return gradient
    return gradient.values() if gradient.layout in _COMPRESSED else gradient._values()  # noqa: SLF001 - also of an uncoalesced tensor


def _parts(values: Tensor) -> Tensor:
    """View complex numbers as pairs of reals, without pending signs: no limit depends on them."""
    values = _resolved(values)
    return _unsigned(torch.view_as_real(values)) if values.is_complex() else values


def _resolved(values: Tensor) -> Tensor:
    """View numbers without a pending conjugation or sign: no modulus depends on them."""
    return _unsigned(values.conj() if values.is_conj() else values)


def _unsigned(values: Tensor) -> Tensor:
    return torch._neg_view(values) if values.is_neg() else values  # noqa: SLF001 - the only way to undo it in place
