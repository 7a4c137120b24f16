"""The second pass: scale the gradients of a pattern, on every device that has some."""

from torch import Tensor

from gradclip.clipping.apply.coefficients import Coefficients
from gradclip.clipping.collect.gradients import Gradients
from gradclip.clipping.kernels import Backends, Write
from gradclip.clipping.measure.scopes import RowMap


def scaling(
    backends: Backends,
    gradients: Gradients,
    coefficients: Coefficients,
    rows: RowMap | None = None,
) -> list[Write]:
    """Prepare to multiply gradients in place.

    Args:
        backends: The choice of backend.
        gradients: Those that exist.
        coefficients: What each scope is multiplied by.
        rows: Which scope each row has; None where all rows are one scope.
    """
    if not gradients.tensors:
        return []
    writes: list[Write] = []
    zeroes = coefficients.may_be_zero
    for factor in coefficients.factors():
        if rows is not None and isinstance(factor, Tensor):
            factor = rows.spread(factor)  # noqa: PLW2901
        for part, numbers in gradients.written.parts:
            kernels = backends.on(part.device)
            if not isinstance(factor, Tensor):
                writes += kernels.scaling(part, factor, zeroes=zeroes)
            elif numbers is None or len(factor) == 1:
                writes += kernels.scaling(part, factor.to(part.device), zeroes=zeroes)
            else:
                writes += kernels.scaling(
                    part, factor[numbers.on(factor.device)].to(part.device), zeroes=zeroes
                )
    return adopted(gradients, writes)


def adopted(gradients: Gradients, writes: list[Write]) -> list[Write]:
    """Let parameters adopt their coalesced gradients first, if those are what is written."""
    if not (writes and gradients.has_sparse):
        return writes
    return [Write(_adopt, ([gradients],)), *writes]


def _adopt(every: list[Gradients]) -> None:
    for gradients in every:
        gradients.adopt_coalesced()
