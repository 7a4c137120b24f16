"""The second pass: scale, clamp or zero the gradients of a group, on every device that has some."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradclip.clipping.gradients import Gradients
from gradclip.clipping.kernels import Kernels, by_device
from gradclip.clipping.kernels.blocks import home_of

_SUBNORMAL = 2.0**-1000
_STEP = 2.0**-600


def scale(
    kernels: Kernels, gradients: Gradients, rows: Sequence[int], coefficients_S: Tensor
) -> None:
    """Multiply gradients in place.

    Args:
        kernels: The backend.
        gradients: What to scale.
        rows: The rows of each gradient, as they were measured.
        coefficients_S: One for all, (1,), or one for each row, (R,); float64.
    """
    if _is_one(coefficients_S):
        return
    if any(tensor.is_sparse for tensor in gradients.tensors):
        gradients.adopt_coalesced()
    written = gradients.written
    for device, (indices, row_indices) in by_device(written, rows).items():
        part = coefficients_S if len(coefficients_S) == 1 else coefficients_S[row_indices]
        kernels.scale_([written[i] for i in indices], [rows[i] for i in indices], part.to(device))


def clamp(kernels: Kernels, gradients: Gradients, limit: float | Tensor) -> Tensor:
    """Clamp every element of real gradients to [-limit, limit].

    Returns:
        Whether any element changed: 0-d bool on the gradients' device.
    """
    tensors = gradients.measured(2.0)
    changed = [
        kernels.clamp_([tensors[i] for i in indices], limit)
        for indices, _ in by_device(tensors, [1] * len(tensors)).values()
    ]
    if any(tensor.is_sparse for tensor in gradients.tensors) and any(map(bool, changed)):
        gradients.adopt_coalesced()
    home = home_of(gradients.devices)
    return (
        torch.stack([flag.to(home) for flag in changed]).any() if changed else torch.tensor(False)
    )


def zero(kernels: Kernels, gradients: Gradients, keep: Tensor) -> None:
    """Set all gradients to zero, NaN and infinities too, unless the 0-d bool says to keep them."""
    if keep.device.type == "cpu" and keep:
        return
    written = gradients.written
    if not written:
        return
    for device, (indices, _) in by_device(written, [1] * len(written)).items():
        kernels.zero_([written[i] for i in indices], ~keep.to(device))


def steps(coefficients_S: Tensor, targets_S: Tensor, norms_S: Tensor, guard: float) -> list[Tensor]:
    """Return coefficients to apply one after the other: two where float64 has none for both.

    A norm of 1e300 and a target of 1e-20 have a quotient that is subnormal, and so coarse.
    """
    if coefficients_S.device.type != "cpu" or coefficients_S.numel() == 0:
        return [coefficients_S]
    if not 0 < float(coefficients_S.amin()) < _SUBNORMAL:
        return [coefficients_S]
    tiny_S = coefficients_S < _SUBNORMAL
    rest_S = targets_S * (1 / _STEP) / norms_S * (1 - guard)
    step_S = torch.where(tiny_S, _STEP, torch.ones_like(coefficients_S))
    return [step_S, torch.where(tiny_S, rest_S, coefficients_S)]


def _is_one(coefficients_S: Tensor) -> bool:
    """Whether the host can see for nothing that there is nothing to do."""
    on_host = coefficients_S.device.type == "cpu"
    return on_host and coefficients_S.numel() == 1 and float(coefficients_S) == 1
