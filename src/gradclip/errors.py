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

A code never changes its meaning. The text below each class is what ``gradclip explain CODE`` shows,
and what ``docs/reference/errors.md`` is made of.
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
    """A stable identifier; ``gradclip explain CODE`` explains it."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        # A note is shown below a traceback, and is no part of the message: whoever catches the
        # error, or writes it to a log, has the message alone.
        self.add_note(f"To read more: gradclip explain {self.code}")


class ConfigError(GradClipError, ValueError):
    """A configuration holds something that cannot be meant.

    Why: A field is unknown or missing, or its value is out of range, such as a negative limit.

    What to do: The message has the field, the place in the file, and the nearest valid name.
    Correct it there. A configuration that is built in Python raises pydantic's
    ``ValidationError``, which is a ``ValueError`` too, with the same words.

    Example:
        >>> from gradclip.pipeline.hooks import GradientClippingHookConfig
        >>> GradientClippingHookConfig.from_str('{"max_nrom": 1.0}')
        Traceback (most recent call last):
        gradclip.errors.ConfigError: error[GC001]: unknown field `max_nrom` ...
          --> text: max_nrom
           |
           = did you mean `max_norm`?
           ...
    """

    code = "GC001"


class ClassTypeError(ConfigError):
    """A ``class_type`` names something that a configuration may not build.

    Why: A file could otherwise run any code. It may name a class of gradclip, and one that your
    program has made known.

    What to do: Name a class of gradclip, import the module that declares your class before the
    file is read, or allow its package: ``load(path, allow=("my_package",))``.

    Example:
        >>> from gradclip.config import Config
        >>> Config.from_str('{"class_type": "os:system"}')
        Traceback (most recent call last):
        gradclip.errors.ClassTypeError: error[GC002]: ... is not a configurable class
        ...
    """

    code = "GC002"


class ConfigFileError(ConfigError):
    """A file cannot be read as a configuration.

    Why: Its syntax is wrong, it has a key twice, an alias, a tag, or a number that versions of YAML
    read differently, or it is too large or too deep.

    What to do: The message shows the place. Write the value out there, and a text in quotes.

    Example:
        >>> from gradclip.config import Config
        >>> Config.from_str('{"max_norm": 1, "max_norm": 2}')
        Traceback (most recent call last):
        gradclip.errors.ConfigFileError: error[GC003]: the key 'max_norm' is repeated
        ...
    """

    code = "GC003"


class ArgumentValueError(GradClipError, ValueError):
    """An argument is of the right kind, and its value cannot be used.

    Why: The value is out of range (a negative limit, a ``norm_type`` of 0), does not fit the model
    (a pattern that matches no parameter, a list that is longer than ``param_groups``), or would
    change nothing (an exhausted generator, an attribute that nothing reads).

    What to do: The message has the argument, the value, and what is expected. On several processes
    give all of them the same arguments, and all parameters. For a model that FSDP1 wraps give the
    wrapped module itself.

    Example:
        >>> import gradclip, torch
        >>> gradclip.clip_grad_norm_(torch.nn.Linear(2, 1).parameters(), max_norm=-1.0)
        Traceback (most recent call last):
        gradclip.errors.ArgumentValueError: max_norm is -1.0: expected a number >= 0, ...
    """

    code = "GC010"


class ArgumentTypeError(GradClipError, TypeError):
    """An argument is of the wrong kind.

    Why: The call needs something else, such as a number where a text was given, or an optimizer
    where a model was given. A misspelt keyword is also of this kind.

    What to do: The message has the argument, what it was, and what is expected.

    Example:
        >>> import gradclip, torch
        >>> gradclip.clip_grad_norm_(torch.nn.Linear(2, 1).parameters(), max_norm="one")
        Traceback (most recent call last):
        gradclip.errors.ArgumentTypeError: max_norm is 'one', of type str: expected a number...
    """

    code = "GC011"


class UnsupportedGradientError(GradClipError, TypeError):
    """A gradient is of a kind that cannot be measured or scaled.

    Why: It is integer, float8 or on the meta device, was made in inference mode, or is of a type
    that runs operations by itself (``MaskedTensor``, ``FakeTensor``). Or it is complex and should
    be clamped, is placed on a mesh in another way than at the first step, or FSDP2 keeps it to
    itself while gradients are accumulated.

    What to do: The message has the parameter and the reason. Convert that gradient, or leave its
    parameter out: ``{"name.*": None, "*": 1.0}``. With FSDP2, clip after the last backward pass of
    an accumulation.

    Example:
        >>> import gradclip, torch
        >>> weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        >>> weight.grad = torch.ones(2, dtype=torch.complex64)
        >>> gradclip.clip_grad_value_([weight], 0.5)
        Traceback (most recent call last):
        gradclip.errors.UnsupportedGradientError: ... complex numbers have no order to clamp by...
    """

    code = "GC020"


class OverlappingGradientsError(GradClipError, ValueError):
    """Gradients share memory, so some elements would be scaled twice.

    Why: One ``.grad`` is another one, or a view of it.

    What to do: Clone one of them: ``b.grad = a.grad.clone()``.

    Example:
        >>> import gradclip, torch
        >>> a, b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
        >>> a.grad = b.grad = torch.ones(2)
        >>> gradclip.clip_grad_norm_([a, b], 1.0)
        Traceback (most recent call last):
        gradclip.errors.OverlappingGradientsError: ... parameters[1] shares memory with ...
    """

    code = "GC021"


class CaptureError(GradClipError, RuntimeError):
    """A CUDA graph is captured before the first steps, or a limit is changed after the capture.

    Why: A captured graph repeats what was captured. What clipping needs on the device has to be
    there by then, and a limit of later does not get into it.

    What to do: Run the step two or three times before the capture, as ``torch.cuda.graph`` asks
    anyway. Change a limit before the capture, or make a new clipper and capture anew.
    """

    code = "GC022"


class StateError(GradClipError, ValueError):
    """A saved state does not belong to what should load it.

    Why: It was saved with another policy, other parameters or another version, or is damaged.

    What to do: Make the clipper, the callback or the hook as it was in the run that saved it. To go
    on without the history, do not load its state.

    Example:
        >>> import gradclip, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> state = gradclip.GradientClipper(model, gradclip.EMAClip()).state_dict()
        >>> gradclip.GradientClipper(model, 1.0).load_state_dict(state)
        Traceback (most recent call last):
        gradclip.errors.StateError: ... it was saved under 'ema', and the policy here is 'norm': ...
    """

    code = "GC030"


class DoubleClippingError(GradClipError, ValueError):
    """The same gradients would be clipped twice.

    Why: Two hooks, attachments or callbacks have one optimizer, a ``GradientClipper`` or
    ``clip_grad_norm_`` is left in the loop beside one of those, or the framework clips by itself
    (``max_grad_norm``, ``gradient_clip_val``). A second limit silently changes what the first one
    means. DeepSpeed clips by itself too: it has another limit, or cannot do what is asked of it.

    What to do: Keep one of them. Switch the option of the framework off, or leave gradclip out.
    Where the handle of an attachment is lost, ``gradclip.attached(optimizer)`` returns it.
    docs/reference/integrations/deepspeed.md has what DeepSpeed can do.

    Example:
        >>> import gradclip, torch
        >>> optimizer = torch.optim.SGD(torch.nn.Linear(2, 1).parameters(), lr=0.1)
        >>> handle = gradclip.attach(optimizer, 1.0)
        >>> gradclip.attach(optimizer, 0.5)
        Traceback (most recent call last):
        gradclip.errors.DoubleClippingError: the gradients of this SGD are already clipped ...
    """

    code = "GC101"


class NonFiniteGradientError(GradClipError, RuntimeError):
    """The gradients hold a NaN or an infinity.

    Why: The loss or the backward pass overflowed, divided by zero, or took a root or a logarithm of
    0; or the data has a NaN. It is an error because you asked for one, with ``nonfinite="raise"``
    or ``error_if_nonfinite=True``.

    What to do: The message has the parameters and how many elements they are. Look at the loss and
    the batch of that step; ``torch.autograd.detect_anomaly()`` finds the operation. To leave such a
    step out and go on training: ``nonfinite="skip"``, the default.

    Example:
        >>> import gradclip, torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([1.0, float("nan")])
        >>> gradclip.clip_grad_norm_([weight], 1.0, error_if_nonfinite=True)
        Traceback (most recent call last):
        gradclip.errors.NonFiniteGradientError: The total norm of order 2.0 for gradients ...
          1 of 1 gradients affected; first in parameter order:
            parameters[0]  (2,) float32   NaN: 1   Inf: 0
          ...
    """

    code = "GC201"


class TooManySkipsError(NonFiniteGradientError):
    """More steps in a row than allowed were skipped.

    Why: One bad batch is skipped and forgotten. More than ``max_consecutive_skips`` of them are no
    accident: the weights or the data are at fault, and training does not move any more.

    What to do: Lower the learning rate, and look at the data and the loss of the first skipped
    step. Go back to a checkpoint of before.

    Example:
        >>> import gradclip, torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> clipper = gradclip.GradientClipper([weight], 1.0, max_consecutive_skips=0)
        >>> weight.grad = torch.tensor([1.0, float("nan")])
        >>> clipper.clip()
        Traceback (most recent call last):
        gradclip.errors.TooManySkipsError: ...
          More than max_consecutive_skips=0 steps in a row were skipped: ...
    """

    code = "GC202"


class RankError(GradClipError, RuntimeError):
    """Another process of the training could not clip, so none did.

    Why: That process had an error of its own, which is in the message. Or the limit was changed in
    some processes and not in the others.

    What to do: Look at that error first. Change a limit in all processes, between the same two
    steps.
    """

    code = "GC210"


class ReplicaError(GradClipError, RuntimeError):
    """Processes that should hold the same gradient hold different ones, or not all have it.

    Why: The gradients were not reduced after ``backward()``, the processes do not clip the same
    step, or their parameters are not copies of each other at all.

    What to do: Reduce the gradients (DDP does), or declare parameters that differ on purpose:
    ``partitioned={pattern: process_group}``. ``GRADCLIP_DEBUG=1`` names the first that differs.
    """

    code = "GC211"


class CollectiveError(GradClipError, RuntimeError):
    """Processes could not talk to each other while they clipped.

    Why: Another process died, is late, or does not clip at this step.

    What to do: Look for the first error in the logs of the other processes; it is the cause. Let
    every process clip at every step, also where it has no gradients.
    """

    code = "GC212"


class CheckpointError(GradClipError, RuntimeError):
    """A checkpoint is missing or damaged, does not fit, or cannot be written.

    Why: Writing it was interrupted, a file was changed, the run is another one, or the disk is
    full. Or a run that starts from scratch would save among the checkpoints of an earlier one.

    What to do: Resume from the folder that holds the checkpoints, which takes the newest whole one.
    Where it cannot be written, make room; those that were there are as they were. Make the model,
    the optimizer and the hooks as in the run that saved, and give a new run another ``save_root``.
    """

    code = "GC301"


class RecordError(GradClipError, OSError):
    """A record of a run cannot be written.

    Why: The disk is full, the folder cannot be written, or it has the steps of another run. It is
    raised before the first step. Later on a warning says, once, from which step lines are missing,
    and training goes on.

    What to do: Make room, or give another folder. To go on with the run that is there, load the
    state of its clipper before the first step; or delete the folder.
    """

    code = "GC302"


class LogError(GradClipError, ValueError):
    """A log of a run cannot be read, or does not say which numbers are gradient norms.

    Why: The file is empty, damaged, no text or a folder. Or no column has a known name, or there
    are only the norms of parts of the model.

    What to do: Name the column with ``--norm-key`` (``norm_key`` in Python); the message lists the
    columns and the nearest. Of a damaged file it has the line.

    Example:
        gradclip suggest metrics.csv --norm-key total_grad_norm
    """

    code = "GC303"


class MissingDependencyError(GradClipError, ImportError):
    """A feature needs a package that is not installed.

    Why: gradclip installs only what clipping needs.

    What to do: The message has the command, such as ``pip install "gradclip[pipeline]"``.
    """

    code = "GC401"


class AbsentNameError(GradClipError, ImportError):
    """RoboOrchardLab has this name, and gradclip does not.

    Why: gradclip has most names of RoboOrchardLab 0.4.0, and does a few things in another way.

    What to do: The message has what to use in its place;
    docs/how-to/coming-from-roboorchard.md has them all.
    """

    code = "GC402"
