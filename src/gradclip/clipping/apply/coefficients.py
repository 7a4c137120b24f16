"""From a decision to coefficients: ``where(n > tau, c / n, 1)``, with room for rounding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import TypeAlias

import torch
from torch import Tensor

from gradclip.clipping.kernels import Backends
from gradclip.clipping.policies.base import Decision

Flag: TypeAlias = bool | Tensor
"""A bool where the host knows it for nothing, a 0-d bool tensor on an accelerator."""

_SUBNORMAL = 2.0**-1000
_STEP = 2.0**-600


_FLAGS = torch.tensor(False), torch.tensor(True)


def host_waits_for(device: torch.device) -> bool:
    """Return whether reading a number from a device would make the host wait."""
    return device.type != "cpu"


def as_flag(flag: Flag, device: torch.device) -> Tensor:
    """Return a flag as 0-d bool tensor; filled on the device, since a copy would be waited for."""
    if isinstance(flag, bool):
        return (
            _FLAGS[flag]
            if device.type == "cpu"
            else torch.full((), flag, dtype=torch.bool, device=device)
        )
    return flag


def as_known(flag: Tensor) -> Flag:
    """Return a flag as bool where reading it costs nothing."""
    return flag if host_waits_for(flag.device) else bool(flag)


def all_of(flags: Sequence[Flag]) -> Flag:
    """Return whether all are true: as bool where that is known without reading a tensor."""
    others = [flag for flag in flags if not isinstance(flag, bool)]
    known = all(flag for flag in flags if isinstance(flag, bool))
    if not (others and known):
        return known
    return others[0] if len(others) == 1 else torch.stack(others).all()


@dataclass(eq=False)
class Response:
    """What the scopes of a group are multiplied by.

    Args:
        backends: The choice of backend.
        norms_S: Norm of each scope, float64 (S,).
        decision: Thresholds and targets.
        counts: Whether this step is made.
        guard: Relative margin that keeps rounding from exceeding a target.
        otherwise: The coefficient of a step that is not made: 0 to set zeros, 1 to change nothing.
    """

    backends: Backends
    norms_S: Tensor
    decision: Decision
    counts: Flag
    guard: float
    otherwise: float

    def __post_init__(self) -> None:
        self.number = self._number()
        """The one coefficient, where there is one and the host can see it for nothing."""

    def _number(self) -> float | None:
        if not isinstance(self.counts, bool):
            return None
        if not self.counts:
            return self.otherwise
        if not isinstance(self.decision.thresholds, Tensor) and self.decision.thresholds == inf:
            return 1.0
        if self.norms_S.numel() != 1 or host_waits_for(self.norms_S.device):
            return None
        norm = float(self.norms_S)
        if not norm > float(self.decision.thresholds):
            return 1.0
        return min(float(self.decision.targets) / norm, 1.0) * (1 - self.guard)

    @cached_property
    def coefficients_S(self) -> Tensor:
        """What each scope is multiplied by, float64 (S,)."""
        if self.number is not None:
            return torch.full_like(self.norms_S, self.number)
        home = self.norms_S.device
        return self.backends.on(home).coefficients(
            self.norms_S,
            self.decision.thresholds,
            self.decision.targets,
            as_flag(self.counts, home),
            self.guard,
            self.otherwise,
        )

    def factors(self) -> Iterator[float | Tensor]:
        """Yield what to multiply by, one after the other: nothing, one factor, or two.

        Two where float64 has no precise number for their product: a norm of 1e300 and a target of
        1e-20 have a subnormal quotient.
        """
        if self.number is None:
            yield self.coefficients_S
        elif self.counts and self.number < _SUBNORMAL and float(self.decision.targets) > 0:
            yield _STEP
            norm = float(self.norms_S) * _STEP
            yield float(self.decision.targets) / norm * (1 - self.guard)
        elif self.number != 1:
            yield self.number
