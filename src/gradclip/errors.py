"""Every error of gradclip, each also the built-in that people already catch.

.. code-block:: text

    GradClipError
    |-- ConfigError (ValueError)                 GC001  a configuration is wrong
    |   |-- ClassTypeError                       GC002  a ``class_type`` that may not be resolved
    |   `-- ConfigFileError                      GC003  a file that is no configuration
    |-- ArgumentValueError (ValueError)          GC010  an argument of the right kind, out of range
    |-- ArgumentTypeError (TypeError)            GC011  an argument of the wrong kind
    |-- UnsupportedGradientError (TypeError)     GC020  a gradient that has no norm
    |-- OverlappingGradientsError (ValueError)   GC021  gradients that share bytes
    |-- CaptureError (RuntimeError)              GC022  a CUDA graph and clip() do not agree
    |-- StateError (ValueError)                  GC030  a state that belongs to something else
    |-- DoubleClippingError (ValueError)         GC101  two clippers of the same gradients
    |-- NonFiniteGradientError (RuntimeError)    GC201  a NaN or an infinity in the gradients
    |   `-- TooManySkipsError                    GC202  too many steps in a row were skipped
    |-- RankError (RuntimeError)                 GC210  another rank could not clip, or differs
    |-- ReplicaError (RuntimeError)              GC211  copies of a gradient differ by rank
    |-- CollectiveError (RuntimeError)           GC212  a collective failed: a rank died, or is late
    |-- CheckpointError (RuntimeError)           GC301  a checkpoint: damaged, or not to be written
    |-- RecordError (OSError)                    GC302  a record of a run that cannot be written
    |-- LogError (ValueError)                    GC303  a log of a run that cannot be read
    |-- MissingDependencyError (ImportError)     GC401  an extra that is not installed
    `-- AbsentNameError (ImportError)            GC402  a name of RoboOrchardLab that is not here

A code never changes its meaning; ``docs/reference/errors.md`` has a paragraph for each.
"""

import sys
import warnings
from typing import ClassVar

__all__ = [
    "AbsentNameError",
    "ArgumentTypeError",
    "ArgumentValueError",
    "CaptureError",
    "CheckpointError",
    "ClassTypeError",
    "CollectiveError",
    "ConfigError",
    "ConfigFileError",
    "DoubleClippingError",
    "GradClipError",
    "LogError",
    "MissingDependencyError",
    "NonFiniteGradientError",
    "OverlappingGradientsError",
    "RankError",
    "RecordError",
    "ReplicaError",
    "StateError",
    "TooManySkipsError",
    "UnsupportedGradientError",
    "warn",
]


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, and name the line of the first caller outside gradclip and torch."""
    inner = ("gradclip.", "torch.")
    level, frame = 1, sys._getframe(1)  # noqa: SLF001 - a public name for it comes with Python 3.12
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(inner):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level + 1)


class GradClipError(Exception):
    """The root: ``except GradClipError`` catches whatever gradclip raises on purpose."""

    code: ClassVar[str] = "GC000"
    """A stable identifier; ``docs/reference/errors.md`` explains it."""


class ConfigError(GradClipError, ValueError):
    """A configuration holds something that cannot be meant."""

    code = "GC001"


class ClassTypeError(ConfigError):
    """A ``class_type`` names something that a configuration may not build."""

    code = "GC002"


class ConfigFileError(ConfigError):
    """A file cannot be read as a configuration: syntax, size, depth, duplicate keys."""

    code = "GC003"


class ArgumentValueError(GradClipError, ValueError):
    """An argument is of the right kind and out of range."""

    code = "GC010"


class ArgumentTypeError(GradClipError, TypeError):
    """An argument is of the wrong kind."""

    code = "GC011"


class UnsupportedGradientError(GradClipError, TypeError):
    """A gradient is of a kind that cannot be measured or scaled; nothing was changed."""

    code = "GC020"


class OverlappingGradientsError(GradClipError, ValueError):
    """Gradients share bytes, so scaling each once would scale some twice; nothing was changed."""

    code = "GC021"


class CaptureError(GradClipError, RuntimeError):
    """A CUDA graph is captured before the first steps, or a limit changed after; nothing was."""

    code = "GC022"


class StateError(GradClipError, ValueError):
    """A saved state does not belong to the object that should load it; nothing was changed."""

    code = "GC030"


class DoubleClippingError(GradClipError, ValueError):
    """Two owners of one limit: hooks, attachments, callbacks, or an engine that clips by itself."""

    code = "GC101"


class NonFiniteGradientError(GradClipError, RuntimeError):
    """The gradients hold a NaN or an infinity."""

    code = "GC201"


class TooManySkipsError(NonFiniteGradientError):
    """More steps in a row than allowed were skipped for non-finite gradients."""

    code = "GC202"


class RankError(GradClipError, RuntimeError):
    """Another rank could not clip, or clips by another policy, so none did."""

    code = "GC210"


class ReplicaError(GradClipError, RuntimeError):
    """Ranks that should hold the same gradient hold different ones, or not all of them have it."""

    code = "GC211"


class CollectiveError(GradClipError, RuntimeError):
    """A collective failed: another rank died, does not clip at this step, or is too late."""

    code = "GC212"


class CheckpointError(GradClipError, RuntimeError):
    """A checkpoint is missing, incomplete or damaged, or cannot be written."""

    code = "GC301"


class RecordError(GradClipError, OSError):
    """A record of a run cannot be written: a full disk, say, or another run in its place."""

    code = "GC302"


class LogError(GradClipError, ValueError):
    """A log of a run cannot be read, or does not say which numbers are gradient norms."""

    code = "GC303"


class MissingDependencyError(GradClipError, ImportError):
    """A feature needs an extra that is not installed; the message has the command."""

    code = "GC401"


class AbsentNameError(GradClipError, ImportError):
    """RoboOrchardLab has this name and gradclip does not; the message says what to use."""

    code = "GC402"
