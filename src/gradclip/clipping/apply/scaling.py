"""The second pass: scale the gradients of a pattern, on every device that has some."""

from torch import Tensor

from gradclip.clipping.apply.coefficients import Coefficients
from gradclip.clipping.collect.gradients import Gradients
from gradclip.clipping.kernels import Backends
from gradclip.clipping.measure.scopes import RowMap


def scale(
    backends: Backends,
    gradients: Gradients,
    coefficients: Coefficients,
    rows: RowMap | None = None,
) -> None:
    """Multiply gradients in place.

    Args:
        backends: The choice of backend.
        gradients: Those that exist.
        coefficients: What each scope is multiplied by.
        rows: Which scope each row has; None where all rows are one scope.
    """
    if not gradients.tensors:
        return
    for factor in coefficients.factors():
        if gradients.has_sparse:
            gradients.adopt_coalesced()
        if rows is not None and isinstance(factor, Tensor):
            factor = rows.spread(factor)  # noqa: PLW2901
        for part, numbers in gradients.written.parts:
            kernels = backends.on(part.device)
            if not isinstance(factor, Tensor):
                kernels.scale_(part, factor)
            elif numbers is None or len(factor) == 1:
                kernels.scale_(part, factor.to(part.device))
            else:
                kernels.scale_(part, factor[numbers.on(factor.device)].to(part.device))
