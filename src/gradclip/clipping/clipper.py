"""``GradientClipper``: the object that clips. What it does is in ``engine``."""

from collections.abc import Iterable, Mapping
from typing import Any, Self, TypeAlias, Unpack

import torch
from torch import Tensor, nn

from gradclip.clipping.arguments import ClipOptions, HasPolicy, read_options
from gradclip.clipping.collect.sources import ParameterSource, as_source
from gradclip.clipping.engine import Engine
from gradclip.clipping.kernels.device import untraced
from gradclip.clipping.policies import PoliciesLike, any_writes, as_policies
from gradclip.clipping.ranks import telling_others
from gradclip.clipping.result import ClipResult
from gradclip.clipping.step.loop import warn_of_zero
from gradclip.clipping.step.ownership import Guest, Role
from gradclip.clipping.step.rows import StepLog
from gradclip.clipping.step.turn import Turn
from gradclip.errors import ArgumentTypeError
from gradclip.record.stats import Stats

ParametersLike: TypeAlias = (
    nn.Module
    | torch.optim.Optimizer
    | Tensor
    | Iterable[Tensor]
    | Iterable[tuple[str, Tensor]]
    | ParameterSource
)


class GradientClipper(HasPolicy):
    """Bounds the gradients of a set of parameters: bound once, called at each step.

    Args:
        params: Tensors, (name, tensor) pairs, an ``nn.Module``, or a torch ``Optimizer``; a module
            or optimizer is asked again at each call, so parameters that were replaced or added
            are found.
        policy: A number (``max_norm``), a policy, or a mapping of name patterns (``fnmatch``, first
            match wins) to those; of an optimizer also a list, one entry for each ``param_group``.
            None as an entry leaves its parameters alone.
        options: The keywords of ``ClipOptions``, among them ``max_norm`` in place of a policy.

    Raises:
        ArgumentTypeError: GC011, for an argument of the wrong kind, or an unknown keyword.
        ArgumentValueError: GC010, for one out of range, patterns that do not fit the names, or
            ranks that give different arguments.

    Note:
        Where ranks hold parameters together, making a clipper and each ``clip`` are collective:
        every rank does it, at the same step, whatever gradients it has.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> GradientClipper([weight], max_norm=1.0).clip()
    ClipResult(norm_pre=5, norm_post=1, threshold=1, coefficient=0.2, \
clipped=True, skipped=False, nonfinite=0)
    """

    def __init__(
        self,
        params: ParametersLike,
        policy: PoliciesLike | None = None,
        **options: Unpack[ClipOptions],
    ) -> None:
        self._bind(params, policy, options, "GradientClipper", Guest("a GradientClipper"))

    @classmethod
    def with_role(
        cls,
        role: Role,
        params: ParametersLike,
        policy: PoliciesLike | None,
        options: ClipOptions,
        *,
        called: str,
    ) -> Self:
        """Make a clipper for something that clips before every step, and owns the gradients.

        Args:
            role: What it is to others that clip the same gradients.
            params: As in the class.
            policy: As in the class.
            options: As in the class.
            called: What takes these arguments, as an error says it.
        """
        clipper = cls.__new__(cls)
        clipper._bind(params, policy, options, called, role)  # noqa: SLF001 - its own
        return clipper

    def _bind(self, *given: Any) -> None:
        self._engine, self._turn = _engine(*given), Turn()

    @property
    def policy(self) -> Any:
        """What bounds the gradients. Another one may be assigned: ``clipper.policy = 0.5``.

        It counts from the next step on, and is written to the record. The history goes on where
        the policy is of the same kind, and begins anew otherwise. Where ranks hold parameters
        together, all of them assign it, between the same two steps. It is not saved.

        Raises:
            ArgumentValueError: GC010, in an assignment, for a policy that the history or the ranks
                do not fit: another ``scope``, ``norm_type``, ``window`` or ``warmup``, other
                patterns, or a list of another length than there are ``param_groups``.
            CaptureError: GC022, likewise, after ``clip`` was captured in a CUDA graph.
            DoubleClippingError: GC101, likewise, for what was removed, under DeepSpeed, or where
                something else clips, and only measuring was possible so far.
        """
        return self._engine.policy

    @policy.setter
    def policy(self, policy: PoliciesLike) -> None:
        with self._turn.lock:
            self._engine.assign(policy)

    def admit(self, policy: PoliciesLike) -> None:
        """Raise what an assignment to ``policy`` would raise; nothing is changed."""
        self._engine.admit(policy)

    @property
    def step(self) -> int:
        """How many calls there were."""
        return self._engine.step

    @property
    def last(self) -> ClipResult | None:
        """The result of the last call."""
        return self._engine.last

    @property
    def stats(self) -> Stats:
        """What all steps since this clipper was made came to, but for those in a CUDA graph."""
        return self._engine.step_log.stats

    @property
    def step_log(self) -> StepLog:
        """The numbers of all steps, for what logs or records them."""
        return self._engine.step_log

    @property
    def writes(self) -> bool:
        """Whether gradients can change, or steps be skipped; else gradients are only measured."""
        return any_writes(self._engine.policies)

    def note(self, *, loss: float | Tensor | None = None, lr: float | Tensor | None = None) -> None:
        """Tell the record, if there is one, the loss and the rate of the next step, before it.

        Of several losses it has the mean, and without a rate that of the optimizer's first group.
        """
        self._engine.recorder.note(loss=loss, lr=lr)

    def note_last(self, loss: float) -> None:
        """Tell the record the loss of the last step, where it is known only after it."""
        self._engine.recorder.note_last(loss)

    def close(self) -> None:
        """Write to the record whatever is waiting, and close it; the next step goes on with it."""
        self._engine.recorder.close()

    @untraced
    def clip(
        self,
        grad_scale: float | Tensor | None = None,
        *,
        overflow_expected: bool = False,
        defer_scaling: bool = False,
    ) -> ClipResult:
        """Clip the gradients that exist now, in place.

        Args:
            grad_scale: What the gradients are still multiplied by (a loss scale): a positive
                number or one-element tensor. Limits and norms are those of unscaled gradients.
            overflow_expected: An active loss scaler answers for an overflow at this step, so that
                a skip does not count towards ``max_consecutive_skips``.
            defer_scaling: Leave it to the caller to multiply where ``ClipResult.deferred`` says so.

        Returns:
            What was measured and done. Nothing waits for the device, unless ``nonfinite="raise"``.

        Raises:
            UnsupportedGradientError: GC020, for integer, float8 or meta gradients, for tensors
                that run operations by themselves, and for complex ones that should be clamped.
            OverlappingGradientsError: GC021, for gradients that share bytes.
            ArgumentValueError: GC010, for gradients on a device that the backend cannot serve, or
                a policy whose answer does not fit.
            CaptureError: GC022, inside a CUDA graph that is captured before the first steps.
            StateError: GC030, for a history that was loaded and is of other parameters.
            DoubleClippingError: GC101, for an attachment, callback or hook, if another came first.
            NonFiniteGradientError: GC201, with ``nonfinite="raise"``.
            RankError: GC210, if another rank could not clip, or was assigned another policy.
            ReplicaError: GC211, if gradients that ranks should hold alike differ.
            CollectiveError: GC212, if another rank is gone.
            TooManySkipsError: GC202, after ``max_consecutive_skips``; on a GPU four steps later.
            RecordError: GC302, at the first step, for a folder that cannot be recorded in.

        All are raised before any gradient is changed, but for GC202 on an accelerator.
        """
        with self._turn.lock:
            return self._engine.clip(
                grad_scale, overflow_expected=overflow_expected, defer_scaling=defer_scaling
            )

    def take_back(self) -> None:
        """Take the last call back from the histories: its step was not made, and comes again."""
        with self._turn.lock, torch.no_grad():
            self._engine.take_back()

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on: numbers, strings and tensors.

        A history has the name of its scope. Where ranks hold different parameters, each saves its.
        """
        with self._turn.lock:
            return self._engine.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Histories are found again by the names of parameters, whatever order they are in now; the
        next ``clip`` warns of parameters that are gone, and of new ones, whose history begins
        then. Without names the number of parameters must be the same.

        Raises:
            StateError: GC030, if it is damaged, of another version, or of other policies; nothing
                is changed then. The next ``clip`` raises it for a history that does not fit.
        """
        with self._turn.lock:
            self._engine.load_state_dict(state)


def _engine(
    params: ParametersLike,
    policy: PoliciesLike | None,
    options: ClipOptions,
    called: str,
    role: Role,
) -> Engine:
    with telling_others():
        given, checked = read_options(called, policy, options)
        policies, division = as_policies(given)
        warn_of_zero(called, policies)
        source = as_source(params, "params")
        if division == "by group" and source.group_sizes() is None:
            raise ArgumentTypeError(
                f"policy={given!r} is a list, with an entry for each param_group, and {called} was "
                "given no optimizer. Give the optimizer, or limits by name: a mapping of patterns."
            )
        return Engine(source, policies, checked, role, division=division, called=called)
