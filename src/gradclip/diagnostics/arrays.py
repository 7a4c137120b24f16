"""NumPy, which readers of logs and the advice need, and nothing else of gradclip does."""

from typing import TypeAlias

from gradclip.errors import MissingDependencyError

try:
    import numpy as np
    from numpy.typing import NDArray
except ImportError as error:
    raise MissingDependencyError(
        'logs are read with numpy, which is not installed.\n  pip install "gradclip[logs]"'
    ) from error

__all__ = ["Flags", "Numbers", "Places", "np"]

Numbers: TypeAlias = NDArray[np.float64]
"""A float64 array; NaN stands for what is missing."""
Places: TypeAlias = NDArray[np.int64]
Flags: TypeAlias = NDArray[np.bool_]
