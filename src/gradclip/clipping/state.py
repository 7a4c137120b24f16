"""What a clipper remembers: the histories of its policies, and how they are saved and restored.

The engine owns every history. A policy returns new tensors; they are written in place into
buffers here, where the step is made. So a skipped step leaves no trace, and a captured CUDA graph
finds the same memory at each replay.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradclip.clipping import flags
from gradclip.clipping.flags import Flag, negated
from gradclip.clipping.measure.scopes import ScopeNames
from gradclip.clipping.policies import Policy, PolicyState, Scopes
from gradclip.clipping.policies.changes import is_same_kind
from gradclip.clipping.saved import SavedHistory, damaged
from gradclip.errors import ArgumentValueError, warn

_SHOWN = 4


class Histories:
    """The history of each pattern's policy, and how many steps were made."""

    def __init__(self) -> None:
        self._kept: dict[str, SavedHistory] = {}
        self._of: dict[str, Scopes] = {}
        self._loaded: dict[str, SavedHistory | None] = {}
        self._loaded_counts = 0, 0
        self._counts: Tensor | tuple[int, int] | None = None
        self._counts_before: Tensor | tuple[int, int] | None = None
        self._undo: list[tuple[Tensor, Tensor | None, Tensor]] = []
        self._held: dict[str, Sequence[Tensor]] = {}
        self._copies: dict[int, tuple[Tensor, Tensor, int]] = {}

    def prepare(
        self,
        pattern: str,
        policy: Policy,
        scopes: Scopes,
        *,
        named: bool,
        held: Sequence[Tensor] = (),
    ) -> None:
        """Make the buffers of a pattern, where there are none for these scopes yet.

        Args:
            pattern: Whose history.
            policy: Its policy.
            scopes: What the policy is told; its names are ``ScopeNames``.
            named: Whether those are names of parameters; otherwise they are positions.
            held: Those parameters.

        Raises:
            StateError: GC030, for a history that was loaded and does not fit.
            ArgumentValueError: GC010, for an ``initial_state`` that has not one row per scope.
        """
        self._place_counts(scopes.device)
        if self._of.get(pattern) is scopes and pattern not in self._loaded:
            return
        initial = policy.initial_state(scopes)
        _check_initial(policy, initial, len(scopes.names))
        names = scopes.names
        assert isinstance(names, ScopeNames)
        with torch.inference_mode(mode=False):  # later calls may be outside of it
            made = SavedHistory(names.scope, names.parts, named, initial.copy())
        if pattern in self._loaded:
            # Taken out first: one that does not fit is refused once, and the old one stays.
            loaded = self._loaded.pop(pattern)
            if loaded is not None:
                _restore(pattern, loaded, made)
                _tell_of_others(pattern, loaded, made)
        elif (known := self._kept.get(pattern)) is not None:
            # Parameters were added, removed or replaced during the run.
            _restore(pattern, *_matched(known, self._held[pattern], made, held))
        self._kept[pattern], self._of[pattern] = made, scopes
        self._held[pattern] = held
        self._copies = {}

    def follow(self, old: Mapping[str, Policy | None], new: Mapping[str, Policy | None]) -> None:
        """Forget the histories of policies in whose place others come, of another kind."""
        for pattern, policy in old.items():
            if not is_same_kind(policy, new.get(pattern)):
                for known in (self._kept, self._of, self._held, self._loaded):
                    known.pop(pattern, None)

    def count_from(self, made: int) -> None:
        """Go on with so many steps made, where no policy was asked at the last ones."""
        self._loaded_counts, self._counts = (made, 0), None
        self._forget_undo()

    def of(self, pattern: str) -> PolicyState:
        """Return a copy of the history of a pattern, which was prepared.

        A policy may answer with a tensor of its history, and a result is read after the history
        was written.
        """
        state = self._kept[pattern].state
        return PolicyState(
            {name: self._told(buffer) for name, buffer in state.per_scope.items()},
            {name: self._told(buffer) for name, buffer in state.shared.items()},
        )

    def _told(self, buffer: Tensor) -> Tensor:
        """Return a copy, for a policy. A captured CUDA graph would find one as it was."""
        if flags.host_waits_for(buffer.device):
            self._copies.pop(id(buffer), None)
        return self._copied(buffer)

    def _copied(self, buffer: Tensor) -> Tensor:
        """Return the last copy again where neither was written to since: histories may be large."""
        known = self._intact(buffer)
        copy = buffer.clone() if known is None else known
        if not copy.is_inference():
            self._copies[id(buffer)] = buffer, copy, copy._version  # noqa: SLF001 - there is no other
        return copy

    def _intact(self, buffer: Tensor) -> Tensor | None:
        """Return the last copy of a buffer, unless a policy wrote to it."""
        of, copy, version = self._copies.get(id(buffer), (None, buffer, 0))
        return copy if of is buffer and copy._version == version else None  # noqa: SLF001

    @property
    def step(self) -> Tensor:
        """How many steps were made: a copy, 0-d int64 on the device."""
        return self._count(0)

    @property
    def skips(self) -> Tensor:
        """How many steps in a row policies kept from being made: a copy, 0-d int64."""
        return self._count(1)

    def _count(self, which: int) -> Tensor:
        counts = self._counts
        assert counts is not None
        if isinstance(counts, Tensor):
            return counts[which].clone()
        return torch.full((), counts[which], dtype=torch.int64, device="cpu")

    def _place_counts(self, device: torch.device) -> None:
        """Keep counts on a device, where reading them would make the host wait; else as numbers."""
        known = self._counts
        if not flags.host_waits_for(device):
            if not isinstance(known, tuple):
                self._counts = self.steps, self.skips_in_a_row
        elif not isinstance(known, Tensor) or known.device != device:
            counts = self.steps, self.skips_in_a_row
            self._counts = torch.stack(
                [torch.full((), n, dtype=torch.int64, device=device) for n in counts]
            )

    def _counted(self, made: Flag, asked: Flag) -> Tensor | tuple[int, int]:
        """Return the counts after this step."""
        assert self._counts is not None
        if isinstance(self._counts, tuple):
            steps, skips = self._counts
            return (steps + 1, 0) if made else (steps, skips + bool(asked))
        on_device, skips_there = self._counts
        return torch.stack([on_device + made, (skips_there + asked) * negated(made)])

    def check(self, pattern: str, policy: Policy, new: PolicyState) -> None:
        """Refuse what a policy returned, if it does not fit its buffers.

        Raises:
            ArgumentValueError: GC010.
        """
        for kind, mine, theirs in _pairs(self._kept[pattern].state, new):
            if mine.keys() != theirs.keys():
                raise _unfit(policy, f"{kind} has {sorted(mine)}, returned {sorted(theirs)}")
            for name, tensor in mine.items():
                other = theirs[name]
                seen = (other.shape, other.dtype, other.device)
                if seen != (tensor.shape, tensor.dtype, tensor.device):
                    expected = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
                    raise _unfit(
                        policy,
                        f"{kind}[{name!r}] is {expected}, returned "
                        f"{tuple(other.shape)} {other.dtype} on {other.device}",
                    )
        for name, pushed in new.pushed.items():
            rows = [tuple(each.shape) for each in pushed]
            if name not in new.per_scope or rows != [(len(new.per_scope[name]), 1)] * 2:
                raise _unfit(policy, f"pushed[{name!r}] is of {rows}: expected (scopes, 1) twice")

    def commit(self, new: Mapping[str, tuple[PolicyState, Flag]], made: Flag, asked: Flag) -> None:
        """Write what policies returned, each where its step is made.

        Args:
            new: By pattern the state that its policy returned, and whether its step is made.
            made: Whether the step of the optimizer is made.
            asked: Whether a policy asked that it is not made, and nothing else forbids it.
        """
        if self._counts is None:
            return
        written = [
            (buffer, theirs[name], made_here)
            for pattern, (state, made_here) in new.items()
            for _, mine, theirs in _pairs(self._kept[pattern].state, state)
            for name, buffer in mine.items()
            if made_here is not False and theirs[name] is not self._intact(buffer)
        ]
        counts = self._counted(made, asked)
        before = self._counts
        self._counts_before = before.clone() if isinstance(before, Tensor) else before
        self._undo = [(buffer, None, self._copied(buffer)) for buffer, _, _ in written]
        pushes = [
            self._pushed(self._kept[pattern].state.per_scope[name], *pushed, made_here)
            for pattern, (state, made_here) in new.items()
            for name, pushed in state.pushed.items()
            if made_here is not False
        ]
        # Nothing was written so far.
        for buffer, after, made_here in written:
            self._copies.pop(id(buffer), None)
            if isinstance(made_here, Tensor):
                torch.where(made_here, after, buffer, out=buffer)
            else:
                buffer.copy_(after)
        for push in pushes:
            self._write(*push)
        self._count_again(counts)

    def _count_again(self, counts: Tensor | tuple[int, int]) -> None:
        """Set the counts: a captured CUDA graph writes where they are."""
        if isinstance(self._counts, Tensor) and isinstance(counts, Tensor):
            self._counts.copy_(counts)
        else:
            self._counts = counts

    def _pushed(
        self, buffer: Tensor, places_S1: Tensor, values_S1: Tensor, made: Flag
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return a buffer, places in it, and what is written there."""
        before_S1 = buffer.gather(1, places_S1)
        if isinstance(made, Tensor):
            values_S1 = torch.where(made, values_S1, before_S1)
        self._undo.append((buffer, places_S1, before_S1))
        return buffer, places_S1, values_S1

    def _write(self, buffer: Tensor, places_S1: Tensor, values_S1: Tensor) -> None:
        copy = self._intact(buffer)
        self._copies.pop(id(buffer), None)
        buffer.scatter_(1, places_S1, values_S1)
        if copy is not None:  # and stays one
            copy.scatter_(1, places_S1, values_S1)
            self._copies[id(buffer)] = buffer, copy, copy._version  # noqa: SLF001

    def take_back(self) -> None:
        """Put back what the last ``commit`` wrote over."""
        for buffer, places_S1, before in self._undo:
            if places_S1 is None:
                buffer.copy_(before)
            else:
                buffer.scatter_(1, places_S1, before)
        if self._counts_before is not None:
            self._count_again(self._counts_before)
        self._copies = {}
        self._forget_undo()

    def _forget_undo(self) -> None:
        self._counts_before, self._undo = None, []

    def tensors(self) -> dict[str, dict[tuple[str, str], Tensor]]:
        """Return all tensors of each pattern, by what they are and name."""
        return {
            pattern: {
                (kind, name): tensor
                for kind in ("per_scope", "shared")
                for name, tensor in getattr(kept.state, kind).items()
            }
            for pattern, kept in self._kept.items()
        }

    def saved(self) -> dict[str, Any]:
        """Return each history that is not empty."""
        return {
            pattern: each.to_dict()
            for pattern, each in {**self._kept, **self._loaded}.items()
            if each is not None and (each.state.per_scope or each.state.shared)
        }

    @property
    def steps(self) -> int:
        """How many steps were made, on the host; waits for the device."""
        return self._loaded_counts[0] if self._counts is None else int(self._counts[0])

    @property
    def skips_in_a_row(self) -> int:
        """How many steps in a row policies kept from being made; waits for the device."""
        return self._loaded_counts[1] if self._counts is None else int(self._counts[1])

    def load(self, steps: int, skips: int, states: Mapping[str, SavedHistory]) -> None:
        """Take over what ``saved`` returned; histories are fitted to scopes at the next step."""
        self._loaded_counts = steps, skips
        self._counts = None
        self._forget_undo()
        self._loaded = {pattern: states.get(pattern) for pattern in {*self._kept, *states}}


def _pairs(
    mine: PolicyState, theirs: PolicyState
) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Tensor]]]:
    yield "per_scope", mine.per_scope, theirs.per_scope
    yield "shared", mine.shared, theirs.shared


def _unfit(policy: Policy, reason: str) -> ArgumentValueError:
    return ArgumentValueError(
        f"{type(policy).__name__}.decide returned a state that does not fit its initial_state: "
        f"{reason}. A history has tensors of fixed names, shapes, dtypes and devices. No gradient "
        "and no history was changed."
    )


def _check_initial(policy: Policy, initial: object, scopes: int) -> None:
    if not isinstance(initial, PolicyState):
        raise ArgumentValueError(
            f"{type(policy).__name__}.initial_state returned {initial!r}: expected a PolicyState"
        )
    for name, tensor in initial.per_scope.items():
        if tensor.shape[:1] != (scopes,):
            raise ArgumentValueError(
                f"{type(policy).__name__}.initial_state: per_scope[{name!r}] has the shape "
                f"{tuple(tensor.shape)}, and there are {scopes} scopes: its first dimension is "
                "that of scopes. What has another shape belongs into shared."
            )


def _restore(pattern: str, saved: SavedHistory, made: SavedHistory) -> None:
    """Copy a saved history into new buffers: by the names of scopes, or by position.

    Raises:
        StateError: GC030.
    """
    _check_same_kind(pattern, saved, made)
    if not (saved.named and made.named) and saved.scopes != made.scopes:
        counts = [(start, rows) for _, start, rows in saved.scopes]
        if counts != [(start, rows) for _, start, rows in made.scopes]:
            raise damaged(
                f"the history of {pattern!r} is of {len(saved.scopes)} parameters without names, "
                f"and there are {len(made.scopes)}: which belongs to which cannot be told"
            )
        for name, tensor in made.state.per_scope.items():
            tensor.copy_(saved.state.per_scope[name])
    else:
        _restore_by_name(saved, made)
    for name, tensor in made.state.shared.items():
        tensor.copy_(saved.state.shared[name])


def _check_same_kind(pattern: str, saved: SavedHistory, made: SavedHistory) -> None:
    """Refuse a history of other tensors.

    Raises:
        StateError: GC030.
    """
    if saved.scope != made.scope:
        raise damaged(
            f"the history of {pattern!r} is of scope {saved.scope!r}, and its policy has scope "
            f"{made.scope!r}"
        )
    for kind, mine, theirs in _pairs(made.state, saved.state):
        if mine.keys() != theirs.keys():
            raise damaged(
                f"the history of {pattern!r} has {kind} {sorted(mine)}, seen "
                f"{sorted(map(str, theirs))}"
            )
        for name, tensor in mine.items():
            kept = tensor.shape[1:] if kind == "per_scope" else tensor.shape
            seen = theirs[name].shape[1:] if kind == "per_scope" else theirs[name].shape
            if kept != seen or tensor.dtype != theirs[name].dtype:
                raise damaged(
                    f"{name!r} of {pattern!r} is {tuple(tensor.shape)} {tensor.dtype}, seen "
                    f"{tuple(theirs[name].shape)} {theirs[name].dtype}"
                )
    count = sum(rows for _, _, rows in saved.scopes)
    for name, tensor in saved.state.per_scope.items():
        if tensor.shape[:1] != (count,):
            raise damaged(
                f"{name!r} of {pattern!r} is of {count} norms, seen {tuple(tensor.shape)}"
            )


def _restore_by_name(saved: SavedHistory, made: SavedHistory) -> None:
    there = _spans(saved.scopes)
    for key, (offset, start, rows) in _spans(made.scopes).items():
        if key not in there:
            continue
        from_offset, from_start, from_rows = there[key]
        # Rows of one parameter that are in both, where ranks hold some of them each.
        first, last = max(start, from_start), min(start + rows, from_start + from_rows)
        if first >= last:
            continue
        here = slice(offset + first - start, offset + last - start)
        source = slice(from_offset + first - from_start, from_offset + last - from_start)
        for name, tensor in made.state.per_scope.items():
            tensor[here] = saved.state.per_scope[name][source].to(tensor.device)


def _matched(
    known: SavedHistory, held: Sequence[Tensor], made: SavedHistory, parameters: Sequence[Tensor]
) -> tuple[SavedHistory, SavedHistory]:
    """Return histories of one run, whose scopes are named by which parameter of before they are of.

    The same tensor is the same parameter. One that was replaced is found by its name; without
    names by its position, where there are as many as before.
    """
    if made.scope == "group":
        return known, made
    numbers = {id(parameter): number for number, parameter in enumerate(held)}
    here = set(map(id, parameters))
    replaced: dict[str, list[int]] = {}
    if (known.named and made.named) or len(known.scopes) == len(made.scopes):
        for number, (name, _, _) in enumerate(known.scopes):
            if number >= len(held) or id(held[number]) not in here:
                replaced.setdefault(name, []).append(number)
    found = []
    for number, (name, start, rows) in enumerate(made.scopes):
        parameter = parameters[number] if number < len(parameters) else None
        same = numbers.get(id(parameter))
        if same is None and replaced.get(name):
            same = replaced[name].pop(0)
        found.append(("new" if same is None else str(same), start, rows))
    before = [(str(n), start, rows) for n, (_, start, rows) in enumerate(known.scopes)]
    return replace(known, scopes=before, named=True), replace(made, scopes=found, named=True)


def _tell_of_others(pattern: str, saved: SavedHistory, made: SavedHistory) -> None:
    """Warn of scopes whose history was dropped, and of those whose history begins now."""
    if not (saved.named and made.named and made.state.per_scope):
        return
    there, here = _spans(saved.scopes), _spans(made.scopes)
    dropped, new = _without(there, here), _without(here, there)
    if dropped or new:
        warn(
            f"the history of {pattern!r} was saved for other parameters. Dropped, because they are "
            f"not here: {_listed(dropped)}. New, so that their history begins now: {_listed(new)}."
        )


_Span: TypeAlias = tuple[int, int, int]


def _spans(scopes: Sequence[tuple[str, int, int]]) -> dict[tuple[str, int], _Span]:
    """Return where the scopes of each parameter are: offset, number of the first, how many.

    By name and number of the parameter of that name: the groups of an optimizer may have names
    in common.
    """
    spans: dict[tuple[str, int], _Span] = {}
    times: Counter[str] = Counter()
    offset = 0
    for name, start, rows in scopes:
        spans[name, times[name]] = offset, start, rows
        times[name] += 1
        offset += rows
    return spans


def _without(
    spans: Mapping[tuple[str, int], _Span], others: Mapping[tuple[str, int], _Span]
) -> list[str]:
    """Return the names of parameters some of whose scopes are not among others."""
    names = []
    for key, (_, start, rows) in spans.items():
        _, first, count = others.get(key, (0, 0, 0))
        if rows and not (first <= start and start + rows <= first + count):
            names.append(key[0])
    return names


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) + more) or "none"
