"""The second pass: scale, clamp or zero the gradients of a group, on every device that has some."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradclip.clipping.gradients import Gradients
from gradclip.clipping.kernels import Kernels, by_device
from gradclip.clipping.kernels.blocks import home_of
from gradclip.clipping.response import Flag, Response


def scale(kernels: Kernels, gradients: Gradients, rows: Sequence[int], response: Response) -> None:
    """Multiply gradients in place by what a response says."""
    for factor in response.factors():
        if gradients.has_sparse:
            gradients.adopt_coalesced()
        written = gradients.written
        for device, (indices, row_indices) in by_device(written, rows).items():
            part = factor
            if isinstance(factor, Tensor):
                part = (factor if len(factor) == 1 else factor[row_indices]).to(device)
            kernels.scale_([written[i] for i in indices], [rows[i] for i in indices], part)


def clamp(kernels: Kernels, gradients: Gradients, limit: float | Tensor) -> Flag:
    """Clamp every element of real gradients to [-limit, limit].

    Returns:
        Whether any element changed.
    """
    tensors = gradients.measured(2.0)
    changed = [
        kernels.clamp_([tensors[i] for i in indices], limit)
        for indices, _ in by_device(tensors, [1] * len(tensors)).values()
    ]
    if gradients.has_sparse and any(map(bool, changed)):
        gradients.adopt_coalesced()
    home = home_of(gradients.devices)
    flags = torch.stack([flag.to(home) for flag in changed]).any()
    return bool(flags) if home.type == "cpu" else flags


def zero(kernels: Kernels, gradients: Gradients, keep: Flag) -> None:
    """Set all gradients to zero, NaN and infinities too, unless told to keep them."""
    written = gradients.written
    if keep is True or not written:
        return
    where = torch.tensor(not keep) if isinstance(keep, bool) else ~keep
    for device, (indices, _) in by_device(written, [1] * len(written)).items():
        kernels.zero_([written[i] for i in indices], where.to(device))
