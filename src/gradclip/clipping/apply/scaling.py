"""The second pass: scale the gradients of a group, on every device that has some."""

from torch import Tensor

from gradclip.clipping.apply.coefficients import Response
from gradclip.clipping.collect.gradients import Gradients
from gradclip.clipping.kernels import Backends
from gradclip.clipping.measure.norm import Scopes


def scale(
    backends: Backends, gradients: Gradients, response: Response, scopes: Scopes | None = None
) -> None:
    """Multiply gradients in place by what a response says.

    Args:
        backends: The choice of backend.
        gradients: Those that exist.
        response: What each scope is multiplied by.
        scopes: Which scope each row has, unless there is one scope, or one for each row.
    """
    if not gradients.tensors:
        return
    for factor in response.factors():
        if gradients.has_sparse:
            gradients.adopt_coalesced()
        if scopes is not None and isinstance(factor, Tensor):
            factor = scopes.spread(factor)  # noqa: PLW2901
        for part, rows in gradients.written.parts:
            kernels = backends.on(part.device)
            if not isinstance(factor, Tensor):
                kernels.scale_(part, factor)
            elif rows is None or len(factor) == 1:
                kernels.scale_(part, factor.to(part.device))
            else:
                kernels.scale_(part, factor[rows.on(factor.device)].to(part.device))
