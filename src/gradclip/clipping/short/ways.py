"""Which short ways there are for the policies of an engine, and how they are tried."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from gradclip.clipping.arguments import Options
from gradclip.clipping.kernels import Backends
from gradclip.clipping.kernels.device import is_capturing
from gradclip.clipping.measure.binding import Binding
from gradclip.clipping.policies import Policy
from gradclip.clipping.result import ClipResult
from gradclip.clipping.short.fused import Fused
from gradclip.clipping.short.lean import FEW, Lean
from gradclip.clipping.short.results import of_fused, of_small
from gradclip.clipping.step.judge import Judge
from gradclip.clipping.step.ownership import Role

_CPU = torch.device("cpu")


class ShortWays:
    """Clips a small model on the CPU, and any on a device that does it in a few launches.

    Args:
        binding: The patterns of an engine.
        policies: By pattern; None leaves it alone.
        options: The checked keywords.
        backends: The choice of backend.
        role: What the engine is to others that clip the same gradients.
        judge: What a NaN means for the step.
        by_pattern: Whether patterns were given; otherwise there is one result for all.
    """

    def __init__(
        self,
        binding: Binding,
        policies: Mapping[str, Policy | None],
        options: Options,
        backends: Backends,
        role: Role,
        judge: Judge,
        *,
        by_pattern: bool,
    ) -> None:
        self._binding, self._backends, self._options = binding, backends, options
        self._role, self._judge = role, judge
        self._by_pattern = by_pattern
        self._fuses = False
        self.assign(policies)

    def assign(self, policies: Mapping[str, Policy | None]) -> None:
        """Find the ways that these policies have."""
        backends = self._backends
        lean = backends.are_portable and not self._by_pattern
        self._lean = Lean.of(policies["*"]) if lean else None
        self._fused = Fused.of(
            policies, self._options, backends, self._role, by_pattern=self._by_pattern
        )

    def follow(self, device: torch.device) -> None:
        """Take the ways that a device has, once gradients were seen there."""
        self._fuses = self._backends.on(device).fused is not None

    def clip(
        self, grad_scale: float | Tensor | None, step: int, *, expected: bool, defer: bool
    ) -> ClipResult | None:
        """Clip where nothing is unusual; None elsewhere, where nothing was done.

        Args:
            grad_scale: What the gradients are still multiplied by.
            step: Which call it is.
            expected: A loss scaler answers for an overflow.
            defer: Leave it to the caller to multiply, if there is one coefficient.
        """
        if self._lean is not None and grad_scale is None and not defer:
            last = self._clip_lean(self._lean)
            if last is not None:
                return last
        if self._fused is not None and self._fuses:
            return self._clip_fused(self._fused, grad_scale, step, expected=expected, defer=defer)
        return None

    def _clip_lean(self, lean: Lean) -> ClipResult | None:
        here = self._binding.here
        if len(here) != 1 or len(here[0].parameters.parameters) > FEW:
            return None  # to read thousands of gradients twice takes long
        small = lean.read(here[0].found(), here[0].known)
        if small is None:
            return None
        pattern = here[0]
        if pattern.writes:
            self._role.check(small.gradients)
        last = of_small(small, pattern.scope_names)
        if is_capturing(_CPU):
            last.compute()
        self._judge.pass_sound(small.norm)
        small.write(self._role)
        return last

    def _clip_fused(
        self,
        fused: Fused,
        grad_scale: float | Tensor | None,
        step: int,
        *,
        expected: bool,
        defer: bool,
    ) -> ClipResult | None:
        patterns = self._binding.here
        if not patterns:
            return None
        found = [pattern.found() for pattern in patterns]
        judge = partial(
            self._judge.judge_report,
            found=found,
            patterns=patterns,
            overflow_expected=expected,
            may_skip=self._binding.may_skip,
            peers=self._binding.peers,
            step=step,
        )
        caches = [pattern.known for pattern in patterns]
        clip = fused.clip(found, caches, judge, grad_scale, defer=defer)
        if clip is None:
            return None
        names, scopes = zip(*((each.name, each.scope_names) for each in patterns), strict=True)
        return of_fused(clip, names, scopes, by_pattern=self._by_pattern)
