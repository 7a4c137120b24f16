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
    """What a policy answers: a scope above its threshold is scaled down to its target.

    Args:
        thresholds: Norm above which a scope is scaled: float64 (S,), or one number for all.
        targets: Norm that such a scope gets: float64 (S,), or one number for all.
        state: The policy's history after this step.
    """

    thresholds: float | Tensor
    targets: float | Tensor
    state: dict[str, Tensor] = field(default_factory=dict)


class Policy(Config, ABC):
    """One way to bound gradients; one file each.

    A subclass adds a ``clip_mode`` literal of its own, which names it in files, and fields.
    """

    scope: ClassVar[Literal["group", "tensor", "unit"]] = "group"
    """What has a norm and a coefficient of its own: all gradients of a group together, each
    tensor, or each index of a tensor's leading dimension. On several ranks the norms of tensors and
    of indices, and so ``norm_pre`` and ``norm_post``, are of those that this rank has a part of."""

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
