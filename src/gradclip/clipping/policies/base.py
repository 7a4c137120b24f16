"""What a policy is: a configuration, and a rule from norms to thresholds."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from gradclip.config import Config

Scope: TypeAlias = Literal["group", "tensor", "unit"]


@dataclass(frozen=True, eq=False)
class Scopes:
    """What a policy is told once: what has a norm of its own. The same at every step.

    A scope is there whether its parameters have a gradient at a step or not.

    Args:
        names: One per scope, made when they are read: the keys of a saved history.
        sizes_S: Elements of each scope, on all ranks that hold a part of it: int64 (S,).
        device: Where norms and states are.
    """

    names: Sequence[str]
    sizes_S: Tensor
    device: torch.device


@dataclass(frozen=True, eq=False, kw_only=True)
class Measurement:
    """What a policy is told at each step. Later versions may add fields.

    Args:
        norms_S: Norm of each scope, float64 (S,); 0 where nothing has a gradient, on any rank. It
            may be non-finite where ``committed`` is false.
        total_norm: Norm of all parameters of the pattern, on all ranks: 0-d float64.
        committed: Whether, as far as is known, this step will be made: 0-d bool.
        step: How many steps were made before this one: 0-d int64, on the device.
        skips: How many steps in a row, up to this one, were not made because a policy asked for it:
            0-d int64, on the device.
        weight_norms_S: Norm of the weights of each scope, with the same p: float64 (S,); only for
            a policy with ``needs_weight_norms``.
    """

    norms_S: Tensor
    total_norm: Tensor
    committed: Tensor
    step: Tensor
    skips: Tensor
    weight_norms_S: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PolicyState:
    """The history of a policy: tensors of fixed shapes, by name.

    Args:
        per_scope: Tensors of shape (S, ...): saved and restored by the names of scopes.
        shared: Tensors of any shape.
        pushed: In an answer, what is written into large tensors of ``per_scope`` that are
            returned as they were given, and share no memory with thresholds or targets: by name the
            places, int64 (S, 1), and the numbers, (S, 1).
    """

    per_scope: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    pushed: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def copy(self) -> "PolicyState":
        """Return the same numbers in tensors of their own."""
        return PolicyState(
            {name: tensor.clone() for name, tensor in self.per_scope.items()},
            {name: tensor.clone() for name, tensor in self.shared.items()},
        )


EMPTY = PolicyState()
"""The history of a policy that has none."""


@dataclass(frozen=True, eq=False)
class Decision:
    """What a policy answers: a scope above its threshold is scaled down to its target.

    Args:
        thresholds: Norm above which a scope is scaled: float64 (S,), or one number for all.
        targets: Norm that such a scope gets: float64 (S,), or one number for all. A target above
            the norm leaves a scope as it is.
        state: The history after this step, of the shapes that it had. It is forgotten if the step
            is not made.
        skip: Whether this step should not be made: 0-d bool. On several ranks it may depend on
            ``total_norm``, on the norm of scope "group" and on ``step``, which all ranks know.
    """

    thresholds: float | Tensor
    targets: float | Tensor
    state: PolicyState = EMPTY
    skip: bool | Tensor = False


@dataclass(frozen=True)
class FixedLimit:
    """A rule that numbers say completely, so that no policy has to be asked at each step.

    Args:
        threshold: Norm above which a scope is scaled.
        target: Norm that such a scope gets.
        skip_above: Total norm above which the step is not made.
    """

    threshold: float
    target: float
    skip_above: float = inf


class Policy(Config, ABC):
    """One way to bound gradients; one file each.

    A subclass adds a ``clip_mode`` literal of its own, which names it in files, and fields. It
    never changes state: the engine keeps what ``initial_state`` and ``decide`` return, writes it
    where the step is made, and saves it. ``decide`` is arithmetic on tensors of one device, and
    reads nothing on the host.
    """

    scope: ClassVar[Scope]
    """What has a norm and a coefficient of its own. "group": all gradients of a pattern together.
    "tensor": each tensor. "unit": each index of a tensor's output dimension; a vector is one
    unit. That dimension is 1 for the weight of a transposed convolution, in each of its groups,
    where the module is known (a clipper of a module, or a callback), and 0 elsewhere;
    ``unit_dims`` says it of other tensors. The default is "group"; a policy that allows the choice
    makes it a field. On several ranks the scopes "tensor" and "unit" are those that this rank has
    a part of."""

    needs_weight_norms: ClassVar[bool] = False
    """Whether ``decide`` is told the norms of the weights, for which all weights are read."""

    clip_mode: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = [kind for kind in cls.__mro__ if kind is not Policy and issubclass(kind, Policy)]
        if not any(
            "scope" in vars(kind) or "scope" in vars(kind).get("__annotations__", {})
            for kind in own
        ):
            # Not on the base class: a subclass could not make a field of it.
            cls.scope = "group"
        rule, numbers = (
            next(n for n, kind in enumerate(cls.__mro__) if name in vars(kind))
            for name in ("decide", "fixed")
        )
        if rule < numbers:  # a rule of its own, of which the numbers of its parent say nothing
            cls.fixed = Policy.fixed  # type: ignore[method-assign]

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        # Pydantic puts it first where it is a field, since the base class declares it first.
        return sorted(super().__repr_args__(), key=lambda field: field[0] == "scope")

    @property
    def order(self) -> float:
        """The p of the norm that is measured."""
        return 2.0

    @property
    def unit_dims(self) -> Mapping[str, int | Literal["tensor"]]:
        """By name pattern the dimension that has the units, where it is another one.

        "tensor" makes the whole tensor one unit. It counts for scope "unit" alone.
        """
        return {}

    @property
    def element_limit(self) -> float | None:
        """The limit of each element, for a policy that clamps and does not scale."""
        return None

    @property
    def writes(self) -> bool:
        """Whether gradients can change, or steps be skipped; else gradients are only measured."""
        return True

    @property
    def skips_in_a_row(self) -> int:
        """How many steps in a row it asks to skip, after which it takes a norm as usual; or 0."""
        return 0

    def fixed(self) -> FixedLimit | None:
        """Return the rule as numbers, where that is all there is; ``decide`` is not called then."""
        return None

    def initial_state(self, scopes: Scopes) -> PolicyState:  # noqa: ARG002 - for policies with history
        """Return the history before the first step."""
        return EMPTY

    @abstractmethod
    def decide(self, seen: Measurement, state: PolicyState) -> Decision:
        """Decide from what was measured.

        Args:
            seen: The norms, on their device.
            state: The history after the last step that was made. It must not be changed.
        """
