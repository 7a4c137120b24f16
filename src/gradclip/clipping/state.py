"""What a saved clipper is checked for before anything of it is taken over."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gradclip.errors import StateError

STATE_VERSION = 1


def read_state(
    state: object, own: Mapping[str, Any]
) -> tuple[int, int, dict[str, dict[str, Tensor]]]:
    """Read a saved state.

    Args:
        state: What somebody wants to load.
        own: The state of the clipper that should load it.

    Returns:
        The steps, the skips in a row, and each policy's history by pattern.

    Raises:
        StateError: GC030, if it is no such state, or belongs to other policies.
    """
    if not isinstance(state, Mapping) or state.keys() != own.keys():
        keys = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise _damaged(f"expected a mapping with {sorted(own)}, seen {keys}")
    if state["version"] != own["version"]:
        raise _damaged(f"expected version {own['version']}, seen {state['version']!r}")
    modes = state["clip_modes"]
    # In order: the first pattern that matches wins.
    if not isinstance(modes, Mapping) or list(modes.items()) != list(own["clip_modes"].items()):
        raise _damaged(f"it is of {state['clip_modes']!r}, the clipper of {own['clip_modes']}")
    counts = [state["step"], state["consecutive_skips"]]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise _damaged(f"step and consecutive_skips are counts, seen {counts!r}")
    states = state["states"]
    if not isinstance(states, Mapping) or not states.keys() <= own["clip_modes"].keys():
        raise _damaged(f"states has a history for each pattern, seen {states!r}")
    for pattern, history in states.items():
        whole = isinstance(history, Mapping)
        if not whole or not all(isinstance(value, Tensor) for value in history.values()):
            raise _damaged(f"the history of {pattern!r} has tensors by name, seen {history!r}")
    step, skips = counts
    return (
        step,
        skips,
        {
            pattern: {name: tensor.clone() for name, tensor in history.items()}
            for pattern, history in states.items()
        },
    )


def check_history(
    pattern: str, history: Mapping[str, Tensor], own: Mapping[str, Tensor], scopes: int
) -> None:
    """Check that a history that was loaded is of this policy and of as many scopes.

    Args:
        pattern: Whose it is.
        history: What was loaded.
        own: What the policy would begin with.
        scopes: How many norms there are.

    Raises:
        StateError: GC030.
    """
    if history.keys() != own.keys():
        raise _damaged(f"the history of {pattern!r} has {sorted(own)}, seen {sorted(history)}")
    for name, tensor in own.items():
        # What else a policy keeps may grow, and one number for one scope may be such a thing.
        shape, by_scope = tuple(history[name].shape), scopes > 1 and tensor.shape[:1] == (scopes,)
        if by_scope and shape[:1] != (scopes,):
            raise _damaged(f"{name!r} of {pattern!r} is of {scopes} norms, seen the shape {shape}")


def _damaged(reason: str) -> StateError:
    return StateError(
        f"this state cannot be loaded into this clipper: {reason}. No gradient and no history was "
        "changed."
    )
