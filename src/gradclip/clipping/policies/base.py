"""What a policy is: a configuration, and a rule from norms to thresholds."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from math import inf
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradclip.config import Config


@dataclass(frozen=True)
class Decision:
    """What a policy answers: scopes above their threshold are scaled down to their target.

    Args:
        thresholds_S: Norm above which a scope is scaled, float64 (S,).
        targets_S: Norm that such a scope gets, float64 (S,).
        state: The policy's history after this step.
    """

    thresholds_S: Tensor
    targets_S: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)

    def coefficients(self, norms_S: Tensor, counts: Tensor, guard: float) -> Tensor:
        """Return what each scope is multiplied by, float64 (S,): ``where(n > tau, c / n, 1)``.

        Args:
            norms_S: Norm of each scope, float64 (S,).
            counts: 0-d bool; where false, nothing is scaled.
            guard: Relative margin that keeps rounding from exceeding the target.
        """
        readable = norms_S.device.type == "cpu" and norms_S.numel() == 1
        if readable and not float(norms_S) > float(self.thresholds_S):
            return torch.ones_like(norms_S)  # as most steps do
        exceeds_S = (norms_S > self.thresholds_S) & counts
        shrunk_S = (self.targets_S / norms_S).clamp(max=1.0) * (1 - guard)
        return torch.where(exceeds_S, shrunk_S, 1.0)


class Policy(Config, ABC):
    """One way to bound gradients; one file each.

    A subclass adds a ``clip_mode`` literal of its own, which names it in files, and fields.
    """

    scope: ClassVar[Literal["group", "tensor", "unit"]] = "group"
    """What has a norm and a coefficient of its own: all gradients of a group together, each
    tensor, or each index of a tensor's leading dimension."""

    clip_mode: str

    @property
    def order(self) -> float:
        """The p of the norm that is measured."""
        return 2.0

    @property
    def ceiling(self) -> float:
        """The fixed limit that errors and results quote; inf if there is none."""
        return inf

    @property
    def element_limit(self) -> float | None:
        """The limit of each element, for a policy that clamps and does not scale."""
        return None

    @property
    def writes(self) -> bool:
        """Whether gradients can change at all; otherwise they are measured and left alone."""
        return True

    def initial_state(self, scopes: int, device: torch.device) -> dict[str, Tensor]:  # noqa: ARG002 - for policies with history
        """Return the history before the first step: tensors by name, kept and saved for it."""
        return {}

    @abstractmethod
    def decide(self, norms_S: Tensor, counts: Tensor, state: dict[str, Tensor]) -> Decision:
        """Decide from norms, on their device and without reading the host.

        Args:
            norms_S: Norm of each scope, float64 (S,); may be non-finite where ``counts`` is false.
            counts: 0-d bool: whether this step will be made. History must not see others.
            state: What the last decision returned, or ``initial_state``.
        """
