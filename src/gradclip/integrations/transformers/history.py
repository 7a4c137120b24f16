"""What a clipper remembers, as JSON: Trainer keeps its state, and that of callbacks, in a file."""

from collections.abc import Mapping
from typing import Any

import torch

from gradclip.clipping import GradientClipper
from gradclip.errors import StateError

__all__ = ["KEY", "exported", "restore"]

_WAY_OUT = (
    "To go on without it, take stateful_callbacks.gradclip out of the checkpoint's "
    "trainer_state.json."
)
_TABLES = ("per_scope", "shared")
KEY = "gradclip"
"""Where the history is in ``TrainerState.stateful_callbacks``."""


def exported(clipper: GradientClipper) -> dict[str, Any]:
    """Return a clipper's state as numbers, strings and lists.

    A mapping whose order counts becomes a list of pairs, a tensor its dtype and its values.
    """
    state = clipper.state_dict()
    return {
        **state,
        # The file sorts what is in a mapping, and the first pattern that matches wins.
        "clip_modes": [[pattern, mode] for pattern, mode in state["clip_modes"].items()],
        "states": {
            pattern: {
                **history,
                **{
                    kind: {
                        name: [str(tensor.dtype).removeprefix("torch."), tensor.tolist()]
                        for name, tensor in history[kind].items()
                    }
                    for kind in _TABLES
                },
            }
            for pattern, history in state["states"].items()
        },
    }


def restore(
    clipper: GradientClipper, saved: Mapping[str, Any], device: torch.device | None
) -> None:
    """Load what ``exported`` returned.

    Args:
        clipper: Gets the history.
        saved: As it came out of the file.
        device: Where the policies' tensors go; None for the CPU.

    Raises:
        StateError: GC030, it is damaged or of other policies; no history was changed.
    """
    try:
        state = {
            **saved,
            "clip_modes": dict(saved["clip_modes"]),
            "states": {
                pattern: {
                    **history,
                    **{
                        kind: {
                            name: torch.tensor(values, dtype=getattr(torch, dtype), device=device)
                            for name, (dtype, values) in history[kind].items()
                        }
                        for kind in _TABLES
                    },
                }
                for pattern, history in saved["states"].items()
            },
        }
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise StateError(
            f"the history of gradclip in this checkpoint is damaged: {error!r}. {_WAY_OUT}"
        ) from error
    try:
        clipper.load_state_dict(state)
    except StateError as error:
        raise StateError(f"{error} {_WAY_OUT}") from error
