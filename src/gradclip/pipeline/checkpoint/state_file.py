"""A state in a file of a checkpoint; nothing is unpickled when it is read."""

from pathlib import Path
from typing import Any

import torch

__all__ = ["read_state", "write_state"]


def write_state(state: object, file: Path) -> None:
    """Write numbers, strings, tensors, and lists and dictionaries of these.

    Raises:
        OSError: The disk is full, or cannot be written; perhaps behind an error of torch.
    """
    # torch's own files would say of a full disk no more than that a zip archive is broken.
    with file.open("wb") as stream:
        torch.save(state, stream)


def read_state(file: Path) -> Any:
    """Return what ``write_state`` wrote, in host memory."""
    return torch.load(file, map_location="cpu", weights_only=True)
