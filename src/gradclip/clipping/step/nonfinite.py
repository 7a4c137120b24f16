"""What happens around a NaN or an infinity: the report of an error, and the count of skips."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import TypeAlias

import torch
from torch import Tensor

from gradclip.clipping.collect.gradients import Gradients
from gradclip.clipping.collect.parameters import ParameterGroup
from gradclip.clipping.flags import Flag, as_flag
from gradclip.clipping.kernels.blocks import BLOCK, flat, pieces
from gradclip.clipping.kernels.device import copy_to_host
from gradclip.errors import NonFiniteGradientError, TooManySkipsError, warn
from gradclip.record.ring import Pending, Ring

_NAMED = 3
"""How many parameters at fault an error names."""


Describe: TypeAlias = Callable[[bool], str | None]
"""Describes a skipped step, given whether a policy asked for it; None on ranks that need not."""


class SkipCounter:
    """Counts skipped steps in a row, warns of the first, and tells when there are too many.

    On the CPU the flag is read at once. On an accelerator it is copied while the device goes on,
    and the flag of step t is looked at in step t + 4, so that no step waits. Steps inside a
    CUDA graph are not counted.

    Args:
        limit: Skips in a row that are tolerated.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.warned = False
        """Whether there was a skip to warn of."""
        self.by_policy = False
        """Whether a policy asked for the last skip that was counted."""
        self._in_a_row = 0
        self._late: Ring[tuple[bool, Describe | None]] = Ring()

    def record(
        self,
        skipped: Flag,
        unwanted: Flag = False,
        describe: Describe | None = None,
        *,
        expected: bool = False,
    ) -> bool:
        """Record whether a step was skipped.

        Args:
            skipped: Whether it was.
            unwanted: Whether a policy asked for it, which no loss scaler answers for.
            describe: Says what happened, where this is the first; None for no warning.
            expected: A skip is a loss scaler's doing: it neither counts nor ends a row.

        Returns:
            Whether more steps in a row than the limit were skipped.
        """
        if isinstance(skipped, bool):
            return self._count(skipped, unwanted is not False, expected, describe)
        if unwanted is not False:
            skipped = torch.stack([skipped, as_flag(unwanted, skipped.device)])
        return self.record_late(copy_to_host(skipped), expected, describe)

    def record_late(
        self,
        flags: Pending | None,
        expected: bool,
        describe: Describe | None,
        *,
        waits: bool = True,
    ) -> bool:
        """Record a step whose flags are on their way to the host.

        Args:
            flags: Whether it was skipped, and whether a policy asked for it; None counts nothing.
            expected: As in ``record``.
            describe: Likewise.
            waits: Whether to read them now would make the host wait.

        Returns:
            Whether more steps in a row than the limit were skipped.
        """
        if flags is not None and not waits:
            return self._count_late(flags.read(), (expected, describe))
        late = self._late.push(flags, (expected, describe))
        return late is not None and self._count_late(*late)

    def end_row(self) -> None:
        """Record a step that was made, as the host knows."""
        self._in_a_row = 0

    @property
    def in_a_row(self) -> int:
        """Skips in a row up to the last step; waits for the device."""
        while (late := self._late.pop()) is not None:
            self._count_late(*late)
        return self._in_a_row

    @in_a_row.setter
    def in_a_row(self, count: int) -> None:
        self._late.clear()
        self._in_a_row = count

    def _count_late(self, flags: list[float], note: tuple[bool, Describe | None]) -> bool:
        unwanted = len(flags) > 1 and bool(flags[1])
        return self._count(bool(flags[0]), unwanted, *note)

    def _count(
        self, skipped: bool, unwanted: bool, expected: bool, describe: Describe | None
    ) -> bool:
        if skipped and expected and not unwanted:
            return self._in_a_row > self.limit
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        self.by_policy = unwanted
        too_many = self._in_a_row > self.limit
        if skipped and not (too_many or self.warned) and describe is not None:
            self.warned = True
            if (said := describe(unwanted)) is not None:
                warn(said)
        return too_many


@dataclass(frozen=True)
class Faults:
    """The gradients of a process that hold a NaN or an infinity.

    Args:
        rank: Which process.
        described: Of each its name, shape and dtype, and how many elements are at fault, in order.
        total: How many gradients there are.
    """

    rank: int
    described: list[tuple[str, str]]
    total: int

    @classmethod
    def of(cls, gradients: Sequence[Gradients], rank: int) -> "Faults":
        """Look at every element: only for a failure."""
        described, total = [], 0
        for group in gradients:
            for name, tensor, values in zip(
                group.names, group.tensors, group.measured(2.0).tensors, strict=True
            ):
                total += 1
                nans, infinities = _count(values, torch.isnan), _count(values, torch.isinf)
                if nans or infinities:
                    dtype = str(tensor.dtype).removeprefix("torch.")
                    what = f"{tuple(tensor.shape)} {dtype}   NaN: {nans}   Inf: {infinities}"
                    described.append((name, what))
        return cls(rank, described, total)


def _count(values: Tensor, kind: Callable[[Tensor], Tensor]) -> int:
    """Count elements of a kind, block by block."""
    return sum(int(kind(piece).sum()) for piece in pieces(flat(values), BLOCK))


def nonfinite_report(
    faults: Sequence[Faults],
    *,
    norm_type: float,
    step: int,
    last_norms: Sequence[float],
    limit: float | Tensor,
) -> str:
    """Describe which gradients are non-finite, on this process or on all ranks.

    Args:
        faults: Of each process.
        norm_type: p of the norm.
        step: Which call it was.
        last_norms: The last ones that were finite.
        limit: The limit that was decided; a tensor with one for each scope is not quoted.
    """
    found: dict[tuple[str, str], list[int]] = {}
    for each in faults:
        for described in each.described:
            found.setdefault(described, []).append(each.rank)
    when = f" at step {step}" if step else ""
    count, total = sum(len(each.described) for each in faults), sum(each.total for each in faults)
    kind = "gradients" if len(faults) == 1 else f"local parts on {len(faults)} ranks"
    lines = [
        f"The total norm of order {norm_type} for gradients from `parameters` is non-finite{when}",
        f"  {count} of {total} {kind} affected; first in parameter order:",
    ]
    for (name, what), ranks in list(found.items())[:_NAMED]:
        where = "" if len(faults) == 1 else f"   on rank {', '.join(map(str, ranks[:_NAMED]))}"
        lines.append(f"    {name}  {what}{where}")
    if not isinstance(limit, Tensor) or limit.numel() == 1:
        norms = "  ".join(f"{norm:.4g}" for norm in last_norms) or "none yet"
        lines.append(f"  last finite norms:  {norms}        limit = {float(limit):g}")
    return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Suspects:
    """Which tensors of a pattern may have kept a step from being made; holds no gradient.

    Args:
        parameters: All of the pattern.
        present: Which of those had a gradient; None for all.
        sums_T: A number for each gradient: not finite just where it is not, NaN where it has one.
            None where all are finite.
        clamps: Whether the policy bounds infinities, so that a NaN alone is at fault.
    """

    parameters: ParameterGroup
    present: Sequence[bool] | None
    sums_T: Tensor | None
    clamps: bool

    def at_fault(self) -> tuple[list[str], int]:
        """Return the names of those at fault, and of how many; waits for the device."""
        names = self.parameters.names
        names = names if self.present is None else list(compress(names, self.present))
        if self.sums_T is None:
            return [], len(names)
        at_fault = self.sums_T.isnan() if self.clamps else ~self.sums_T.isfinite()
        return list(compress(names, at_fault.tolist())), len(names)


def first_skip(
    called: str,
    step: int,
    rank: int,
    suspects: Sequence[Suspects],
    *,
    owned: bool,
    by_policy: bool,
) -> str | None:
    """Describe the first step that was skipped, and what to do; None where another rank does.

    Args:
        called: What clips, as its user knows it.
        step: Which call it was.
        rank: Which process this is. The first one speaks, and those that have what is at fault.
        suspects: Of each pattern.
        owned: Whether the step is kept from being made; otherwise its loop has to do that.
        by_policy: Whether the policy asked for it.
    """
    found = [] if by_policy else [each.at_fault() for each in suspects]
    names = [name for named, _ in found for name in named]
    are_all = len(names) == sum(total for _, total in found) > 1
    if not names and rank > 0:
        return None
    if by_policy:
        why = "the policy asked to, and every gradient is finite"
    elif not names:
        why = "another rank found a NaN or an infinity, or failed"
    else:
        why = f"{_gradients(names, are_all=are_all)} a NaN or an infinity"
        if names[0].startswith("parameters["):
            why += "; made of model.named_parameters(), the optimizer or the clipper knows its name"
    done = (
        "The optimizer does not make this step."
        if owned
        else "Its gradients were set to zero; the step is yours to leave out: with "
        "gradclip.withhold(optimizer, result.skipped): optimizer.step()."
    )
    again = (
        "Where all have it at once, the cause is often the data or the loss of that step: look at "
        "those first. If it happens again, lower the learning rate"
        if are_all
        else "If it happens again, lower the learning rate, or look at the data and the loss"
    )
    look = (
        "If that happens often, its limit is too low."
        if by_policy
        else f'{again}; nonfinite="raise" stops at the first one.'
    )
    return f"{called} skipped step {step}: {why}. {done} {look} Later skips are counted in `stats`."


def _gradients(names: Sequence[str], *, are_all: bool) -> str:
    """Name the first one, and say how many they are."""
    if len(names) == 1:
        return f"the gradient of {names[0]} holds"
    if are_all:
        return f"the gradients of {names[0]} and all {len(names) - 1} others hold"
    others = "1 other" if len(names) == 2 else f"{len(names) - 1} others"  # noqa: PLR2004
    return f"the gradients of {names[0]} and {others} hold"


def skip_report(step: int) -> str:
    """Describe a step that a policy skipped, though every gradient was finite."""
    return f"The policy asked to skip step {step}; every gradient is finite"


def nonfinite_error(report: str, called: str | None) -> NonFiniteGradientError:
    """Say that nothing was changed, and how to go on, behind the report.

    Args:
        report: What was found.
        called: What clips, as its user knows it; None for a function, which cannot skip.
    """
    skips = "clip with gradclip.GradientClipper, which skips it"
    if called is not None:
        skips = f'give nonfinite="skip" to {called}'
    lines = [
        report,
        "  Scaling cannot repair them: one coefficient would spread a NaN to every gradient.",
        "  No gradient was changed, so the optimizer must not step on them. To drop such a step",
        f"  and keep training, {skips}.",
    ]
    return NonFiniteGradientError("\n".join(lines))


def too_many_skips(report: str, limit: int) -> TooManySkipsError:
    """Say that skipping did not help, behind the report of the last step."""
    return TooManySkipsError(
        f"{report}\n  More than max_consecutive_skips={limit} steps in a row were skipped: these "
        "are not spikes. Lower the learning rate, or look at the data and the loss."
    )
