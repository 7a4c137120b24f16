"""A saved state: its form, and how it is read and checked before anything is changed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradclip.clipping.policies import PolicyState
from gradclip.errors import StateError

STATE_VERSION = 2
_COUNTS = ("step", "committed_steps", "consecutive_skips", "policy_skips")


@dataclass(frozen=True, eq=False)
class SavedHistory:
    """A history with the names of its scopes.

    Args:
        scope: What a scope is.
        scopes: Each parameter: its name, the number of its first scope, and how many it has.
        named: Whether those are names; otherwise they are positions.
        state: The tensors.
    """

    scope: str
    scopes: list[tuple[str, int, int]]
    named: bool
    state: PolicyState

    def to_dict(self) -> dict[str, Any]:
        """Return it as lists, strings and tensors."""
        return {
            "scope": self.scope,
            "scopes": [list(part) for part in self.scopes],
            "named": self.named,
            "per_scope": self.state.copy().per_scope,
            "shared": self.state.copy().shared,
        }


@dataclass(frozen=True)
class SavedState:
    """A saved clipper, once it was checked.

    Args:
        step: How many calls there were.
        committed_steps: How many steps were made.
        consecutive_skips: Skips in a row.
        policy_skips: How many steps in a row policies kept from being made.
        histories: Of each pattern.
    """

    step: int
    committed_steps: int
    consecutive_skips: int
    policy_skips: int
    histories: dict[str, SavedHistory] = field(default_factory=dict)


def read_state(state: object, own: Mapping[str, Any]) -> SavedState:
    """Read a saved state.

    Args:
        state: What a user wants to load. Version 1 is read where it holds no history.
        own: The state of the clipper that should load it.

    Raises:
        StateError: GC030, if it is no such state, or belongs to other policies.
    """
    if not isinstance(state, Mapping):
        raise damaged(f"expected a mapping with {sorted(own)}, seen {type(state).__name__}")
    version = state.get("version")
    if version == 1 and "committed_steps" not in state:
        state = _of_version_1(state)
    state = {"policy_skips": 0, **state}  # as it was saved before policies were told
    if state.keys() != own.keys():
        raise damaged(f"expected a mapping with {sorted(own)}, seen {sorted(map(str, state))}")
    if state["version"] != own["version"]:
        raise damaged(f"expected version {own['version']}, seen {version!r}")
    modes = state["clip_modes"]
    # In order: the first pattern that matches wins.
    if not isinstance(modes, Mapping) or list(modes.items()) != list(own["clip_modes"].items()):
        raise damaged(
            f"it was saved under {_in_words(modes)}, and the policy here is "
            f"{_in_words(own['clip_modes'])}: give the policy of then, or assign it before loading "
            "where it was assigned during the run"
        )
    counts = [state[name] for name in _COUNTS]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise damaged(f"{', '.join(_COUNTS)} are counts, seen {counts!r}")
    states = state["states"]
    if not isinstance(states, Mapping) or not states.keys() <= own["clip_modes"].keys():
        raise damaged(f"states has a history for each pattern, seen {states!r}")
    histories = {p: _read_history(p, each) for p, each in states.items()}
    return SavedState(**dict(zip(_COUNTS, counts, strict=True)), histories=histories)


def _of_version_1(state: Mapping[str, Any]) -> Mapping[str, Any]:
    states = state.get("states")
    if isinstance(states, Mapping) and any(states.values()):
        raise damaged(
            "it is of version 1 and holds the history of a policy, which was kept without the "
            "names of parameters. Begin without it"
        )
    return {**state, "version": STATE_VERSION, "committed_steps": state.get("step"), "states": {}}


def _read_history(pattern: str, history: object) -> SavedHistory:
    keys = {"scope", "scopes", "named", "per_scope", "shared"}
    if not isinstance(history, Mapping) or history.keys() != keys:
        raise damaged(f"the history of {pattern!r} has {sorted(keys)}, seen {history!r}")
    tables = [history["per_scope"], history["shared"]]
    for table in tables:
        whole = isinstance(table, Mapping)
        if not whole or not all(map(_is_dense, table.values())):
            raise damaged(f"the history of {pattern!r} has tensors by name, seen {table!r}")
    try:
        scopes = [(str(name), int(start), int(rows)) for name, start, rows in history["scopes"]]
    except (TypeError, ValueError) as error:
        raise damaged(f"the scopes of {pattern!r} are names with counts: {error}") from error
    state = PolicyState(*map(dict, tables)).copy()
    return SavedHistory(str(history["scope"]), scopes, bool(history["named"]), state)


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta


def _in_words(modes: object) -> str:
    """Say the policies by pattern; alone, one for all parameters is said without its pattern."""
    alone = isinstance(modes, Mapping) and [*modes] == ["*"]
    return repr(modes["*"] if alone and isinstance(modes, Mapping) else modes)


def damaged(reason: str) -> StateError:
    """Return the error of a state that cannot be loaded."""
    return StateError(
        f"the saved state of clipping cannot be loaded: {reason}. No gradient and no history was "
        "changed."
    )
